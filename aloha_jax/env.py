"""The functional, batched environment: `reset` and `step` are pure functions of `EnvState`, usable under `jit` and `scan`."""

import functools
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aloha_jax import history, starts
from aloha_jax.actions import DELTA_SCALE, delta_target, target_limits
from aloha_jax.config import MAX_CAMERA_SHIFT, MAX_LAG, MAX_START_SHIFT, Config
from aloha_jax.engines import Engine, Physics, make_engine
from aloha_jax.env_state import EnvState, Episode, Moment, Observation
from aloha_jax.pixels import Renderer, make_renderer
from aloha_jax.scene import FRAME_SHAPE
from aloha_jax.tasks import make_task
from aloha_jax.tasks.insertion import Progress, StartRange
from aloha_jax.tasks.potentials import Shaping
from aloha_jax.views import Views

__all__ = ["Env", "EnvState", "Episode", "Observation", "make", "make_from_config"]

EPISODE_LENGTH = 300  # control steps; gym_aloha's registered time limit
MAX_COUNT = 2**31 - 1  # JAX counts in 32 bits


def _choose(mask: jax.Array, new: Any, old: Any) -> Any:
    """`new` where bool[N] `mask` holds, else `old`, for every array of two like pytrees."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b), new, old)


# Products of matrices as precise as their factors, where a GPU would round those to 10 bits (TF32): a peg is 2 cm wide.
in_float32 = jax.default_matmul_precision("highest")


class Env:
    """N worlds of a task behind `reset` and `step`. Build it with `make`."""

    def __init__(
        self,
        engine: Engine,
        task_name: str,
        num_envs: int,
        renderer: Renderer | None,
        *,
        obs: str,
        action: str,
        reward: str,
        autoreset: bool = True,
        episode_length: int = EPISODE_LENGTH,
        start_states: str = "task",
        start_share: float = 0.5,
        seed: int = 0,
        observe_target: bool = False,
        history: tuple[int, ...] = (),
        shaping: Shaping | None = None,
        start_range: StartRange | None = None,
        camera_shift: float = 0.0,
        action_delay: float = 0.0,
    ):
        self.engine, self.renderer, self.num_envs = engine, renderer, num_envs
        self.task = make_task(task_name, engine.scene, shaping, start_range)
        self.obs, self.action, self.reward = obs, action, reward
        self.autoreset, self.episode_length = autoreset, episode_length
        self._views = Views(self.task, obs, renderer, observe_target, history)
        self.lags = self._views.lags
        self.target_low, self.target_high = target_limits(engine)
        self._domain = functools.partial(starts.domain, camera_shift if obs != "state" else 0.0, action_delay)
        self.start_share, self.records = start_share, start_states == "archive"
        self.initial_archive = starts.initial_archive(start_states, engine, self.task, seed)

    def reset(self, key: jax.Array) -> EnvState:
        """Fresh worlds from one PRNG key."""
        keys = jax.random.split(key, self.num_envs)
        keys, start_keys = starts.split(keys)
        qpos = jax.vmap(self.task.sample_start)(start_keys)
        return self._start(qpos, jnp.zeros((self.num_envs, self.engine.scene.model.nv)), keys)

    def reset_from(self, qpos: ArrayLike, key: jax.Array | None = None) -> EnvState:
        """Worlds at rest at float[N, 30] joint positions; `key` seeds the episodes after the first."""
        expected = (self.num_envs, self.engine.scene.model.nq)
        if jnp.shape(qpos) != expected:
            raise ValueError(f"reset_from wants qpos of shape {expected}, not {jnp.shape(qpos)}")
        keys = jax.random.split(jax.random.key(0) if key is None else key, self.num_envs)
        qpos = jnp.asarray(qpos, jnp.float32)
        return self._start(qpos, jnp.zeros((self.num_envs, self.engine.scene.model.nv)), keys)

    def step(self, state: EnvState, action: ArrayLike) -> EnvState:
        """One control step (0.02 s) with float[N, 14] actions."""
        after, now, final = self._advance(state, action)
        obs, final_obs = self._views.now_and_ended(now, final, after.done & self.autoreset)
        return after._replace(obs=obs, final_obs=final_obs)

    @property
    def draws_ahead(self) -> bool:
        """Whether a step can be taken as `begin_step` and `end_step`, with something else to do in between."""
        return self._views.draws_ahead

    def begin_step(self, state: EnvState, action: ArrayLike) -> tuple[EnvState, jax.Array]:
        """A step whose pictures are being drawn: worlds whose observations lack them, and a ticket for `end_step`."""
        after, now, final = self._advance(state, action)
        obs, final_obs, ticket = self._views.ask(now, final, after.done & self.autoreset)
        return after._replace(obs=obs, final_obs=final_obs), ticket

    def end_step(self, begun: EnvState, ticket: jax.Array, after: jax.Array) -> EnvState:
        """Wait for the pictures of a step, but not before the array `after` has been computed."""
        obs, final_obs = self._views.receive(begun.obs, begun.final_obs, ticket, len(begun.clock), after)
        return begun._replace(obs=obs, final_obs=final_obs)

    def close(self) -> None:
        """Stop the renderer, for other environments that share it, too."""
        if self.renderer is not None:
            self.renderer.close()

    @in_float32
    def _advance(self, state: EnvState, action: ArrayLike) -> tuple[EnvState, Moment, Moment]:
        """Everything of a step but the observations, and what those are made of: now, and before any reset."""
        action = jnp.asarray(action, jnp.float32)
        expected = (state.reward.shape[0], 14)
        if action.shape != expected:
            raise ValueError(f"step wants actions of shape {expected}, not {action.shape}")
        target = self.next_target(state.target, self.task.agent_pos(state.physics), action)
        late = state.domain.late
        physics = self.engine.step(state.physics, target if late is None else _choose(late, state.target, target))
        invalid = ~jnp.isfinite(physics.qpos).all(axis=1) | ~(jnp.abs(physics.qvel) < 1e3).all(axis=1)
        invalid |= ~jnp.isfinite(target).all(axis=1)  # MuJoCo ignores such a control, but it would stay in the observation
        # The last good state ends the episode.
        physics, target = _choose(invalid, (state.physics, state.target), (physics, target))
        level = jnp.where(invalid, 0, self.task.level(physics))

        lost = self.task.lost(physics) & (self.reward == "dense")
        terminated = ((level == self.task.num_levels) | lost) & ~invalid
        clock = state.clock + 1
        truncated = ((clock >= self.episode_length) | invalid) & ~terminated
        # An absolute action costs what the change does that it asks for.
        change = action if self.action == "delta" else (action - state.target) / jnp.array(DELTA_SCALE)[None]
        arm_reward, progress = self._reward(state, physics, level, lost, change)
        arm_reward = jnp.where(invalid[:, None], 0.0, arm_reward)
        progress = _choose(invalid, state.progress, progress)
        reward = arm_reward.sum(axis=1)
        after = state._replace(
            physics=physics,
            target=target,
            progress=progress,
            clock=clock,
            reward=reward,
            arm_reward=arm_reward,
            level=level,
            terminated=terminated,
            truncated=truncated,
            invalid=invalid,
            history=history.push(state.history, history.known(self.obs, self.task.agent_pos(physics), target)),
            episode=self._episode(state, reward, level),
            task_start=state.next_task_start,
        )
        return self._reset_ended(starts.record_some(self.task, after) if self.records else after)

    def next_target(self, target: jax.Array, agent_pos: jax.Array, action: jax.Array) -> jax.Array:
        """Control targets float32[N, 14] from the last ones, the measured joints and an action (itself, if absolute)."""
        if self.action == "absolute":
            return action
        return delta_target(target, agent_pos, action, self.target_low, self.target_high)

    @in_float32
    def _start(self, qpos: jax.Array, qvel: jax.Array, keys: jax.Array) -> EnvState:
        num_worlds = qpos.shape[0]
        physics = self.engine.reset(qpos, qvel)
        progress = self.task.start_progress(physics)
        clock = jnp.zeros(num_worlds, jnp.int32)
        target = self.task.agent_pos(physics)
        privileged = self.task.features(physics, target, progress)
        memory = history.start(history.known(self.obs, self.task.agent_pos(physics), target), self.lags)
        domain = self._domain(keys)
        now = Moment(physics, target, privileged, memory, domain.camera)
        obs = self._views.now(now)
        return EnvState(
            physics=physics,
            target=target,
            progress=progress,
            clock=clock,
            key=keys,
            obs=obs,
            privileged=privileged,
            final_obs=obs,
            final_privileged=privileged,
            final_qpos=physics.qpos,
            reward=jnp.zeros(num_worlds),
            arm_reward=jnp.zeros((num_worlds, 2)),
            level=self.task.level(physics),
            terminated=jnp.zeros(num_worlds, bool),
            truncated=jnp.zeros(num_worlds, bool),
            invalid=jnp.zeros(num_worlds, bool),
            episode=Episode(jnp.zeros(num_worlds), jnp.zeros(num_worlds, jnp.int32), jnp.zeros(num_worlds, jnp.int32)),
            task_start=jnp.ones(num_worlds, bool),
            next_task_start=jnp.ones(num_worlds, bool),
            history=memory,
            archive=self.initial_archive,
            domain=domain,
        )

    def _reset_ended(self, state: EnvState) -> tuple[EnvState, Moment, Moment]:
        """Start new episodes where one has ended: the worlds, and what there is to observe of them now and before."""
        final = state.physics
        final_privileged = self.task.features(final, state.target, state.progress)
        before = Moment(final, state.target, final_privileged, state.history, state.domain.camera)
        if not self.autoreset:
            after = state._replace(privileged=final_privileged, final_privileged=final_privileged, final_qpos=final.qpos)
            return after, before, before
        done = state.done
        keys, start_keys = starts.split(state.key)
        sample = functools.partial(starts.sample, self.task, self.start_share, state.archive)
        start = jax.vmap(sample)(start_keys)
        physics = self.engine.reset_where(done, final, start.qpos, start.qvel)
        start_target = jnp.where(start.of_task[:, None], self.task.agent_pos(physics), start.target)
        memory = history.start(history.known(self.obs, self.task.agent_pos(physics), start_target), self.lags)
        domain = self._domain(start_keys)
        fresh = (start_target, self.task.start_progress(physics), jnp.zeros_like(state.clock), start.of_task, memory, domain)
        old = (state.target, state.progress, state.clock, state.next_task_start, state.history, state.domain)
        target, progress, clock, next_task_start, memory, domain = _choose(done, fresh, old)
        privileged = self.task.features(physics, target, progress)
        after = state._replace(
            physics=physics,
            target=target,
            progress=progress,
            clock=clock,
            key=keys,
            privileged=privileged,
            final_privileged=final_privileged,
            final_qpos=final.qpos,
            next_task_start=next_task_start,
            history=memory,
            domain=domain,
        )
        return after, Moment(physics, target, privileged, memory, domain.camera), before

    def _reward(
        self, state: EnvState, physics: Physics, level: jax.Array, lost: jax.Array, change: jax.Array
    ) -> tuple[jax.Array, Progress]:
        """Reward per arm float32[N, 2] and the episode's progress."""
        dense, progress = self.task.dense(physics, state.progress, level, lost, change)
        if self.reward == "dense":
            return dense, progress
        reward = level.astype(jnp.float32)
        if self.reward == "shaped":
            # The guide's: +1 % of the current reward, +0.1 when the level rises above the episode's best.
            reward = 1.01 * reward + 0.1 * (level > state.progress.best_level)
        return jnp.stack([0.5 * reward, 0.5 * reward], axis=1), progress

    def _episode(self, state: EnvState, reward: jax.Array, level: jax.Array) -> Episode:
        fresh = jax.tree.map(jnp.zeros_like, state.episode)
        before = _choose(state.done, fresh, state.episode) if self.autoreset else state.episode
        return Episode(before.total_reward + reward, before.length + 1, jnp.maximum(before.best_level, level))


def make(
    task: str = "insertion",
    num_envs: int = 1,
    *,
    engine: str = "c",
    impl: str = "auto",
    physics: str = "fast",
    obs: str = "state",
    action: str = "absolute",
    reward: str = "sparse",
    image_height: int = 64,
    image_width: int = 64,
    crop: tuple[int, int, int, int] | None = None,
    renderer: str | Renderer = "auto",
    render_quality: str = "fast",
    autoreset: bool = True,
    episode_length: int = EPISODE_LENGTH,
    start_states: str = "task",
    start_share: float = 0.5,
    seed: int = 0,
    observe_target: bool = False,
    history: tuple[int, ...] = (),
    shaping: Shaping | None = None,
    start_range: StartRange | None = None,
    camera_shift: float = 0.0,
    action_delay: float = 0.0,
) -> Env:
    """Build a batched environment.

    Args:
        task: `insertion`.
        num_envs: number of worlds, N.
        engine: `c` (C MuJoCo on a thread pool), `mjx` (on JAX's device), or `auto`: `c`, on every machine.
        impl: implementation of the `mjx` engine, `auto`, `warp` or `jax`; unused by `c`.
        physics: `exact` (gym_aloha's 10 x 0.002 s) or `fast` (4 x 0.005 s, capped solver; mjx's `jax` has its own).
        obs: `pixels`, `pixels_agent_pos` or `state`.
        action: `absolute` (gym_aloha's meaning) or `delta` (`delta_target`).
        reward: `sparse` (gym_aloha's level), `shaped` (the guide's) or `dense`.
        image_height: height of the pixels, 1..480.
        image_width: width of the pixels, 1..640.
        crop: (top, left, height, width) in gym_aloha's 480x640 frame, resized to the image; the whole frame if None.
        renderer: `egl` (OpenGL), `warp` (ray tracing on JAX's device), or `auto`: where the worlds are, else what works here.
            Or one that is there already, to be shared.
        render_quality: `fast` (for training), `shadows`, or `exact` (gym_aloha's shadows and antialiasing).
        autoreset: whether an ended episode is followed by a new one in the same step.
        episode_length: control steps after which an episode is truncated.
        start_states: where episodes after the first start: as the `task` does, or a `start_share` of them in states of the
            scripted `expert` or in states that were reached before (`archive`).
        start_share: see `start_states`.
        seed: of the expert's episodes.
        observe_target: whether pixels come with the control targets as well.
        history: control steps that are looked back: pixels come with what was known so many steps ago as well, which is the joint
            positions (`pixels_agent_pos`) or the control targets (`pixels`).
        shaping: what the dense reward asks beyond an insertion.
        start_range: by how much the task's starts exceed gym_aloha's.
        camera_shift: metres, along x and y, by which the camera may be off its place, each episode anew.
        action_delay: share of the episodes in which actions take effect one control step late.

    Raises:
        ValueError: an argument is not one of its choices.
    """
    named = {"task": task, "engine": engine, "impl": impl, "physics": physics, "obs": obs, "action": action, "reward": reward}
    named |= {"render_quality": render_quality, "start_states": start_states}
    named |= {"renderer": renderer} if isinstance(renderer, str) else {}
    hints = typing.get_type_hints(Config)
    for name, choice in named.items():
        if choice not in (allowed := typing.get_args(hints[name])):
            raise ValueError(f"{name} is one of {', '.join(allowed)}; not {choice!r}")
    start_range = start_range or StartRange()
    limits = (
        ("num_envs", num_envs, 1, MAX_COUNT),
        ("episode_length", episode_length, 1, MAX_COUNT),
        ("image_height", image_height, 1, FRAME_SHAPE[0]),
        ("image_width", image_width, 1, FRAME_SHAPE[1]),
        ("start_share", start_share, 0, 1),
        ("action_delay", action_delay, 0, 1),
        ("camera_shift", camera_shift, 0, MAX_CAMERA_SHIFT),  # metres
        ("start_range.yaw", start_range.yaw, 0, math.pi),
        ("start_range.shift", start_range.shift, 0, MAX_START_SHIFT),  # metres
        *(("history", lag, 1, MAX_LAG) for lag in history),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise ValueError(f"{name} lies in {low}..{high}, not {value}")
    for name, asked in (("history", history), ("observe_target", observe_target), ("camera_shift", camera_shift)):
        if asked and obs == "state":
            raise ValueError(f"{name} needs pixels: the state holds all that is to be known")
    if obs != "state" and isinstance(renderer, str):
        on_gpu = engine == "mjx" and jax.default_backend() == "gpu"
        renderer = make_renderer(renderer, task, image_height, image_width, crop, quality=render_quality, on_gpu=on_gpu)
    return Env(
        make_engine("c" if engine == "auto" else engine, task, physics, impl),
        task,
        num_envs,
        None if isinstance(renderer, str) or obs == "state" else renderer,
        obs=obs,
        action=action,
        reward=reward,
        autoreset=autoreset,
        episode_length=episode_length,
        start_states=start_states,
        start_share=start_share,
        seed=seed,
        observe_target=observe_target,
        history=history,
        shaping=shaping,
        start_range=start_range,
        camera_shift=camera_shift,
        action_delay=action_delay,
    )


def make_from_config(
    config: Config, num_envs: int | None = None, *, autoreset: bool = True, renderer: Renderer | None = None
) -> Env:
    """The environment that a run's configuration describes; `renderer` is another one's, to be shared."""
    return make(
        config.task,
        num_envs or config.n_envs,
        engine=config.engine,
        impl=config.impl,
        physics=config.physics,
        obs=config.obs,
        action=config.action,
        reward=config.reward,
        image_height=config.image_height,
        image_width=config.image_width,
        crop=config.crop,
        renderer=renderer or config.renderer,
        render_quality=config.render_quality,
        autoreset=autoreset,
        episode_length=config.episode_length,
        start_states=config.start_states if autoreset else "task",
        start_share=config.start_share,
        seed=config.seed,
        observe_target=config.observe_target,
        history=config.history,
        shaping=Shaping.of(config),
        start_range=StartRange.of(config) if autoreset else None,
        camera_shift=config.camera_shift if autoreset else 0.0,
        action_delay=config.action_delay if autoreset else 0.0,
    )
