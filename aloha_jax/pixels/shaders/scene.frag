// The light that casts shadows is added where it is seen.
in vec3 color, shaded_color, shadow_place;
uniform sampler2DShadow shadow_map;
out vec4 pixel;

void main() {
    pixel = vec4(color, 1.);
#if SHADOW_LIGHT >= 0
    pixel.rgb += shaded_color * texture(shadow_map, shadow_place);
#endif
}
