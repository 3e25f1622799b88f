"""gym_aloha's own MJCF, edited with `MjSpec` into the models that physics and rendering use.

No asset is copied: the XML and meshes are read from the installed `gym_aloha` package. Every edit is listed in `load_spec`
(things that change nothing physical: sensors, sites, a fixed camera), `fast_physics`, `reduced_physics` and `make_visual_model`.
"""

import dataclasses
import functools
import pathlib

import gym_aloha
import mujoco
import numpy as np

from aloha_jax.decimation import cluster_vertices

ASSETS = pathlib.Path(gym_aloha.__file__).parent / "assets"

ARMS = ("left", "right")
FINGERS = ("left", "right")
ARM_QPOS = {"left": slice(0, 6), "right": slice(8, 14)}  # six arm joints
FINGER_QPOS = {"left": 6, "right": 14}  # the finger that gym_aloha reads as "the gripper"
PEG_QPOS = slice(16, 23)  # position, quaternion (w, x, y, z)
SOCKET_QPOS = slice(23, 30)
PEG_QVEL = slice(16, 22)
SOCKET_QVEL = slice(22, 28)

FRAME_SHAPE = (480, 640)  # height, width of gym_aloha's camera frames
CONTROL_TIMESTEP = 0.02  # seconds; 50 Hz

# Inner side of a fingertip in its finger's frame, metres (read off the convex hull of the finger mesh); y for the left finger.
FINGERTIP = (0.075, -0.0224, 0.0)

# A finger's pad in `reduced_physics`, in its link's frame, metres: along the finger, across it, and outward from its inner side.
PAD_RANGE, PAD_HALF_WIDTH, PAD_THICKNESS = (0.03, 0.085), 0.006, 0.008

# Contacts that MJX's `jax` implementation solves for; the pairs could make 96, an expert's episode makes at most 24 at once.
MAX_REDUCED_CONTACTS = 32

SOCKET_WALLS = ("socket-1", "socket-2", "socket-3", "socket-4")


def finger_geom(arm: str, finger: str) -> str:
    return f"vx300s_{arm}/10_{finger}_gripper_finger"


# Touch predicate -> (geoms of the one side, geoms of the other). One contact sensor per pair; a predicate is true if any fires.
# Names follow the arm that owns the finger: the right arm handles the peg, the left arm the socket.
INSERTION_TOUCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "peg_finger_left": (("red_peg",), (finger_geom("right", "left"),)),
    "peg_finger_right": (("red_peg",), (finger_geom("right", "right"),)),
    "socket_finger_left": (SOCKET_WALLS, (finger_geom("left", "left"),)),
    "socket_finger_right": (SOCKET_WALLS, (finger_geom("left", "right"),)),
    "peg_table": (("red_peg",), ("table",)),
    "socket_table": (SOCKET_WALLS, ("table",)),
    "peg_socket": (("red_peg",), SOCKET_WALLS),
    "peg_pin": (("red_peg",), ("pin",)),
}


@dataclasses.dataclass(frozen=True)
class TaskScene:
    """What a task needs from the scene: its MJCF file and the touches its reward reads."""

    xml: str
    touches: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


TASK_SCENES = {"insertion": TaskScene("bimanual_viperx_insertion.xml", INSERTION_TOUCHES)}


@dataclasses.dataclass(frozen=True)
class Scene:
    """A compiled model and the addresses the rest of the program reads.

    Attributes:
        model: the compiled `MjModel`.
        substeps: physics steps per control step, so that `substeps * timestep` is 0.02 s.
        sensors: sensor name -> slice of `sensordata`.
        touches: touch predicate -> indices into `sensordata`; the predicate holds if any of them is positive.
        fresh_sensors: whether `sensordata` of a step belongs to the new positions, as in dm_control. `mj_step` evaluates sensors
            before it integrates, so this costs one more substep per control step; otherwise they lag by one substep.
    """

    model: mujoco.MjModel
    substeps: int
    sensors: dict[str, slice]
    touches: dict[str, np.ndarray]
    fresh_sensors: bool


def load_spec(task: str = "insertion") -> mujoco.MjSpec:
    """gym_aloha's MJCF plus what observes it: touch and frame sensors, fingertip sites, a `top` camera with a fixed frame."""
    touches = TASK_SCENES[task].touches
    spec = mujoco.MjSpec.from_file(str(ASSETS / TASK_SCENES[task].xml))
    _fix_camera(spec, "top")
    for arm in ARMS:
        for finger in FINGERS:
            x, y, z = FINGERTIP
            site = f"{arm}/{finger}_fingertip"
            body = spec.body(f"vx300s_{arm}/{finger}_finger_link")
            body.add_site(name=site, pos=(x, y if finger == "left" else -y, z), size=(0.003,) * 3, group=4)
            _add_frame_sensor(spec, f"{site}/pos", mujoco.mjtSensor.mjSENS_FRAMEPOS, mujoco.mjtObj.mjOBJ_SITE, site)
        link = f"vx300s_{arm}/gripper_link"
        _add_frame_sensor(spec, f"{arm}/gripper/quat", mujoco.mjtSensor.mjSENS_FRAMEQUAT, mujoco.mjtObj.mjOBJ_XBODY, link)
    for name, (side_a, side_b) in touches.items():
        for i, (geom_a, geom_b) in enumerate((a, b) for a in side_a for b in side_b):
            _add_touch_sensor(spec, f"touch/{name}/{i}", geom_a, geom_b)
    return spec


def _fix_camera(spec: mujoco.MjSpec, name: str) -> None:
    """Replace a `targetbody` camera by a fixed one with the frame that C MuJoCo computes.

    The `top` camera stands exactly above its target, where MJX and Warp compute a degenerate frame (a constant grey picture).
    """
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    rotation = data.camera(name).xmat
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, rotation)
    camera = spec.camera(name)
    camera.mode = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    camera.targetbody = ""
    camera.quat = quat


def _add_frame_sensor(spec: mujoco.MjSpec, name: str, kind: mujoco.mjtSensor, objtype: mujoco.mjtObj, objname: str) -> None:
    spec.add_sensor(name=name, type=kind, objtype=objtype, objname=objname)


def _add_touch_sensor(spec: mujoco.MjSpec, name: str, geom_a: str, geom_b: str) -> None:
    """A contact sensor that counts the contacts between two geoms, in whichever order the collision pair is stored."""
    found_only = 1 << mujoco.mjtConDataField.mjCONDATA_FOUND.value
    no_reduction, one_slot = 0, 1
    spec.add_sensor(
        name=name,
        type=mujoco.mjtSensor.mjSENS_CONTACT,
        objtype=mujoco.mjtObj.mjOBJ_GEOM,
        objname=geom_a,
        reftype=mujoco.mjtObj.mjOBJ_GEOM,
        refname=geom_b,
        intprm=(found_only, no_reduction, one_slot),
    )


def fast_physics(spec: mujoco.MjSpec) -> None:
    """0.005 s steps and a capped solver: fewer, cheaper steps at the same expert success (tests/test_parity.py)."""
    spec.option.timestep = 0.005
    spec.option.iterations = 4
    spec.option.ls_iterations = 8


def reduced_physics(spec: mujoco.MjSpec, task: str = "insertion") -> None:
    """What MJX's `jax` implementation can compile and keep stable in float32: few convex pairs, all of them primitive.

    Only what the reward reads may touch (`TaskScene.touches`), and the fingers the table. Fingers become boxes, the table a
    plane without an edge; arms pass through each other and through everything else. Names stay, so sensors stay.
    """
    touches = TASK_SCENES[task].touches.values()
    pairs = [(a, b) for side_a, side_b in touches for a in side_a for b in side_b]
    fingers = [finger_geom(arm, finger) for arm in ARMS for finger in FINGERS]
    pairs += [(finger, "table") for finger in fingers]
    kept = {name for pair in pairs for name in pair}
    for geom in list(spec.geoms):
        if geom.name not in kept:
            spec.delete(geom)
            continue
        geom.contype = geom.conaffinity = 0
        # MJX computes in float32, where 0.9999 (what C MuJoCo makes of the XML's 2) leaves nothing of a contact's softness.
        geom.solimp = (0.9, 0.95, 0.001, 0.5, 2.0)
    for name in fingers:
        _make_pad(spec.geom(name), outward=1 if "left_gripper_finger" in name else -1)
    table = spec.geom("table")
    table.type, table.meshname, table.size = mujoco.mjtGeom.mjGEOM_PLANE, "", (1.0, 1.0, 0.1)
    for geom_a, geom_b in pairs:
        undefined = np.nan  # to the compiler: take it from the geoms
        spec.add_pair(
            geomname1=geom_a, geomname2=geom_b, condim=4, friction=[undefined] * 5, solref=[undefined] * 2, solimp=[undefined] * 5
        )
    spec.add_numeric(name="max_contact_points", data=[MAX_REDUCED_CONTACTS], size=1)
    option = spec.option
    option.cone, option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10.0
    option.iterations, option.ls_iterations = 10, 20


def _make_pad(geom: mujoco.MjsGeom, outward: int) -> None:
    """Turns a finger's hull into a box with the same inner face; `outward` is the sign of its outer side's y."""
    inner = abs(FINGERTIP[1])
    low, high = PAD_RANGE
    geom.type, geom.meshname = mujoco.mjtGeom.mjGEOM_BOX, ""
    geom.size = ((high - low) / 2, PAD_THICKNESS / 2, PAD_HALF_WIDTH)
    geom.pos = ((high + low) / 2, outward * (PAD_THICKNESS / 2 - inner), 0.0)
    geom.quat, geom.alt.type = (1.0, 0.0, 0.0, 0.0), mujoco.mjtOrientation.mjORIENTATION_QUAT


PHYSICS = ("exact", "fast", "reduced")


@functools.cache
def make_scene(task: str = "insertion", physics: str = "fast") -> Scene:
    """The scene of a task for the physics engines.

    Args:
        task: a key of `TASK_SCENES`.
        physics: `exact` (gym_aloha's own 10 x 0.002 s, sensors at the new positions), `fast` (4 x 0.005 s) or `reduced`
            (10 x 0.002 s, few and simple collisions).
    """
    if physics not in PHYSICS:
        raise ValueError(f"physics is one of {', '.join(PHYSICS)}, not {physics!r}")
    spec = load_spec(task)
    if physics == "fast":
        fast_physics(spec)
    elif physics == "reduced":
        reduced_physics(spec, task)
    model = spec.compile()
    sensors = {
        model.sensor(i).name: slice(model.sensor_adr[i], model.sensor_adr[i] + model.sensor_dim[i]) for i in range(model.nsensor)
    }
    touches = {
        name: np.array([sensors[key].start for key in sensors if key.startswith(f"touch/{name}/")])
        for name in TASK_SCENES[task].touches
    }
    substeps = round(CONTROL_TIMESTEP / model.opt.timestep)
    return Scene(model, substeps, sensors, touches, fresh_sensors=physics == "exact")


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a picture costs.

    Attributes:
        shadow_map: texels along an edge of the shadow map; 0 draws no shadows.
        samples: samples per pixel (MSAA); 0 draws more pixels instead (`supersampling`).
        rays: rays per pixel along either axis, for ray tracing, which ignores `samples` and `mesh_cell`.
        mesh_cell: metres; mesh vertices in one grid cell of this size are merged. 0 keeps gym_aloha's meshes.
    """

    shadow_map: int
    samples: int
    mesh_cell: float
    rays: int


# SSIM against gym_aloha's own frame and frames per second: docs/benchmarks.md, Renderer.
QUALITIES = {
    "exact": Quality(shadow_map=4096, samples=4, mesh_cell=0.0, rays=4),  # gym_aloha's frame to the bit
    "shadows": Quality(shadow_map=256, samples=0, mesh_cell=0.01, rays=2),
    "fast": Quality(shadow_map=0, samples=0, mesh_cell=0.01, rays=2),
}

CAMERA = "top"
TABLE_GREY = (0.224, 0.224, 0.224)  # of a matte table that looks like OpenGL's 0.2 with highlights at its corners
WHOLE_FRAME = (0, 0, *FRAME_SHAPE)


def make_visual_model(
    task: str = "insertion",
    quality: str = "fast",
    height: int = FRAME_SHAPE[0],
    width: int = FRAME_SHAPE[1],
    crop: tuple[int, int, int, int] | None = None,
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
    elif level.mesh_cell:
        _decimate_meshes(spec, level.mesh_cell)
    _look_at_crop(spec.camera(CAMERA), crop or WHOLE_FRAME, (height, width))
    spec.visual.quality.shadowsize = level.shadow_map
    spec.visual.quality.offsamples = level.samples
    spec.visual.global_.offheight = height
    spec.visual.global_.offwidth = width
    return spec.compile()


def supersampling(quality: str, height: int, width: int, crop: tuple[int, int, int, int] | None = None) -> int:
    """Pixels that OpenGL draws along either axis of each pixel of the picture, which is their mean; arguments as above.

    About one for every two of gym_aloha's frame. Mesa's software MSAA costs by the triangle, however small the picture: with this
    there are 1.4 to 1.9 times as many pictures, and coarse ones are more like its own (docs/benchmarks.md).
    """
    if QUALITIES[quality].samples:
        return 1
    _, _, crop_height, crop_width = crop or WHOLE_FRAME
    covered = np.sqrt(crop_height / height * crop_width / width)  # of the frame's pixels, along an axis
    return int(np.clip(round(covered / 2), 2, 4))


def _look_at_crop(camera: mujoco.MjsCamera, crop: tuple[int, int, int, int], picture: tuple[int, int]) -> None:
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
    """Makes the table, for a ray tracer, the even grey that OpenGL gives it.

    Its mesh has eight vertices. OpenGL lights those and interpolates colours; a ray tracer interpolates their normals and finds a
    bump with a highlight in the middle. A matte box of the same size is flat, and its grey is the mean of OpenGL's.
    """
    model = spec.compile()
    vertices = model.mesh_vert[: model.mesh("tabletop").vertnum[0]]
    rotation = np.empty(9)
    source = model.geom("table")
    mujoco.mju_quat2Mat(rotation, source.quat)
    corners = vertices @ rotation.reshape(3, 3).T + source.pos
    low, high = corners.min(axis=0), corners.max(axis=0)
    table = spec.geom("table")
    spec.add_material(name="matte", specular=0.0, shininess=0.0)
    table.type, table.meshname, table.material = mujoco.mjtGeom.mjGEOM_BOX, "", "matte"
    table.pos, table.size, table.quat = (low + high) / 2, (high - low) / 2, (1.0, 0.0, 0.0, 0.0)
    table.rgba = (*TABLE_GREY, 1.0)


def _decimate_meshes(spec: mujoco.MjSpec, cell: float) -> None:
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
        vertices, faces = cluster_vertices(vertices, faces, cell)
        # Clustered meshes need not be watertight: only the inertia of a shell is always defined.
        shell = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
        coarse = f"{mesh.name}/coarse"
        spec.add_mesh(name=coarse, uservert=vertices.ravel(), userface=faces.ravel(), inertia=shell)
        for geom in spec.geoms:
            if geom.meshname == mesh.name:
                geom.meshname = coarse
        spec.delete(mesh)
