"""How well an insertion was done, beyond gym_aloha's reward, which a tilted peg that just touches the pin earns as well."""

import functools
from typing import NamedTuple

import mujoco
import numpy as np

from aloha_jax.scene import CONTROL_TIMESTEP, HALF_LENGTH, HALF_WIDTH, PEG_QPOS, SOCKET_QPOS, SOCKET_WALLS, make_scene
from aloha_jax.tasks.potentials import MOUTH

MAX_TILT, MIN_DEPTH, MAX_PENETRATION = 15.0, 19.9, 1.0  # degrees, mm (contact has a tolerance), mm
_PEG = HALF_WIDTH[1]
MATING_CORNERS = np.array(
    [[-HALF_LENGTH, y, z] for y in (-_PEG, _PEG) for z in (-_PEG, _PEG)]
)  # of the peg, in its frame, metres


class Quality(NamedTuple):
    """One episode, judged at its last step.

    Attributes:
        tilt: angle between the axes of peg and socket, degrees.
        depth: of the peg's foremost corner inside the socket's mouth along the socket's axis, mm; negative in front of it. The
            pin's face is at 20, and the episode ends when a corner touches it.
        penetration: deepest overlap of the peg with a wall of the socket or the pin at any step, mm.
    """

    tilt: float
    depth: float
    penetration: float

    @property
    def clean(self) -> bool:
        """Whether the peg is straight and all the way in, and went there without passing through anything."""
        return self.tilt <= MAX_TILT and self.depth >= MIN_DEPTH and self.penetration <= MAX_PENETRATION


def measure(qpos: np.ndarray) -> Quality:
    """The quality of an episode of joint positions float[T, 30]."""
    model, peg, socket_parts = _model()
    data = mujoco.MjData(model)
    deepest = 0.0
    for pose in qpos:
        data.qpos[:] = pose
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)  # collision detection needs the bodies' bounding volumes where they are now
        mujoco.mj_collision(model, data)
        pairs = data.contact.geom
        between = ((pairs == peg).any(axis=1)) & np.isin(pairs, socket_parts).any(axis=1)
        deepest = max(deepest, -1e3 * float(data.contact.dist[between].min(initial=0.0)))
    peg_pose, socket_pose = qpos[-1][PEG_QPOS], qpos[-1][SOCKET_QPOS]
    peg_frame, socket_axis = _rotation(peg_pose[3:]), _rotation(socket_pose[3:])[:, 0]
    # The peg's mating end is at -x of its frame, the socket's mouth at +x of its own.
    corners = peg_pose[:3] + MATING_CORNERS @ peg_frame.T
    along = float(((corners - socket_pose[:3]) @ socket_axis).min())
    tilt = float(np.degrees(np.arccos(np.clip(peg_frame[:, 0] @ socket_axis, -1.0, 1.0))))
    return Quality(tilt, 1e3 * (MOUTH - along), deepest)


def jerk(targets: np.ndarray) -> float:
    """Mean absolute third derivative of the twelve arm joints' targets, rad/s^3, of an episode's targets float[T, 14]."""
    arms = np.delete(targets, (6, 13), axis=1)  # without the grippers
    return float(np.abs(np.diff(arms, n=3, axis=0)).mean() / CONTROL_TIMESTEP**3) if len(arms) > 3 else 0.0


@functools.cache
def _model() -> tuple[mujoco.MjModel, int, list[int]]:
    model = make_scene(physics="exact").model
    return model, model.geom("red_peg").id, [model.geom(name).id for name in (*SOCKET_WALLS, "pin")]


def _rotation(quat: np.ndarray) -> np.ndarray:
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, np.asarray(quat, np.float64))
    return matrix.reshape(3, 3)
