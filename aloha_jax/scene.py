"""gym_aloha's own MJCF, edited with `MjSpec` into the models that physics uses; those of renderers are in `visual.py`.

No asset is copied: the XML and meshes are read from the installed `gym_aloha` package. Every edit is listed in `load_spec`
(things that change nothing physical: sensors, sites, a fixed camera), `fast_physics`, `reduced_physics` and in `visual.py`.
"""

import dataclasses
import functools
import pathlib

import gym_aloha
import mujoco
import numpy as np

ASSETS = pathlib.Path(gym_aloha.__file__).parent / "assets"

ARMS = ("left", "right")
FINGERS = ("left", "right")
ARM_QPOS = {"left": slice(0, 6), "right": slice(8, 14)}  # six arm joints
FINGER_QPOS = {"left": 6, "right": 14}  # the finger that gym_aloha reads as "the gripper"
PEG_QPOS = slice(16, 23)  # position, quaternion (w, x, y, z)
SOCKET_QPOS = slice(23, 30)
PEG_QVEL = slice(16, 22)
SOCKET_QVEL = slice(22, 28)

# Sizes of the objects, metres: half of either's length, and per arm (left: socket, right: peg) half of its width, which is how
# high its centre lies, too.
HALF_LENGTH = 0.06
HALF_WIDTH = (0.022, 0.010)

OBJECTS = ("peg", "socket")  # their bodies
CAMERA = "top"
FRAME_SHAPE = (480, 640)  # height, width of gym_aloha's camera frames
WHOLE_FRAME = (0, 0, *FRAME_SHAPE)
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
    _fix_camera(spec, CAMERA)
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


def scale_dynamics(model: mujoco.MjModel, friction: float, mass: float) -> None:
    """Multiply, in place, all friction coefficients by one factor, mass and inertia of peg and socket by another."""
    model.geom_friction[:] *= friction
    for name in OBJECTS:
        body = model.body(name)
        body.mass[:] *= mass
        body.inertia[:] *= mass
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what the compiler derives from masses


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
