"""C MuJoCo on the CPU: `mujoco.rollout` steps all worlds on a persistent thread pool, behind one pure callback.

A world's state is MuJoCo's own float64 state (time, qpos, qvel) and the solver's warm start. It passes through JAX as its bits,
`uint32[N, 2 * size]`, because JAX holds no float64 by default and rounding the state would make every trajectory another one.
Where worlds differ, one column more says under which of the model's variants a world moves.
"""

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import mujoco
import mujoco.rollout
import numpy as np
from gym_aloha.constants import START_ARM_POSE, unnormalize_puppet_gripper_position
from numpy.typing import ArrayLike

from aloha_jax.engines import Physics
from aloha_jax.host import call_host
from aloha_jax.scene import Scene, scale_dynamics
from aloha_jax.startup import usable_cores

VARIANTS = 21  # of the model, if worlds differ: a Fibonacci number; each is as large as the model, 6 MB
LATTICE_STEPS = (4, 10)  # 4 times (1, 13), 13 being the Fibonacci number before: neither neighbours in the order are alike

FULL_PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS.value


def action_to_ctrl(action: Any) -> Any:
    """gym_aloha's `before_step`, batched: float[N, 14] targets -> float[N, 16] actuator controls.

    Per arm: six joint angles (rad) and a gripper from 0 (closed) to 1 (open), which drives two fingers in opposite directions.
    Bit for bit in NumPy; in JAX the compiler may fuse the multiply and the add of the gripper's mapping and round once.
    """
    left, right = action[:, :7], action[:, 7:]
    columns = []
    for arm in (left, right):
        gripper = unnormalize_puppet_gripper_position(arm[:, 6:])
        columns += [arm[:, :6], gripper, -gripper]
    return action.__array_namespace__().concat(columns, axis=1)


def scaled(model: mujoco.MjModel, friction: float, mass: float) -> mujoco.MjModel:
    """The same with all friction, and mass and inertia of peg and socket, times these factors."""
    changed = copy.copy(model)
    scale_dynamics(changed, friction, mass)
    return changed


def variants(model: mujoco.MjModel, friction_factor: float, mass_factor: float) -> list[mujoco.MjModel]:
    """Models whose friction and mass are those of `model` times factors in 1/f..f, evenly on a logarithmic scale.

    The pairs of factors are a Fibonacci lattice (Niederreiter 1992, chapter 5), the first of them (1, 1).
    """
    if friction_factor == mass_factor == 1.0:
        return [model]
    models = []
    for i in range(VARIANTS):
        places = ((VARIANTS // 2 + i * step) % VARIANTS for step in LATTICE_STEPS)
        exponents = (2 * place / (VARIANTS - 1) - 1 for place in places)
        friction, mass = (f**exponent for f, exponent in zip((friction_factor, mass_factor), exponents, strict=True))
        models.append(scaled(model, friction, mass))
    return models


class CEngine:
    """The Engine interface over `mujoco.rollout`."""

    def __init__(self, scene: Scene, num_threads: int | None = None, models: Sequence[mujoco.MjModel] = ()):
        """Starts the threads.

        Args:
            scene: what to simulate.
            num_threads: that step the worlds; by default one for each core.
            models: variants of the scene's model, which differ in friction and masses; by default that model alone. Of the worlds
                that `reset` makes the i-th moves under the i-th of them.
        """
        self.scene = scene
        model = scene.model
        self._models = list(models) or [model]
        self._num_threads = num_threads or usable_cores()
        self._pool = mujoco.rollout.Rollout(nthread=self._num_threads)
        self._data = [mujoco.MjData(model) for _ in range(self._num_threads)]
        self._lock = threading.Lock()  # one rollout at a time: the pool and its MjData are shared
        self._state_size = mujoco.mj_stateSize(model, FULL_PHYSICS)
        self._bits_size = 2 * (self._state_size + model.nv)
        self._qpos = slice(1, 1 + model.nq)  # behind the time
        self._qvel = slice(1 + model.nq, 1 + model.nq + model.nv)
        self._start_ctrl = np.asarray(START_ARM_POSE, dtype=np.float64)

    def reset(self, qpos: jax.Array, qvel: jax.Array) -> Physics:
        return self._call(self._host_reset, qpos.shape[0], qpos, qvel)

    def step(self, physics: Physics, action: jax.Array) -> Physics:
        return self._call(self._host_step, action.shape[0], physics.internal, action)

    def reset_where(self, mask: jax.Array, physics: Physics, qpos: jax.Array, qvel: jax.Array) -> Physics:
        def reset() -> Physics:
            return self._call(self._host_reset_where, mask.shape[0], mask, physics, qpos, qvel)

        return jax.lax.cond(mask.any(), reset, lambda: physics)  # most steps reset no world, and a callback takes its time

    def under_models(self, physics: Physics, numbers: jax.Array) -> Physics:
        """The same worlds, from now on under the variants of the model that have these numbers, int32[N]."""
        if len(self._models) == 1:
            return physics
        return physics._replace(internal=physics.internal.at[:, self._bits_size].set(numbers.astype(jnp.uint32)))

    def complaint(self, physics: Physics) -> str | None:
        return None

    def _call(self, host_function: Callable[..., Physics], num_worlds: int, *args: Any) -> Physics:
        model = self.scene.model
        float_array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        result = Physics(
            jax.ShapeDtypeStruct((num_worlds, self._bits_size + (len(self._models) > 1)), jnp.uint32),
            qpos=float_array((num_worlds, model.nq)),
            qvel=float_array((num_worlds, model.nv)),
            sensordata=float_array((num_worlds, model.nsensordata)),
        )
        return cast(Physics, call_host(host_function, result, *args))

    def _host_reset(self, qpos: ArrayLike, qvel: ArrayLike) -> Physics:
        qpos, qvel = np.asarray(qpos), np.asarray(qvel)
        state = np.zeros((len(qpos), self._state_size))
        state[:, self._qpos] = qpos
        state[:, self._qvel] = qvel
        warmstart = np.zeros((len(qpos), self.scene.model.nv))
        return self._pack(state, warmstart, self._sense(state, warmstart), np.arange(len(qpos)) % len(self._models))

    def _host_step(self, bits: ArrayLike, action: ArrayLike) -> Physics:
        state, warmstart, variant = self._unpack(np.asarray(bits))
        substeps = self.scene.substeps
        # One more step only for its sensors, which `mj_step` evaluates before it integrates.
        num_steps = substeps + 1 if self.scene.fresh_sensors else substeps
        ctrl = action_to_ctrl(np.asarray(action)).astype(np.float64)
        states, sensors = self._rollout(self._models_of(variant), state, warmstart, ctrl, num_steps)
        timestep = self.scene.model.opt.timestep
        # MuJoCo puts a world whose numbers explode into its default pose, sets its clock back, and `rollout` leaves it there.
        intact = np.abs(states[:, -1, 0] - state[:, 0] - num_steps * timestep) < 0.5 * timestep
        end = np.where(intact[:, None], states[:, substeps - 1], np.nan)
        before = states[:, substeps - 2] if substeps > 1 else state
        # Euler without joint damping: the last acceleration is the velocity's last change. It warm-starts the next solve.
        warmstart = (end[:, self._qvel] - before[:, self._qvel]) / timestep
        return self._pack(end, warmstart, sensors[:, -1], variant)

    def _host_reset_where(self, mask: ArrayLike, physics: Physics, qpos: ArrayLike, qvel: ArrayLike) -> Physics:
        mask = np.asarray(mask)
        old = Physics(*map(np.asarray, physics))
        new = self._host_reset(np.asarray(qpos)[mask], np.asarray(qvel)[mask])
        merged = [array.copy() for array in old]
        for target, source in zip(merged, new, strict=True):
            target[mask] = source
        merged[0][:, self._bits_size :] = old.internal[:, self._bits_size :]  # a world keeps its variant
        return Physics(*merged)

    def _models_of(self, variant: np.ndarray) -> Any:
        return [self._models[i] for i in variant] if len(self._models) > 1 else self._models[0]

    def _sense(self, state: np.ndarray, warmstart: np.ndarray) -> np.ndarray:
        """Sensors of worlds at rest or not; they read positions and which geoms touch, whatever the friction and the masses."""
        ctrl = np.broadcast_to(self._start_ctrl, (len(state), len(self._start_ctrl)))
        return self._rollout(self.scene.model, state, warmstart, ctrl, num_steps=1)[1][:, -1]

    def _rollout(
        self, models: Any, state: np.ndarray, warmstart: np.ndarray, ctrl: np.ndarray, num_steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """States float64[N, steps, size] and sensors float64[N, steps, nsensordata] under constant controls."""
        if len(state) == 0:
            sensors = np.zeros((0, num_steps, self.scene.model.nsensordata))
            return np.zeros((0, num_steps, self._state_size)), sensors
        with self._lock:
            return self._pool.rollout(models, self._data, state, ctrl[:, None], nstep=num_steps, initial_warmstart=warmstart)

    def _pack(self, state: np.ndarray, warmstart: np.ndarray, sensordata: np.ndarray, variant: np.ndarray) -> Physics:
        bits = np.concatenate([state, warmstart], axis=1).view(np.uint32)
        if len(self._models) > 1:
            bits = np.concatenate([bits, variant[:, None].astype(np.uint32)], axis=1)
        float32 = functools.partial(np.asarray, dtype=np.float32)
        return Physics(bits, float32(state[:, self._qpos]), float32(state[:, self._qvel]), float32(sensordata))

    def _unpack(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """State, warm start and, if worlds differ, numbers of their variants."""
        both = np.ascontiguousarray(bits[:, : self._bits_size]).view(np.float64)
        return both[:, : self._state_size], both[:, self._state_size :], bits[:, -1]
