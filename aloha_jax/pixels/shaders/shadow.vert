// How far from the light things are.
in vec4 place;  // and the index of the geom
uniform vec4 pose[3 * GEOMS];
uniform mat4 shadow_box;

void main() {
    int i = 3 * int(place.w);
    vec4 local = vec4(place.xyz, 1.);
    gl_Position = shadow_box * vec4(dot(pose[i], local), dot(pose[i + 1], local), dot(pose[i + 2], local), 1.);
}
