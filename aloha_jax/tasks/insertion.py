"""ALOHA peg insertion: the left arm brings the socket, the right arm the peg, and the peg's end must touch the pin inside.

`level` is gym_aloha's reward (gym_aloha/tasks/sim.py, InsertionTask.get_reward), `dense` a potential-based shaping (Ng, Harada
and Russell 1999), and `features` the privileged observation. Everything that belongs to one arm is expressed in that arm's own
frame, in which both arms see the same geometry: origin midway between the arms, x from the arm's base toward the other arm, z up.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gym_aloha.constants import START_ARM_POSE, normalize_puppet_gripper_position
from gym_aloha.utils import sample_insertion_pose
from jax.scipy.spatial.transform import Rotation

from aloha_jax.config import Config
from aloha_jax.engines import Physics
from aloha_jax.scene import ARM_QPOS, ARMS, FINGER_QPOS, HALF_LENGTH, PEG_QPOS, PEG_QVEL, SOCKET_QPOS, SOCKET_QVEL, Scene
from aloha_jax.tasks import potentials
from aloha_jax.tasks.potentials import HALF_TURN, NOMINAL_GRIP, Geometry, Shaping

MAX_LEVEL = 4

# gym_aloha.utils.sample_insertion_pose: metres; both objects start upright at z = 0.05 and fall.
PEG_START_LOW, PEG_START_HIGH = (0.1, 0.4, 0.05), (0.2, 0.6, 0.05)
SOCKET_START_LOW, SOCKET_START_HIGH = (-0.2, 0.4, 0.05), (-0.1, 0.6, 0.05)

ARMS_CENTRE = (0.0, 0.5, 0.0)  # midway between the arms' bases
WORKSPACE_LOW, WORKSPACE_HIGH = (-0.45, 0.2, -0.02), (0.45, 0.95, 0.6)  # objects outside of it are lost


class Progress(NamedTuple):
    """What the dense reward remembers of an episode, per world.

    Attributes:
        grasp: float32[N, 2], slow average per arm of "both fingers hold the object" (raw contacts flicker).
        potential: float32[N, 2], each arm's potential after the last step.
        best_level: int32[N], highest level so far.
        action: float32[N, 14], the last one.
        squeeze: float32[N, 2], slow average per arm of "the gripper is told to close", 1 from an action of -0.3 down.
    """

    grasp: jax.Array
    potential: jax.Array
    best_level: jax.Array
    action: jax.Array
    squeeze: jax.Array


class StartRange(NamedTuple):
    """By how much starts exceed gym_aloha's, either way.

    Attributes:
        yaw: radians by which peg and socket are turned about the vertical; gym_aloha does not turn them.
        shift: metres by which they lie outside its range, along x and along y.
    """

    yaw: float = 0.0
    shift: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "StartRange":
        """What a run's configuration says."""
        return cls(float(np.deg2rad(config.start_yaw)), config.start_shift)


def pose_error(pose_noise: float, unit: Any) -> Any:
    """By how much objects seem off, float[..., 6] of standard normal numbers: metres, then radians, a degree per millimetre."""
    scale = np.repeat([pose_noise, np.deg2rad(1e3 * pose_noise)], 3).astype(np.float32)
    return unit * np.broadcast_to(scale, unit.shape)


def _rotation_matrix(quat: jax.Array) -> jax.Array:
    """MuJoCo quaternions float[..., 4] (w first) -> float[..., 3, 3]."""
    return Rotation.from_quat(jnp.roll(quat, -1, axis=-1)).as_matrix()


def _misplaced(geometry: Geometry, error: jax.Array) -> Geometry:
    """With objects where they seem to be."""
    turn = jax.vmap(jax.vmap(lambda vector: Rotation.from_rotvec(vector).as_matrix()))(error[..., 3:])
    return geometry._replace(position=geometry.position + error[..., :3], rotation=turn @ geometry.rotation)


def _stack_arms(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.stack([left, right], axis=1)


class Insertion:
    """The task's pure functions on one scene; holds addresses and coefficients only."""

    name = "insertion"
    num_levels = MAX_LEVEL
    highest_potential = potentials.HIGHEST

    def __init__(self, scene: Scene, shaping: Shaping | None = None, start_range: StartRange | None = None):
        self.scene, self.shaping, self.start_range = scene, shaping or Shaping(), start_range or StartRange()

    # --- Start poses ---------------------------------------------------------------------------------------------------------

    def sample_start(self, key: jax.Array) -> jax.Array:
        """One start pose float32[30]: peg and socket uniform in gym_aloha's boxes and `start_range`, arms at rest."""
        peg_key, socket_key = jax.random.split(key)
        peg = self._sample_pose(peg_key, PEG_START_LOW, PEG_START_HIGH)
        socket = self._sample_pose(socket_key, SOCKET_START_LOW, SOCKET_START_HIGH)
        return jnp.concatenate([jnp.array(START_ARM_POSE), peg, socket])

    def _sample_pose(self, key: jax.Array, low: tuple[float, ...], high: tuple[float, ...]) -> jax.Array:
        """Position and quaternion, float32[7], of an object between two corners."""
        margin = jnp.array([self.start_range.shift, self.start_range.shift, 0.0])
        position_key, yaw_key = jax.random.split(key)
        position = jax.random.uniform(position_key, (3,), minval=jnp.array(low) - margin, maxval=jnp.array(high) + margin)
        half = 0.5 * self.start_range.yaw * jax.random.uniform(yaw_key, minval=-1.0)
        return jnp.concatenate([position, jnp.array([jnp.cos(half), 0.0, 0.0, jnp.sin(half)])])

    @staticmethod
    def start_from_seed(seed: int) -> np.ndarray:
        """The start pose float64[30] of `env.reset(seed=seed)` in gym_aloha."""
        return np.concatenate([START_ARM_POSE, *sample_insertion_pose(seed)])

    # --- Official reward -----------------------------------------------------------------------------------------------------

    def touches(self, physics: Physics) -> dict[str, jax.Array]:
        """Touch predicates by name (`scene.INSERTION_TOUCHES`), each bool[N]."""
        positive = physics.sensordata > 0
        read = np.stack([np.isin(np.arange(positive.shape[1]), idx) for idx in self.scene.touches.values()])
        touched = (positive[:, None] & jnp.array(read)[None]).any(axis=2)
        return dict(zip(self.scene.touches, jnp.unstack(touched, axis=1), strict=True))

    def level(self, physics: Physics) -> jax.Array:
        """gym_aloha's reward, int32[N]: 1 both touched, 2 both lifted, 3 peg touches socket in the air, 4 peg touches pin.

        As there, only one finger of each arm counts: the left arm's left finger and the right arm's right finger.
        """
        touch = self.touches(physics)
        held = touch["peg_finger_right"] & touch["socket_finger_left"]
        in_air = ~touch["peg_table"] & ~touch["socket_table"]
        level = jnp.where(held, 1, 0)
        level = jnp.where(held & in_air, 2, level)
        level = jnp.where(touch["peg_socket"] & in_air, 3, level)
        return jnp.where(touch["peg_pin"], 4, level).astype(jnp.int32)

    def lost(self, physics: Physics) -> jax.Array:
        """bool[N]: whether peg or socket has left the table's area for good."""
        positions = jnp.stack([physics.qpos[:, PEG_QPOS][:, :3], physics.qpos[:, SOCKET_QPOS][:, :3]], axis=1)
        low, high = jnp.array(WORKSPACE_LOW)[None, None], jnp.array(WORKSPACE_HIGH)[None, None]
        outside = (positions < low) | (positions > high)
        return outside.any(axis=(1, 2))

    # --- Dense reward --------------------------------------------------------------------------------------------------------

    def geometry(self, physics: Physics) -> Geometry:
        """Poses in the arms' own frames."""
        # A half turn about z takes the world's frame to the right arm's; the left arm's is the world's, shifted.
        signs = jnp.array([(1.0, 1.0, 1.0), HALF_TURN])  # [arm, xyz]

        def sensor(name: str) -> jax.Array:
            return physics.sensordata[:, self.scene.sensors[name]]

        tips = jnp.stack([jnp.stack([sensor(f"{a}/{f}_fingertip/pos") for f in ARMS], axis=1) for a in ARMS], axis=1)
        objects = _stack_arms(physics.qpos[:, SOCKET_QPOS], physics.qpos[:, PEG_QPOS])
        # All at once: where these functions are traced, every call is some sixty operations.
        quats = jnp.stack([*(sensor(f"{a}/gripper/quat") for a in ARMS), *jnp.unstack(objects[..., 3:], axis=1)], axis=1)
        gripper, rotation = jnp.split(_rotation_matrix(quats), 2, axis=1)
        centre = jnp.array(ARMS_CENTRE)
        # The peg's mating end is at -x of its own frame, so its frame is turned as well: R' = T R T with T the half turn.
        rotation = signs[None, :, :, None] * rotation * signs[None, :, None, :]
        return Geometry(
            fingertips=(tips - centre[None, None, None]) * signs[None, :, None, :],
            gripper=signs[None, :, :, None] * gripper,
            position=(objects[..., :3] - centre[None, None]) * signs[None],
            rotation=rotation,
            # A hand's two fingers are sent equally far from 0, to either side, by a motor each.
            off_centre=_stack_arms(*(physics.qpos[:, FINGER_QPOS[a] : FINGER_QPOS[a] + 2].mean(axis=1) for a in ARMS)),
        )

    def start_progress(self, physics: Physics) -> Progress:
        """Progress of fresh worlds."""
        geometry, touch = self.geometry(physics), self.touches(physics)
        # An episode that starts in the middle of the task is not paid for what is there already.
        grasp = self._holds(geometry, touch)
        no_action = jnp.zeros((physics.qpos.shape[0], 14))
        squeeze = jnp.ones_like(grasp)  # whatever it holds, it squeezes
        potential = potentials.total(self.shaping, geometry, grasp, squeeze)
        return Progress(grasp, potential, self.level(physics), no_action, squeeze)

    def dense(
        self, physics: Physics, progress: Progress, level: jax.Array, failed: jax.Array, action: jax.Array
    ) -> tuple[jax.Array, Progress]:
        """Dense reward per arm, float32[N, 2], and the episode's progress after this step.

        reward = 0.5 * (change of the arm's potential + bonus for official levels 1 and 4, reached for the first time
                        - cost |arm's action|^2 - cost |its change|^2 - 1 on failure, when the potential falls to 0),

        with `action`, float32[N, 14], by how much the step was to change the control targets, in units of `actions.DELTA_SCALE`.

        The official level 4 says nothing of how the peg went in; its bonus does (`potentials.success_bonus`).

        Differences of a potential cannot be earned twice in an episode, so nothing is gained by camping near a goal. They are not
        discounted, as those of Ng, Harada and Russell (1999) are (docs/learning.md).
        """
        touch = self.touches(physics)
        geometry = self.geometry(physics)
        grasp = 0.8 * progress.grasp + 0.2 * self._holds(geometry, touch)
        told_to_close = jnp.clip(-action.reshape(-1, 2, 7)[..., 6] / 0.3, 0.0, 1.0)
        squeeze = 0.8 * progress.squeeze + 0.2 * told_to_close
        potential = potentials.total(self.shaping, geometry, grasp, squeeze)
        potential = jnp.where(failed[:, None], 0.0, potential)
        touched, inserted = ((progress.best_level < least) & (level >= least) for least in (1, MAX_LEVEL))
        bonus = potentials.LEVEL_1_BONUS * touched[:, None] + potentials.success_bonus(geometry, potential) * inserted[:, None]
        shaping = self.shaping
        effort = shaping.action_cost * jnp.square(action) + shaping.action_change_cost * jnp.square(action - progress.action)
        effort = effort.reshape(-1, 2, 7).sum(axis=2)
        reward = potential - progress.potential + bonus - effort - failed[:, None]
        return 0.5 * reward, Progress(grasp, potential, jnp.maximum(progress.best_level, level), action, squeeze)

    def _holds(self, geometry: Geometry, touch: dict[str, jax.Array]) -> jax.Array:
        """float32[N, 2] in 0..1: both fingers of the arm touch its object, from opposite sides, near its centre.

        With a grip tolerance t, d from the nominal grip (along the object and in height) is worth 0.3 + 0.7 exp(-(d / t)^2): an
        arm that always grips at the same place knows from its joints where its object is, even where no camera sees it.
        """
        both = _stack_arms(
            touch["socket_finger_left"] & touch["socket_finger_right"], touch["peg_finger_left"] & touch["peg_finger_right"]
        )
        offset = geometry.fingertips - geometry.position[:, :, None]
        across = jnp.einsum("nafi,nai->naf", offset, geometry.rotation[..., 1])
        straddling = across[..., 0] * across[..., 1] < 0
        near = jnp.linalg.norm(offset.mean(axis=2), axis=-1) < 0.05
        hold = (both & straddling & near).astype(jnp.float32)
        if self.shaping.grip_tolerance is None:
            return hold
        grip = jnp.einsum("nai,naij->naj", offset.mean(axis=2), geometry.rotation)[..., ::2]
        distance = jnp.linalg.norm(grip - jnp.array(NOMINAL_GRIP)[None, None], axis=-1)
        return hold * (0.3 + 0.7 * jnp.exp(-jnp.square(distance / self.shaping.grip_tolerance)))

    # --- Observations --------------------------------------------------------------------------------------------------------

    def agent_pos(self, physics: Physics) -> jax.Array:
        """float32[N, 14]: joint angles (rad) and normalised gripper (0 closed, 1 open) per arm, as gym_aloha's `agent_pos`."""
        return jnp.concatenate([self._arm_pos(physics, arm) for arm in ARMS], axis=1)

    def _arm_pos(self, physics: Physics, arm: str) -> jax.Array:
        finger = physics.qpos[:, FINGER_QPOS[arm], None]
        return jnp.concatenate([physics.qpos[:, ARM_QPOS[arm]], normalize_puppet_gripper_position(finger)], axis=1)

    def features(self, physics: Physics, target: jax.Array, progress: Progress, pose_error: jax.Array | None = None) -> jax.Array:
        """The privileged observation, float32[N, 142]: one block of 68 per arm in its own frame, then 6 shared by both.

        Args:
            physics: N worlds.
            target: float32[N, 14], the arms' current control targets.
            progress: the episodes' progress.
            pose_error: float32[N, 2, 6], by how much each arm's object seems off its place, as of `Domain`; what is touched and
                held stays as it is. Observations that are off for an episode: OpenAI et al. 2020, "Learning dexterous in-hand
                manipulation".
        """
        geometry, touch = self.geometry(physics), self.touches(physics)
        if pose_error is not None:
            geometry = _misplaced(geometry, pose_error)
        lift = potentials.raised(geometry) * progress.grasp
        blocks = [
            self._proprioception(physics, target),
            self._own_object(physics, geometry),
            self._contacts(touch),
            jnp.stack([progress.grasp, lift], axis=-1),
            self._other_object(geometry),
        ]
        shared = [*potentials.mating_error(geometry), touch["peg_socket"], touch["peg_pin"], progress.best_level / MAX_LEVEL]
        per_arm = jnp.concatenate(blocks, axis=-1).reshape(physics.qpos.shape[0], -1)
        return jnp.concatenate([per_arm, jnp.stack([jnp.asarray(x, jnp.float32) for x in shared], axis=1)], axis=1)

    def _proprioception(self, physics: Physics, target: jax.Array) -> jax.Array:
        """float32[N, 2, 21]: joint positions, a fifth of their velocities (rad/s), and how far the targets lead them."""
        position = self.agent_pos(physics)
        velocity = [jnp.concatenate([physics.qvel[:, ARM_QPOS[a]], physics.qvel[:, FINGER_QPOS[a], None]], axis=1) for a in ARMS]
        columns = [position.reshape(-1, 2, 7), 0.2 * jnp.stack(velocity, axis=1), (target - position).reshape(-1, 2, 7)]
        return jnp.concatenate(columns, axis=-1)

    def _own_object(self, physics: Physics, geometry: Geometry) -> jax.Array:
        """float32[N, 2, 33]: fingertips, gripper axes, the object's pose and velocity, and the fingertips as it sees them."""
        num_worlds = physics.qpos.shape[0]
        half_turns = jnp.array([(1.0, 1.0, 1.0), HALF_TURN])
        velocity = _stack_arms(physics.qvel[:, SOCKET_QVEL], physics.qvel[:, PEG_QVEL]).reshape(num_worlds, 2, 2, 3)
        linear, spin = jnp.moveaxis(velocity * half_turns[None, :, None], 2, 0)  # spin is in the object's frame
        spin = jnp.einsum("naij,naj->nai", geometry.rotation, spin)
        offsets = geometry.fingertips - geometry.position[:, :, None]
        seen = jnp.einsum("nafi,naij->nafj", offsets, geometry.rotation)
        columns = [geometry.fingertips, geometry.gripper[..., :2], geometry.position, geometry.rotation[..., ::2]]
        return jnp.concatenate([x.reshape(num_worlds, 2, -1) for x in (*columns, seen, linear, 0.1 * spin)], axis=-1)

    def _contacts(self, touch: dict[str, jax.Array]) -> jax.Array:
        """float32[N, 2, 3]: left finger, right finger and table touch the arm's object."""
        names = ("finger_left", "finger_right", "table")
        per_object = (jnp.stack([touch[f"{x}_{name}"] for name in names], axis=1) for x in ("socket", "peg"))
        return _stack_arms(*per_object).astype(jnp.float32)

    def _other_object(self, geometry: Geometry) -> jax.Array:
        """float32[N, 2, 9]: the other object's mating end, in the own object's frame and from the own mating end; its axis."""
        half_turn = jnp.array([[HALF_TURN]])
        axis = geometry.rotation[..., 0]
        end = geometry.position + HALF_LENGTH * axis
        other_end, other_axis = end[:, ::-1] * half_turn, axis[:, ::-1] * half_turn
        to_own_frame = "nai,naij->naj"
        columns = [
            jnp.einsum(to_own_frame, other_end - geometry.position, geometry.rotation),
            jnp.einsum(to_own_frame, other_axis, geometry.rotation),
            other_end - end,
        ]
        return jnp.concatenate(columns, axis=-1)
