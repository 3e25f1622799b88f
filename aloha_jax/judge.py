"""The judge: the original gym_aloha environment, with its physics, its frames and its reward, driven by a policy."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

# The judge renders, and so do others of this program: decided before MuJoCo or dm_control, whichever comes first, choose by it.
if sys.platform == "linux":  # elsewhere MuJoCo knows the one way
    os.environ.setdefault("MUJOCO_GL", "egl")

import jax
import jax.numpy as jnp
import numpy as np

from aloha_jax import history
from aloha_jax.actions import delta_target, target_limits
from aloha_jax.conditions import NOMINAL, Condition
from aloha_jax.config import Config
from aloha_jax.engines import Physics, make_engine
from aloha_jax.pixels import RendererUnavailable, frame_to_observation
from aloha_jax.pixels.egl import gl_renderer_string
from aloha_jax.policy import Policy
from aloha_jax.tasks import make_task
from aloha_jax.tasks.insertion import Progress
from aloha_jax.tasks.potentials import Shaping
from aloha_jax.views import vectors_beside_pixels


class Trajectory(NamedTuple):
    """One episode.

    Attributes:
        seed: its start pose is that of `env.reset(seed=seed)` in gym_aloha.
        levels: int[length], the official reward of each step.
        qpos: float[length, 30], joint positions after each step.
        targets: float[length, 14], the joint targets of each step.
        frames: uint8[480, 640, 3] per step, if the simulator rendered any; else None.
    """

    seed: int
    levels: np.ndarray
    qpos: np.ndarray
    targets: np.ndarray
    frames: list[np.ndarray] | None = None


class Controller:
    """Drives gym_aloha with a policy: observations in the policy's form, actions in gym_aloha's."""

    def __init__(self, policy: Policy):
        self._policy = policy
        config = policy.config
        self._exact = make_engine("c", config.task, "exact")
        self._task = make_task(config.task, self._exact.scene, Shaping.of(config))  # how well a grip counts is an observation
        low, high = target_limits(self._exact)
        self._delta_target = jax.jit(lambda target, pos, action: delta_target(target, pos, action, low, high))
        with_precision = jax.default_matmul_precision("highest")  # as in training (`env.in_float32`)
        self._features = jax.jit(with_precision(self._privileged))
        self._start_progress = jax.jit(with_precision(self._task.start_progress))  # op by op it compiles for seconds
        self._remember = jax.jit(
            lambda memory, pos: history.start(pos, config.history) if memory is None else history.push(memory, pos)
        )

    def reset(self, qpos: np.ndarray, qvel: np.ndarray, pose_error: np.ndarray | None = None) -> None:
        """An episode begins, in which objects seem off by float32[2, 6] to policies that see the state (`Domain.pose_error`)."""
        physics = self._exact.reset(jnp.asarray(qpos[None], jnp.float32), jnp.asarray(qvel[None], jnp.float32))
        self._target = self._task.agent_pos(physics)
        if self._policy.config.obs == "state":  # pixels show none of it
            self._progress = self._start_progress(physics)
        self._clock = 0
        self._pose_error = pose_error
        self._memory: jax.Array | None = None

    @property
    def hold(self) -> np.ndarray:
        """The absolute action float32[14] that keeps the last targets."""
        return np.asarray(self._target[0])

    def __call__(
        self, observation: dict[str, Any], qpos: np.ndarray, qvel: np.ndarray, key: jax.Array | None = None
    ) -> np.ndarray:
        """The absolute action float32[14] for gym_aloha's observation; `qpos` and `qvel` serve policies that see the state."""
        config = self._policy.config
        agent_pos = jnp.asarray(observation["agent_pos"], jnp.float32)[None]
        if config.obs == "state":
            obs: Any
            world = qpos[None], qvel[None], self._target, self._progress, self._clock
            obs, self._progress = self._features(*world, None if self._pose_error is None else self._pose_error[None])
        else:
            pixels = frame_to_observation(observation["pixels"]["top"], config.image_height, config.image_width, config.crop)
            self._memory = self._remember(self._memory, history.known(config.obs, agent_pos, self._target))
            vectors = vectors_beside_pixels(
                config.obs, config.observe_target, config.history, agent_pos, target=self._target, memory=self._memory
            )
            obs = {"pixels": pixels[None], **vectors}
        action = self._policy.act(obs, key)
        target = self._delta_target(self._target, agent_pos, action) if config.action == "delta" else action
        self._target = jnp.asarray(np.asarray(target))  # not committed to the parameters' device: `_features` would compile again
        self._clock += 1
        return self.hold

    def _privileged(
        self, qpos: Any, qvel: Any, target: jax.Array, progress: Progress, clock: jax.Array, pose_error: jax.Array | None
    ) -> Any:
        physics: Physics = self._exact.reset(jnp.asarray(qpos, jnp.float32), jnp.asarray(qvel, jnp.float32))
        level = self._task.level(physics)
        failed, no_action = jnp.zeros(1, bool), jnp.zeros((1, 14))
        _, after = self._task.dense(physics, progress, level, failed, no_action)
        progress = jax.tree.map(lambda a, b: jnp.where(clock > 0, a, b), after, progress)
        return self._task.features(physics, target, progress, pose_error), progress


def require_judge() -> None:
    """Raises `RendererUnavailable` if gym_aloha cannot run here: it wants OpenGL even if nobody looks."""
    gl_renderer_string()


class Judge:
    """The environment `gym_aloha/AlohaInsertion-v0`, and a policy that acts in it under one condition or several in turn."""

    def __init__(self, policy: Policy, stochastic: bool = False):
        self._sees, self._stochastic = policy.config.has_pixels, stochastic
        self._controller = Controller(policy)
        self._env: Any = None
        self._condition = NOMINAL

    @property
    def _physics(self) -> Any:
        return self._env.unwrapped._env.physics

    def episode(self, condition: Condition, seed: int, keep_frames: bool = False) -> Trajectory:
        """The episode that starts as `env.reset(seed=seed)` does, under a condition."""
        if self._env is None or condition != self._condition:
            self._enter(condition)
        from dm_control.rl.control import PhysicsError

        data, controller = self._physics.data, self._controller
        _render_only_what_is_seen(self._env, needed=keep_frames or self._sees)
        observation = self._start(seed)
        controller.reset(data.qpos, data.qvel, condition.pose_error(seed) if condition.pose_noise else None)
        first = controller.hold
        late = [first] * condition.delay
        levels: list[int] = []
        qpos: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        done, step = False, 0
        while not done:
            key = jax.random.fold_in(jax.random.key(seed), step) if self._stochastic else None
            before = data.qpos.copy()
            late.append(controller(observation, before, data.qvel.copy(), key))
            action = late.pop(0)
            try:
                observation, reward, terminated, truncated, _ = self._env.step(action)
            except PhysicsError:  # as our worlds, that are then invalid: the last good state ends the episode, and counts nothing
                levels.append(0)
                qpos.append(before)
                targets.append(targets[-1] if targets else first)
                frames += frames[-1:]
                break
            observation["pixels"]["top"] = condition.light(observation["pixels"]["top"])
            done, step = terminated or truncated, step + 1
            levels.append(int(reward))
            qpos.append(data.qpos.copy())
            targets.append(action)
            if keep_frames:
                frames.append(observation["pixels"]["top"])
        return Trajectory(seed, np.array(levels), np.array(qpos), np.array(targets), frames or None)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def _enter(self, condition: Condition) -> None:
        """A new environment, for a model that was changed does not remember how it was; the policy stays, compiled."""
        import gym_aloha  # noqa: F401  (registers the environment)
        import gymnasium

        self.close()
        self._env = gymnasium.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels_agent_pos", disable_env_checker=True)
        self._condition = condition
        condition.change_model(self._physics)

    def _start(self, seed: int) -> dict[str, Any]:
        """The first observation."""
        observation, _ = self._env.reset(seed=seed)
        if self._condition.yaw or self._condition.shift:
            data = self._physics.data
            start, ctrl = self._condition.start(data.qpos.copy(), seed), data.ctrl.copy()
            with self._physics.reset_context():  # which first puts everything into the model's default pose
                data.qpos[:], data.ctrl[:] = start, ctrl
            inner = self._env.unwrapped
            observation = inner._format_raw_obs(inner._env.task.get_observation(self._physics))
        observation["pixels"]["top"] = self._condition.light(observation["pixels"]["top"])
        return observation


def gym_aloha_episodes(
    policy: Policy,
    seeds: Sequence[int],
    stochastic: bool = False,
    keep_frames: int = 0,
    conditions: Sequence[Condition] = (NOMINAL,),
    num_workers: int = 1,
) -> Iterator[Trajectory]:
    """Episodes in `gym_aloha/AlohaInsertion-v0`: under each condition one of every seed, both in the order given.

    Args:
        policy: who acts.
        seeds: an episode's start is that of `env.reset(seed=seed)`.
        stochastic: sample actions instead of taking their mean.
        keep_frames: of how many episodes, the first under each condition, the frames are kept.
        conditions: how the world differs from gym_aloha's.
        num_workers: processes that run them side by side; they change nothing but the time it takes.
    """
    trials = [(condition, seed, i < keep_frames) for condition in conditions for i, seed in enumerate(seeds)]
    if min(num_workers, len(trials)) <= 1:
        with contextlib.closing(Judge(policy, stochastic)) as judge:
            yield from itertools.starmap(judge.episode, trials)
        return
    weights = jax.device_get((policy.params, policy.stats))
    # Not forked: that is unsafe beside JAX's threads.
    context = multiprocessing.get_context("spawn")
    appointed = (policy.config, *weights, stochastic, jax.default_backend())
    with ProcessPoolExecutor(min(num_workers, len(trials)), context, initializer=_appoint, initargs=appointed) as pool:
        try:
            yield from pool.map(_episode, *zip(*trials, strict=True))
        except BrokenProcessPool:
            raise RendererUnavailable("a process that judged died: free some memory, or lower --num-workers") from None


_appointed: Judge  # of a worker process


def _appoint(config: Config, params: Any, stats: Any, stochastic: bool, platform: str) -> None:
    global _appointed
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for all of them and the parent
    if platform == "cpu":
        jax.config.update("jax_platforms", platform)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all of them: no episode is played to its end
    _appointed = Judge(Policy(config, params, stats), stochastic)


def _end_with_parent() -> None:
    """A parent that is killed cannot dismiss its workers: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _episode(condition: Condition, seed: int, keep_frames: bool) -> Trajectory:
    return _appointed.episode(condition, seed, keep_frames)


def _render_only_what_is_seen(env: Any, needed: bool) -> None:
    """gym_aloha renders three cameras at every step and hands out one. Skip the others; the one that counts stays as it is."""
    task = env.unwrapped._env.task

    def get_observation(physics: Any) -> dict[str, Any]:
        top = physics.render(height=480, width=640, camera_id="top") if needed else np.zeros((1, 1, 3), np.uint8)
        return {"qpos": task.get_qpos(physics), "images": {"top": top}}

    task.get_observation = get_observation
