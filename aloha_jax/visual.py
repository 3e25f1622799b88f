"""The scene as renderers see it: gym_aloha's camera, cropped, at the picture's size, and no more triangles than it can show."""

import dataclasses

import mujoco
import numpy as np

from aloha_jax.decimation import cluster_vertices
from aloha_jax.scene import CAMERA, FRAME_SHAPE, WHOLE_FRAME, load_spec

Crop = tuple[int, int, int, int]  # top, left, height, width; pixels of gym_aloha's frame


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a picture costs.

    Attributes:
        shadow_map: texels along an edge of the shadow map; 0 draws no shadows.
        samples: samples per pixel (MSAA); 0 draws more pixels instead (`supersampling`).
        coarse: whether meshes have fewer triangles than gym_aloha's (`mesh_cells`).
        rays: rays per pixel, 0 for as many as it needs (`rays_per_pixel`); ray tracing ignores `samples` and `coarse`.
    """

    shadow_map: int
    samples: int
    coarse: bool
    rays: int


# SSIM against gym_aloha's own frame and frames per second: docs/benchmarks.md, Renderer.
QUALITIES = {
    "exact": Quality(shadow_map=4096, samples=4, coarse=False, rays=16),  # gym_aloha's frame to the bit
    "shadows": Quality(shadow_map=128, samples=0, coarse=True, rays=4),
    "fast": Quality(shadow_map=0, samples=0, coarse=True, rays=0),
}

HANDS = ("gripper_bar", "gripper_finger")  # in the names of their meshes

# Of a matte table that looks like OpenGL's 0.2 with highlights at its corners: at its far edge and at its near one.
TABLE_GREYS = (0.204, 0.248)
TABLE_STRIPS = 16  # steps of less than one of 256 levels


def make_visual_model(
    task: str = "insertion",
    quality: str = "fast",
    height: int = FRAME_SHAPE[0],
    width: int = FRAME_SHAPE[1],
    crop: Crop | None = None,
    ray_traced: bool = False,
) -> mujoco.MjModel:
    """The scene of a task for renderers: its camera and offscreen buffer make pictures of exactly `height` x `width`.

    Args:
        task: a key of `TASK_SCENES`.
        quality: a key of `QUALITIES`.
        height: of the picture, pixels.
        width: of the picture, pixels.
        crop: (top, left, height, width) of the part of gym_aloha's 480x640 frame to look at; by default all of it.
        ray_traced: for a ray tracer instead of OpenGL.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality is one of {', '.join(QUALITIES)}, not {quality!r}")
    level = QUALITIES[quality]
    spec = load_spec(task)
    if ray_traced:
        _flatten_table(spec)
    elif level.coarse:
        _decimate_meshes(spec, *mesh_cells(height, width, crop))
    _look_at_crop(spec.camera(CAMERA), crop or WHOLE_FRAME, (height, width))
    spec.visual.quality.shadowsize = level.shadow_map
    spec.visual.quality.offsamples = level.samples
    spec.visual.global_.offheight = height
    spec.visual.global_.offwidth = width
    return spec.compile()


def supersampling(quality: str, height: int, width: int, crop: Crop | None = None) -> int:
    """Pixels that OpenGL draws along either axis of each pixel of the picture, which is their mean; arguments as above.

    About one for every two of gym_aloha's frame. Mesa's software MSAA costs by the triangle, however small the picture: with this
    there are 1.4 to 1.9 times as many pictures, and coarse ones are more like its own (docs/benchmarks.md).
    """
    if QUALITIES[quality].samples:
        return 1
    return _every_second(height, width, crop)


def rays_per_pixel(quality: str, height: int, width: int, crop: Crop | None = None) -> int:
    """Rays that a ray tracer sends through each pixel of the picture, which is their mean; arguments as above.

    `fast` needs two to four: about one for every two of gym_aloha's frame along an axis.
    """
    return QUALITIES[quality].rays or _every_second(height, width, crop)


def places_in_pixel(count: int) -> np.ndarray:
    """float[count, 2]: where rays go through a pixel, x and y in 0..1; each has a column and a row to itself.

    Chiu, Shirley and Wang, "Multi-jittered sampling" (Graphics Gems IV, 1994), without the jitter; four are the rotated grid of
    MSAA. A grid has a row for every two of four rays, and a nearly horizontal edge crosses it in two steps instead of four.
    """
    rows = next(n for n in range(int(np.sqrt(count)), 0, -1) if count % n == 0)
    columns = count // rows
    i, j = np.divmod(np.arange(count), rows)  # of the coarse grid's cells: column, row
    return np.stack([(i + (j + 0.5) / rows) / columns, (j + (columns - i - 0.5) / columns) / rows], axis=1)


def mesh_cells(height: int, width: int, crop: Crop | None = None) -> tuple[float, float]:
    """Metres; mesh vertices in a grid cell of this size are merged: in the hands' meshes, and in all others. Arguments as above.

    Software renderers pay for a triangle however small. Hands are what a crop of the table shows; where a pixel of the picture is
    more than four of gym_aloha's frame wide, 11 mm of the table, they need no more than the rest (docs/benchmarks.md, Renderer).
    """
    return (0.015 if _covered(height, width, crop) > 4 else 0.007), 0.015


def _covered(height: int, width: int, crop: Crop | None) -> float:
    """Pixels of gym_aloha's frame that a pixel of the picture covers along an axis, the mean of both."""
    _, _, crop_height, crop_width = crop or WHOLE_FRAME
    return float(np.sqrt(crop_height / height * crop_width / width))


def _every_second(height: int, width: int, crop: Crop | None) -> int:
    """One for every two pixels of gym_aloha's frame that a pixel of the picture covers along an axis, 2..4."""
    return int(np.clip(round(_covered(height, width, crop) / 2), 2, 4))


def _look_at_crop(camera: mujoco.MjsCamera, crop: Crop, picture: tuple[int, int]) -> None:
    """Gives the camera an off-axis frustum that sees only the crop, so that no pixel is drawn in vain.

    In units of the picture's pixels, along each axis its own: ray tracers take those of the sensor to be square.
    """
    top, left, height, width = crop
    frame_height, frame_width = FRAME_SHAPE
    if not (0 <= top < top + height <= frame_height and 0 <= left < left + width <= frame_width):
        raise ValueError(f"crop (top, left, height, width) = {crop} is not inside the {frame_height}x{frame_width} frame")
    picture_height, picture_width = picture
    across, down = picture_width / width, picture_height / height  # pixels of the picture per pixel of the frame
    focal = frame_height / 2 / np.tan(np.deg2rad(camera.fovy) / 2)  # pixels of the frame
    camera.resolution = (picture_width, picture_height)
    camera.sensor_size = (picture_width, picture_height)
    camera.focal_pixel = (focal * across, focal * down)
    # From the middle of the frame to the middle of the crop, x to the right and y down.
    camera.principal_pixel = ((left + width / 2 - frame_width / 2) * across, (top + height / 2 - frame_height / 2) * down)


def _flatten_table(spec: mujoco.MjSpec) -> None:
    """Makes the table, for a ray tracer, of the greys that OpenGL gives it.

    Its mesh has eight vertices. OpenGL lights those and interpolates colours, which grow evenly lighter toward the camera's lower
    edge; a ray tracer interpolates their normals and finds a bump with a highlight in the middle. Matte boxes side by side, as
    large as the table together, are flat, and each has OpenGL's grey of its middle.
    """
    model = spec.compile()
    vertices = model.mesh_vert[: model.mesh("tabletop").vertnum[0]]
    rotation = np.empty(9)
    source = model.geom("table")
    mujoco.mju_quat2Mat(rotation, source.quat)
    corners = vertices @ rotation.reshape(3, 3).T + source.pos
    low, high = corners.min(axis=0), corners.max(axis=0)
    middle, half = (low + high) / 2, (high - low) / 2
    table = spec.geom("table")
    spec.add_material(name="matte", specular=0.0, shininess=0.0)
    depth = half[1] / TABLE_STRIPS  # half of a strip's
    for i, share in enumerate((np.arange(TABLE_STRIPS) + 0.5) / TABLE_STRIPS):
        strip = table if i == 0 else table.parent.add_geom(contype=0, conaffinity=0)
        strip.type, strip.meshname, strip.material = mujoco.mjtGeom.mjGEOM_BOX, "", "matte"
        strip.pos = (middle[0], high[1] - (2 * i + 1) * depth, middle[2])
        strip.size, strip.quat = (half[0], depth, half[2]), (1.0, 0.0, 0.0, 0.0)
        far, near = TABLE_GREYS
        strip.rgba = (*3 * (far + share * (near - far),), 1.0)


def _decimate_meshes(spec: mujoco.MjSpec, hand_cell: float, cell: float) -> None:
    """Replaces every mesh by a coarser one in the same frame; collisions of the result mean nothing."""
    model = spec.compile()
    for mesh in list(spec.meshes):
        source = model.mesh(mesh.name)
        first_vertex, first_face = source.vertadr[0], source.faceadr[0]
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, model.mesh_quat[source.id])
        # The compiler moves a mesh to its inertial frame, geoms in the spec refer to the frame of the file.
        vertices = model.mesh_vert[first_vertex : first_vertex + source.vertnum[0]] @ rotation.reshape(3, 3).T
        vertices = vertices + model.mesh_pos[source.id]
        faces = model.mesh_face[first_face : first_face + source.facenum[0]]
        is_hand = any(part in mesh.name for part in HANDS)
        vertices, faces = cluster_vertices(vertices, faces, hand_cell if is_hand else cell)
        # Clustered meshes need not be watertight: only the inertia of a shell is always defined.
        shell = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
        coarse = f"{mesh.name}/coarse"
        spec.add_mesh(name=coarse, uservert=vertices.ravel(), userface=faces.ravel(), inertia=shell)
        for geom in spec.geoms:
            if geom.meshname == mesh.name:
                geom.meshname = coarse
        spec.delete(mesh)
