// Vertices carry the light, as in MuJoCo's renderer: OpenGL's fixed-function lighting with a local viewer.
in vec3 place, normal, rgb;
in vec4 material;  // specular, shininess, emission, index of the geom
uniform vec4 pose[3 * GEOMS];  // rows of each geom's pose in the world
uniform vec3 lights[4 * LIGHTS];  // each one's direction, ambient, diffuse, specular
uniform mat3 axes;
uniform vec3 eye;
uniform mat4 projection, shadow_box;
uniform float shadow_offset;
out vec3 color, shaded_color, shadow_place;

vec3 lit(int i, vec3 n, vec3 to_eye) {
    vec3 to_light = lights[4 * i];
    vec3 sum = lights[4 * i + 1] * rgb;
    float slope = dot(n, to_light);
    if (slope > 0.) {
        float glance = max(dot(n, normalize(to_light + to_eye)), 1e-6);  // 0 to the 0 is undefined
        sum += slope * lights[4 * i + 2] * rgb + pow(glance, material.y) * material.x * lights[4 * i + 3];
    }
    return sum;
}

void main() {
    int i = 3 * int(material.w);
    vec4 local = vec4(place, 1.);
    vec3 world = vec3(dot(pose[i], local), dot(pose[i + 1], local), dot(pose[i + 2], local));
    vec3 n = vec3(dot(pose[i].xyz, normal), dot(pose[i + 1].xyz, normal), dot(pose[i + 2].xyz, normal));
    vec3 to_eye = normalize(eye - world);
    gl_Position = projection * vec4(axes * (world - eye), 1.);
    color = material.z * rgb;
    for (int k = 0; k < LIGHTS; k++)
        if (k != SHADOW_LIGHT) color += lit(k, n, to_eye);
    color = clamp(color, 0., 1.);
#if SHADOW_LIGHT >= 0
    shaded_color = clamp(lit(SHADOW_LIGHT, n, to_eye), 0., 1.);
    shadow_place = (shadow_box * vec4(world + shadow_offset * n, 1.)).xyz;
    shadow_place.xy *= 1. - 2. / float(SHADOW_MAP);  // the map's margin
    shadow_place = .5 + .5 * shadow_place;
#endif
}
