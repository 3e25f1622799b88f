// A pixel of the picture is the mean of those that were drawn.
uniform sampler2D drawn;
uniform int first_row;  // of the picture, among others
out vec4 pixel;

void main() {
    ivec2 first = SUPERSAMPLING * (ivec2(gl_FragCoord.xy) - ivec2(0, first_row));
    pixel = vec4(0.);
    for (int y = 0; y < SUPERSAMPLING; y++)
        for (int x = 0; x < SUPERSAMPLING; x++)
            pixel += texelFetch(drawn, first + ivec2(x, y), 0);
    pixel /= float(SUPERSAMPLING * SUPERSAMPLING);
}
