"""A scripted, open-loop expert for gym_aloha's insertion task: a demonstrator, and an instrument to compare physics engines.

The left arm picks up the socket and the right arm the peg; both carry their object to a meeting point, where peg and socket are
pushed together until the peg touches the pin. `plan` sees the start pose once and returns the joint targets of a whole episode.

Each arm passes through one waypoint per stage: the position of its fingertips' midpoint and the yaw of its gripper, which keeps
a constant pitch. It moves to the first waypoint in joint space and in straight Cartesian lines from there on.

Units are metres, radians and control steps (0.02 s). A pose is a position and a quaternion (w, x, y, z) in the world's frame,
whose x axis points from the left arm's base to the right arm's and whose z axis points up, with the table's top at 0.
"""

import dataclasses
import itertools

import mujoco
import numpy as np
from gym_aloha.constants import START_ARM_POSE

from aloha_jax import scene

EPISODE_STEPS = 300
STAGES = {"approach": 60, "descend": 30, "close": 25, "lift": 30, "carry": 50, "insert": 45}  # name -> control steps
SPEEDS = (0.8, 2.0)  # slower does not fit an episode; faster has not been tried

HOVER = 0.08  # height over the grip at which the approach ends
GAP = 0.04  # between the peg's tip and the socket's mouth before the insertion
OVERTRAVEL = 0.006  # commanded beyond contact, to make up for the grip's slip

# gym_aloha's normalised 0 and 1 lie outside the fingers' control range, which is 0.065 to 0.975.
GRIPPER_OPEN = 0.97
GRIPPER_CLOSED = 0.07

CONTACT_DISTANCE = 0.1  # between the centres of socket and peg when the peg touches the pin

BASE_YAW = {"left": 0.0, "right": np.pi}  # direction in which an arm reaches over the table


@dataclasses.dataclass(frozen=True)
class Variation:
    """One way to do the task, to make demonstrations differ.

    The defaults succeeded from every start pose tried: gym_aloha's seeds 0 to 99 and the 16 corners of its range.

    Attributes:
        pitch: angle of the grippers below the horizontal.
        grip_offset: distance of the grip from the object's centre, along the object's axis and towards the arm.
        grip_height: height of the fingertips' midpoint over the object's centre; below 0 the fingers scrape the table.
        meeting: x, y, z of the point midway between the centres of socket and peg when they are joined.
        miss: y and z by which the right arm misses the meeting point; beyond some 8 mm the peg ends beside the socket's mouth.
        speed: factor on the speed of all stages, within `SPEEDS`; at 1 the insertion ends after 240 steps.
    """

    pitch: float = np.pi / 3
    grip_offset: float = 0.03
    grip_height: float = 0.004
    meeting: tuple[float, float, float] = (0.0, 0.5, 0.15)
    miss: tuple[float, float] = (0.0, 0.0)
    speed: float = 1.0

    def __post_init__(self) -> None:
        slowest, fastest = SPEEDS
        if not slowest <= self.speed <= fastest:
            raise ValueError(f"speed is within {slowest} and {fastest}, not {self.speed}")


DEFAULT = Variation()


def plan(peg_pose: np.ndarray, socket_pose: np.ndarray, *, variation: Variation = DEFAULT) -> np.ndarray:
    """Plans an episode that starts with the arms in gym_aloha's start pose.

    Args:
        peg_pose: [7] pose of the peg, which lies flat or is about to drop flat: only x, y and yaw are read.
        socket_pose: [7] pose of the socket, likewise.
        variation: how to do it.

    Returns:
        float32 [300, 14] actions as gym_aloha takes them: six joint targets and the normalised gripper of the left arm, then of
        the right. The last action is held once the insertion is done.

    Raises:
        ValueError: an arm cannot reach where the poses or the variation send it.
    """
    return _plan(np.array(START_ARM_POSE), peg_pose, socket_pose, variation)


def plan_from_qpos(qpos: np.ndarray, *, variation: Variation = DEFAULT) -> np.ndarray:
    """Like `plan`, from joint positions [30] in the scene's order; the arms may start from other joints than gym_aloha's."""
    qpos = np.asarray(qpos, np.float64)
    return _plan(qpos, qpos[scene.PEG_QPOS], qpos[scene.SOCKET_QPOS], variation)


def _plan(qpos: np.ndarray, peg_pose: np.ndarray, socket_pose: np.ndarray, variation: Variation) -> np.ndarray:
    """[300, 14] actions for arm joints `qpos[:16]`."""
    steps = {stage: int(duration / variation.speed) for stage, duration in STAGES.items()}
    columns = []
    for arm, object_pose in (("left", socket_pose), ("right", peg_pose)):
        waypoints = _waypoints(arm, np.asarray(object_pose, np.float64), variation)
        targets = _joint_path(arm, qpos[scene.ARM_QPOS[arm]], waypoints, steps, variation.pitch)
        padding = ((0, EPISODE_STEPS - len(targets)), (0, 0))
        columns += [np.pad(targets, padding, mode="edge"), _gripper_path(steps)]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _waypoints(arm: str, object_pose: np.ndarray, variation: Variation) -> dict[str, np.ndarray]:
    """Stage -> [4] position of the fingertips' midpoint and yaw of the object at the stage's end."""
    toward_arm = -np.cos(BASE_YAW[arm])

    def grip(x: float, y: float, z: float, yaw: float) -> np.ndarray:
        """Where to hold an object whose centre is at x, y, z and whose x axis points to `yaw`."""
        along = toward_arm * variation.grip_offset
        return np.array([x + along * np.cos(yaw), y + along * np.sin(yaw), z + variation.grip_height, yaw])

    def apart(distance: float) -> np.ndarray:
        """The grip when the objects' centres are at a distance from each other, around the meeting point."""
        x, y, z = variation.meeting
        if arm == "right":
            y, z = y + variation.miss[0], z + variation.miss[1]
        return grip(x + toward_arm * distance / 2, y, z, yaw=0.0)

    x, y = object_pose[:2]
    on_table = grip(x, y, scene.HALF_WIDTH[scene.ARMS.index(arm)], _yaw(object_pose[3:]))
    above = on_table + np.array([0, 0, HOVER, 0])
    return {
        "approach": above,
        "descend": on_table,
        "close": on_table,
        "lift": above,
        "carry": apart(2 * scene.HALF_LENGTH + GAP),
        "insert": apart(CONTACT_DISTANCE - OVERTRAVEL),
    }


def _joint_path(arm: str, start: np.ndarray, waypoints: dict[str, np.ndarray], steps: dict[str, int], pitch: float) -> np.ndarray:
    """[sum of steps, 6] joint targets from `start` [6] through the waypoints, at rest in each."""
    kinematics = ArmKinematics(arm)

    def joints_at(waypoint: np.ndarray, guess: np.ndarray) -> np.ndarray:
        return kinematics.inverse(waypoint[:3], _gripper_rotation(BASE_YAW[arm] + waypoint[3], pitch), guess)

    # Solving from the same home whatever the start keeps every plan on one branch of the inverse kinematics: elbow up.
    home = np.array(START_ARM_POSE)[scene.ARM_QPOS[arm]]
    joints = joints_at(waypoints["approach"], home)
    path = list(start + _ease(steps["approach"])[:, None] * (joints - start))
    for before, stage in itertools.pairwise(STAGES):
        for fraction in _ease(steps[stage]):
            joints = joints_at((1 - fraction) * waypoints[before] + fraction * waypoints[stage], joints)
            path.append(joints)
    return np.stack(path)


def _gripper_path(steps: dict[str, int]) -> np.ndarray:
    """[300, 1] normalised gripper commands: open until the stage that closes it."""
    closing = steps["approach"] + steps["descend"]
    return np.where(np.arange(EPISODE_STEPS) < closing, GRIPPER_OPEN, GRIPPER_CLOSED)[:, None]


def _ease(steps: int) -> np.ndarray:
    """[steps] fractions of a motion, the last of them 1, which starts and ends at rest (cubic smoothstep)."""
    u = np.arange(1, steps + 1) / steps
    return u * u * (3 - 2 * u)


def _yaw(quat: np.ndarray) -> float:
    """Direction of a frame's x axis in the horizontal plane."""
    w, x, y, z = quat
    return float(np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)))


def _gripper_rotation(yaw: float, pitch: float) -> np.ndarray:
    """[3, 3] frame of a gripper: x along the fingers, `pitch` below the horizontal; y, along which they close, horizontal."""
    forward = [np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), -np.sin(pitch)]
    sideways = [-np.sin(yaw), np.cos(yaw), 0.0]
    upward = [np.cos(yaw) * np.sin(pitch), np.sin(yaw) * np.sin(pitch), np.cos(pitch)]
    return np.array([forward, sideways, upward]).T


class ArmKinematics:
    """Kinematics of one arm's six joints: where they hold the fingertips' midpoint, and which joints hold it there."""

    TOLERANCE = 5e-5  # metres and radians, on each of the six components of the error
    MAX_ITERATIONS = 100
    DAMPING = 1e-7  # floor of the damping; keeps the step bounded in a singularity

    def __init__(self, arm: str) -> None:
        self._arm = arm
        self._model = scene.make_scene(physics="exact").model
        self._data = mujoco.MjData(self._model)  # both fingers at 0, so that their tips' midpoint is on the gripper's axis
        self._gripper = self._model.body(f"vx300s_{arm}/gripper_link").id
        self._fingertips = [self._model.site(f"{arm}/{finger}_fingertip").id for finger in scene.FINGERS]
        # Each arm joint has one position, one velocity and one actuator, in the same order; free joints come after the arms.
        self._joints = scene.ARM_QPOS[arm]
        self._low, self._high = self._model.actuator_ctrlrange[self._joints].T

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position [3] of the fingertips' midpoint and rotation [3, 3] of the gripper for joint positions [6]."""
        self._data.qpos[self._joints] = joints
        mujoco.mj_kinematics(self._model, self._data)
        position = self._data.site_xpos[self._fingertips].mean(axis=0)
        return position, self._data.xmat[self._gripper].reshape(3, 3).copy()

    def inverse(self, position: np.ndarray, rotation: np.ndarray, guess: np.ndarray) -> np.ndarray:
        """Joint positions [6] within the control range at which `forward` returns `position` [3] and `rotation` [3, 3].

        Levenberg-Marquardt from `guess` [6], damped by the squared error (Sugihara, "Solvability-unconcerned inverse kinematics
        by the Levenberg-Marquardt method", IEEE T-RO 2011): cautious far from the solution, Newton's method close to it.

        Raises:
            ValueError: it does not converge, as when the pose is out of reach.
        """
        joints = guess
        for _ in range(self.MAX_ITERATIONS):
            reached_position, reached_rotation = self.forward(joints)
            # sin(angle) times the axis of the rotation from one frame to the other, which is that matrix's antisymmetric part.
            between = rotation @ reached_rotation.T
            turn = (between - between.T)[[2, 0, 1], [1, 2, 0]] / 2
            error = np.concatenate([position - reached_position, turn])
            if np.abs(error).max() < self.TOLERANCE:
                return joints
            jacobian = self._jacobian(reached_position)
            damped = jacobian @ jacobian.T + (error @ error + self.DAMPING) * np.eye(6)
            joints = np.clip(joints + jacobian.T @ np.linalg.solve(damped, error), self._low, self._high)
        raise ValueError(f"the {self._arm} arm cannot hold its fingertips at {np.round(position, 3)} with this pitch and yaw")

    def _jacobian(self, point: np.ndarray) -> np.ndarray:
        """[6, 6] Jacobian of a gripper-fixed point's velocity and of the gripper's angular velocity, after `forward`."""
        jacobian = np.empty((6, self._model.nv))
        mujoco.mj_comPos(self._model, self._data)  # mj_jac reads what this computes
        mujoco.mj_jac(self._model, self._data, jacobian[:3], jacobian[3:], point, self._gripper)
        return jacobian[:, self._joints]
