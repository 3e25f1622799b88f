"""A scene as triangles, lights and a camera, for the rasteriser in `egl_worker`: what of it does not move."""

from typing import TypedDict

import mujoco
import numpy as np

CASTS_NO_SHADOW = ("table",)  # below everything
SHADOW_OFFSET = 0.4  # texels of the shadow map
SHADOWS_UP_TO = 0.5  # share of the way from the lowest thing to the camera in which things are shaded


class Triangles(TypedDict):
    """The scene's triangles, lights and camera: plain arrays, which a process that knows nothing of this package can load.

    Attributes:
        vertices: float32[V, 13]: place and normal in the geom's frame, RGB, and of its material specular and shininess (the
            exponent), emission, and the geom's index.
        indices: uint32[3 * T]: three vertices of each triangle, counterclockwise from outside.
        ends: int[G + 1]: geom g has the indices from ends[g] to ends[g + 1].
        radii: float32[G]: of spheres around the geoms' places that contain them, metres.
        shadow_vertices: float32[S, 4]: of what casts shadows, places in the geom's frame and the geom's index.
        shadow_indices: uint32[3 * U]: three of them for each triangle.
        shadow_ends: int[G + 1]: as `ends`.
        lights: float32[L, 12]: the direction to the light, ambient, diffuse and specular RGB.
        shadow_light: index of the light that casts shadows; -1 if none does.
        axes: float32[3, 3]: rows are the camera's right, up and backward in the world.
        eye: float32[3]: the camera's place, metres.
        projection: float32[4, 4]: from there to OpenGL's clip coordinates.
        shadow_box: float32[4, 4]: from the world to the box that the shadow map covers, -1..1 along each axis.
        shadow_map: texels along an edge of the shadow map; 0 draws no shadows.
        shadow_offset: metres along the normal at which a surface looks whether it is in a shadow, lest it shades itself.
        supersampling: a pixel of the picture is the mean of as many along either axis.
    """

    vertices: np.ndarray
    indices: np.ndarray
    ends: np.ndarray
    radii: np.ndarray
    shadow_vertices: np.ndarray
    shadow_indices: np.ndarray
    shadow_ends: np.ndarray
    lights: np.ndarray
    shadow_light: int
    axes: np.ndarray
    eye: np.ndarray
    projection: np.ndarray
    shadow_box: np.ndarray
    shadow_map: int
    shadow_offset: float
    supersampling: int


def triangulate(model: mujoco.MjModel, camera: str, supersampling: int = 1) -> Triangles:
    """The triangles of a model of `visual.make_visual_model`, with the colours, lights and view that MuJoCo's renderer gives it.

    Raises:
        ValueError: it has what this cannot draw: textures, hidden or transparent geoms, others than meshes and boxes, lights or a
            camera that move, an orthographic camera, no light, lights that are not directional, several that cast shadows.
    """
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
    scene = _abstract_scene(model, data, camera)
    lights = [scene.lights[i] for i in range(scene.nlight)]
    geoms = [scene.geoms[i] for i in range(scene.ngeom)]
    _require_simple(model, camera, lights, geoms)
    vertices, indices, casting, radii = [], [], [], []
    first = 0
    for geom in geoms:
        places, normals, corners = _mesh(model, geom.objid) if geom.type == mujoco.mjtGeom.mjGEOM_MESH else _box(geom.size)
        material = [*geom.rgba[:3], geom.specular, geom.shininess * 128, geom.emission, geom.objid]
        vertices.append(np.hstack([places, normals, np.tile(material, (len(places), 1))]))
        indices.append(corners.ravel() + first)
        radii.append(np.linalg.norm(places, axis=1).max())
        first += len(places)
        if model.geom(geom.objid).name in CASTS_NO_SHADOW:
            corners = corners[:0]
        casting.append(np.insert(places[corners].reshape(-1, 3), 3, geom.objid, axis=1))
    shadow_vertices, shadow_indices = np.unique(np.concatenate(casting), axis=0, return_inverse=True)
    axes = data.cam_xmat[model.camera(camera).id].reshape(3, 3).T
    eye, view = data.cam_xpos[model.camera(camera).id], scene.camera[0]
    shadow_map = model.vis.quality.shadowsize
    shading = [i for i, light in enumerate(lights) if light.castshadow] if shadow_map else []
    depth = max(float(np.max(-(_corners(model, data, geom.objid) - eye) @ axes[2])) for geom in geoms)
    box = _shadow_box(lights[shading[0]].dir, axes, eye, view, depth) if shading else np.eye(4)
    return Triangles(
        vertices=np.concatenate(vertices).astype(np.float32),
        indices=np.concatenate(indices).astype(np.uint32),
        ends=np.cumsum([0, *map(len, indices)]),
        radii=np.array(radii, np.float32) * (1 + 1e-6),  # rounded up
        shadow_vertices=shadow_vertices.astype(np.float32),
        shadow_indices=shadow_indices.astype(np.uint32).ravel(),
        shadow_ends=np.cumsum([0, *map(len, casting)]),
        lights=np.array([[*-light.dir, *light.ambient, *light.diffuse, *light.specular] for light in lights], np.float32),
        shadow_light=shading[0] if shading else -1,
        axes=axes.astype(np.float32),
        eye=eye.astype(np.float32),
        projection=_projection(view).astype(np.float32),
        shadow_box=box.astype(np.float32),
        shadow_map=shadow_map,
        shadow_offset=SHADOW_OFFSET * 2 / max(shadow_map, 1) / float(np.linalg.norm(box[0, :3])),
        supersampling=supersampling,
    )


def _abstract_scene(model: mujoco.MjModel, data: mujoco.MjData, camera: str) -> mujoco.MjvScene:
    """As MuJoCo's renderer gets it: colours, lights (the headlight too) and the frustum."""
    scene = mujoco.MjvScene(model, maxgeom=model.ngeom + 10)
    view = mujoco.MjvCamera()
    view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(camera).id
    mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, view, mujoco.mjtCatBit.mjCAT_ALL, scene)
    return scene


def _require_simple(model: mujoco.MjModel, camera: str, lights: list[mujoco.MjvLight], geoms: list[mujoco.MjvGeom]) -> None:
    drawable, which = (mujoco.mjtGeom.mjGEOM_MESH, mujoco.mjtGeom.mjGEOM_BOX), model.camera(camera).id
    for holds, what in (
        ([geom.objid for geom in geoms] == list(range(model.ngeom)), "nothing but visible geoms"),
        (not model.ntex, "no textures"),
        (all(geom.rgba[3] == 1 for geom in geoms), "opaque geoms"),
        (all(geom.type in drawable for geom in geoms), "meshes and boxes alone"),
        (
            len(lights) > 0 and all(light.type == mujoco.mjtLightType.mjLIGHT_DIRECTIONAL for light in lights),
            "directional lights",
        ),
        (sum(light.castshadow for light in lights) <= 1, "at most one light that casts shadows"),
        (_stands_still(model.light_bodyid, model.light_mode), "lights that do not move"),
        (_stands_still(model.cam_bodyid[which], model.cam_mode[which]), "a camera that does not move"),
        (model.cam_projection[which] == mujoco.mjtProjection.mjPROJ_PERSPECTIVE, "a camera with a perspective"),
        (model.cam_sensorsize[which].all(), "a camera with a sensor"),
    ):
        if not holds:
            raise ValueError(f"the rasteriser only draws scenes with {what}; --render-quality exact draws any")


def _stands_still(body: np.ndarray, mode: np.ndarray) -> bool:
    return bool(np.all(body == 0) and np.all(mode == mujoco.mjtCamLight.mjCAMLIGHT_FIXED))


def _mesh(model: mujoco.MjModel, geom: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places and normals float[V, 3], and triangles int[T, 3], of a geom's mesh: a vertex for each pair of place and normal.

    As MuJoCo's renderer does (`mjr_uploadMesh`), a corner whose normal is far from its face's takes the face's.
    """
    mesh = model.mesh(model.geom_dataid[geom])
    faces = slice(mesh.faceadr[0], mesh.faceadr[0] + mesh.facenum[0])
    places = model.mesh_vert[mesh.vertadr[0] + model.mesh_face[faces]]
    normals = model.mesh_normal[model.mesh_normaladr[mesh.id] + model.mesh_facenormal[faces]]
    flat = np.cross(places[:, 1] - places[:, 0], places[:, 2] - places[:, 0])
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    flat = np.broadcast_to(flat[:, None], normals.shape)
    normals = np.where(np.sum(normals * flat, axis=-1, keepdims=True) < 0.8, flat, normals)
    vertices, corners = np.unique(np.concatenate([places, normals], axis=-1).reshape(-1, 6), axis=0, return_inverse=True)
    return vertices[:, :3], vertices[:, 3:], corners.reshape(-1, 3)


def _box(size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of a box with those half edges: four vertices for each face."""
    places: list[np.ndarray] = []
    normals: list[np.ndarray] = []
    corners: list[list[int]] = []
    for axis in range(3):
        for side in (-1, 1):
            normal = side * np.eye(3)[axis]
            right, up = np.eye(3)[(axis + 1) % 3], side * np.eye(3)[(axis + 2) % 3]  # right x up = normal
            corners += [[len(places) + i for i in triangle] for triangle in ((0, 1, 2), (0, 2, 3))]
            places += [(normal + x * right + y * up) * size for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            normals += [normal] * 4
    return np.array(places), np.array(normals), np.array(corners)


def _corners(model: mujoco.MjModel, data: mujoco.MjData, geom: int) -> np.ndarray:
    """float[8, 3]: corners of a geom's bounding box in the world."""
    middle, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
    corners = middle + half * np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
    return corners @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]


def _projection(view: mujoco.MjvGLCamera) -> np.ndarray:
    """The matrix of glFrustum, upside down: OpenGL's first row is the lowest, a picture's is the highest."""
    near, far = view.frustum_near, view.frustum_far
    width, height = view.frustum_width, (view.frustum_top - view.frustum_bottom) / 2
    center = (view.frustum_top + view.frustum_bottom) / 2
    return np.array(
        [
            [near / width, 0, view.frustum_center / width, 0],
            [0, -near / height, -center / height, 0],
            [0, 0, -(far + near) / (far - near), -2 * far * near / (far - near)],
            [0, 0, -1, 0],
        ]
    )


def _shadow_box(direction: np.ndarray, axes: np.ndarray, eye: np.ndarray, view: mujoco.MjvGLCamera, depth: float) -> np.ndarray:
    """From the world to the box, in the light's direction, about what the camera sees at `depth` and above (`SHADOWS_UP_TO`).

    What stands between the light and there has the same first two coordinates, whether the camera sees it or not.
    """
    backward = -direction.astype(float)
    right = axes[0] - (axes[0] @ backward) * backward
    right /= np.linalg.norm(right)
    turned = np.stack([right, np.cross(backward, right), -backward])
    seen = []
    for share in (1.0, 1.0 - SHADOWS_UP_TO):
        for x in (-1, 1):
            for y in (view.frustum_bottom, view.frustum_top):
                ray = np.array([view.frustum_center + x * view.frustum_width, y, -view.frustum_near]) / view.frustum_near
                seen.append(turned @ (eye + share * depth * ray @ axes))
    low, high = np.min(seen, axis=0), np.max(seen, axis=0)
    low[2] -= depth  # what casts a shadow into it
    box = np.eye(4)
    box[:3, :3] = turned * (2 / (high - low))[:, None]
    box[:3, 3] = -(low + high) / (high - low)
    return box
