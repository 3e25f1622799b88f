"""The functional, batched environment: `reset` and `step` are pure functions of `EnvState`, usable under `jit` and `scan`."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aloha_jax import history, starts
from aloha_jax.actions import DELTA_SCALE, delta_target, target_limits
from aloha_jax.engines import Engine, Physics, choose
from aloha_jax.env_state import Domain, EnvState, Episode, Moment, Observation
from aloha_jax.pixels import Renderer
from aloha_jax.tasks import make_task
from aloha_jax.tasks.insertion import Progress, StartRange
from aloha_jax.tasks.potentials import Shaping
from aloha_jax.views import Views

__all__ = ["Env", "EnvState", "Episode", "Observation"]

EPISODE_LENGTH = 300  # control steps; gym_aloha's registered time limit


# Products of matrices as precise as their factors, where a GPU would round those to 10 bits (TF32): a peg is 2 cm wide.
in_float32 = jax.default_matmul_precision("highest")


class Env:
    """N worlds of a task behind `reset` and `step`. Build it with `aloha_jax.make`."""

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
        delay_share: float = 0.0,
        pose_noise: float = 0.0,
    ):
        self.engine, self.renderer, self.num_envs = engine, renderer, num_envs
        self.task = make_task(task_name, engine.scene, shaping, start_range)
        self.obs, self.action, self.reward = obs, action, reward
        self.autoreset, self.episode_length = autoreset, episode_length
        self._views = Views(self.task, obs, renderer, observe_target, history)
        self.lags = self._views.lags
        self.target_low, self.target_high = target_limits(engine)
        self._domain = functools.partial(starts.domain, camera_shift, delay_share, pose_noise)
        self.start_share, self.records = start_share, start_states == "archive"
        self.initial_archive = starts.initial_archive(start_states, engine, self.task, seed)

    def reset(self, key: jax.Array) -> EnvState:
        """Fresh worlds from one PRNG key."""
        keys = jax.random.split(key, self.num_envs)
        keys, start_keys = starts.split(keys)
        return self._start(jax.vmap(self.task.sample_start)(start_keys), keys)

    def reset_from(self, qpos: ArrayLike, key: jax.Array | None = None, domain: Domain | None = None) -> EnvState:
        """Worlds at rest at float[N, 30] joint positions.

        Args:
            qpos: the joint positions.
            key: seeds what is random: what is off in the first episodes, and all of later ones.
            domain: what is off, where worlds do not start anew by themselves.

        Raises:
            ValueError: there are more or fewer positions, or a domain that the next episodes would not have.
        """
        expected = (self.num_envs, self.engine.scene.model.nq)
        if jnp.shape(qpos) != expected:
            raise ValueError(f"reset_from wants qpos of shape {expected}, not {jnp.shape(qpos)}")
        if domain is not None and self.autoreset:
            raise ValueError("reset_from takes a domain with autoreset=False: episodes that follow draw their own")
        keys = jax.random.split(jax.random.key(0) if key is None else key, self.num_envs)
        return self._start(jnp.asarray(qpos, jnp.float32), keys, domain)

    def step(self, state: EnvState, action: ArrayLike) -> EnvState:
        """One control step (0.02 s) with float[N, 14] actions.

        Raises:
            ValueError: they have another shape.
        """
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
        physics = self.engine.step(state.physics, target if late is None else choose(late, state.target, target))
        invalid = ~jnp.isfinite(physics.qpos).all(axis=1) | ~(jnp.abs(physics.qvel) < 1e3).all(axis=1)
        invalid |= ~jnp.isfinite(target).all(axis=1)  # MuJoCo ignores such a control, but it would stay in the observation
        # The last good state ends the episode.
        physics, target = choose(invalid, (state.physics, state.target), (physics, target))
        level = jnp.where(invalid, 0, self.task.level(physics))

        lost = self.task.lost(physics) & (self.reward == "dense")
        terminated = ((level == self.task.num_levels) | lost) & ~invalid
        clock = state.clock + 1
        truncated = ((clock >= self.episode_length) | invalid) & ~terminated
        # An absolute action costs what the change does that it asks for.
        change = action if self.action == "delta" else (action - state.target) / jnp.array(DELTA_SCALE)[None]
        arm_reward, progress = self._reward(state, physics, level, lost, change)
        arm_reward = jnp.where(invalid[:, None], 0.0, arm_reward)
        progress = choose(invalid, state.progress, progress)
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
    def _start(self, qpos: jax.Array, keys: jax.Array, domain: Domain | None = None) -> EnvState:
        num_worlds = qpos.shape[0]
        physics = self.engine.reset(qpos, jnp.zeros((num_worlds, self.engine.scene.model.nv)))
        progress = self.task.start_progress(physics)
        clock = jnp.zeros(num_worlds, jnp.int32)
        target = self.task.agent_pos(physics)
        domain = self._domain(keys) if domain is None else domain
        privileged = self.task.features(physics, target, progress, domain.pose_error)
        memory = history.start(history.known(self.obs, self.task.agent_pos(physics), target), self.lags)
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
        final_privileged = self.task.features(final, state.target, state.progress, state.domain.pose_error)
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
        target, progress, clock, next_task_start, memory, domain = choose(done, fresh, old)
        privileged = self.task.features(physics, target, progress, domain.pose_error)
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
        before = choose(state.done, fresh, state.episode) if self.autoreset else state.episode
        return Episode(before.total_reward + reward, before.length + 1, jnp.maximum(before.best_level, level))
