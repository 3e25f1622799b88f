"""Episodes in our own engines: as many at once as there are worlds, and where some have ended the next ones begin."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from aloha_jax.conditions import NOMINAL, Condition, OurWorlds
from aloha_jax.config import Config
from aloha_jax.engines import choose
from aloha_jax.engines.c import CEngine
from aloha_jax.env import EPISODE_LENGTH, Env, EnvState
from aloha_jax.env_state import Domain, Observation
from aloha_jax.factory import make_from_config
from aloha_jax.judge import Trajectory
from aloha_jax.networks import as_inputs
from aloha_jax.policy import Policy, act

AT_ONCE = 64  # episodes that are run side by side


class Abandoned(Exception):
    """An evaluation was given up because somebody asked for it."""


class Trial(NamedTuple):
    """An episode to be run.

    Attributes:
        seed: it starts where gym_aloha's episode of this seed does.
        condition: how its world differs.
    """

    seed: int
    condition: Condition = NOMINAL


class Outcome(NamedTuple):
    """An episode that was run.

    Attributes:
        trajectory: what happened.
        reward: sum of the environment's own (training) rewards.
    """

    trajectory: Trajectory
    reward: float


class Steps(NamedTuple):
    """Some steps of all worlds [T, N, …], or of one [T, …]."""

    level: Any
    qpos: Any
    target: Any
    reward: Any
    done: Any


class EngineEvaluator:
    """Runs trials, again and again with new parameters; compiled once."""

    LONGEST_CHUNK = 8  # steps between two looks at whether to go on; in a few of them a process must be able to end
    FEW = 8  # one world in so many has to be idle before new episodes begin, for which all of them are drawn once more

    def __init__(self, config: Config, env: Env, worlds: OurWorlds | None = None):
        """Nothing is run yet.

        Args:
            config: the policy's.
            env: where; with `autoreset=False`. Closed by whoever made it.
            worlds: the conditions that trials may have, if there are others than gym_aloha's; then `env` has the engine of these.
        """
        self._worlds = worlds or OurWorlds([NOMINAL])
        self._env, self._num_worlds = env, env.num_envs
        chunk = max(n for n in range(1, self.LONGEST_CHUNK + 1) if env.episode_length % n == 0)
        self._begin = jax.jit(functools.partial(_begin, env))
        self._replace = jax.jit(_replace)
        self._run = jax.jit(functools.partial(_run, config, env, chunk))

    def __call__(
        self,
        policy: Policy,
        trials: Sequence[Trial],
        stochastic: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Outcome]:
        """Their outcomes in this order, each once it and those before it are there.

        Raises:
            Abandoned: `interrupted` said so, which is asked every few steps.
        """
        outcomes: dict[int, Outcome] = {}
        following = 0
        for number, outcome in self._as_they_end(policy, trials, stochastic, interrupted):
            outcomes[number] = outcome
            while following in outcomes:
                yield outcomes.pop(following)
                following += 1

    def _as_they_end(
        self, policy: Policy, trials: Sequence[Trial], stochastic: bool, interrupted: Callable[[], bool]
    ) -> Iterator[tuple[int, Outcome]]:
        """Numbers of trials, and what came of them."""
        waiting = collections.deque(range(len(trials)))
        # What each world does or did last; at first, where there are fewer trials than worlds, what another does.
        of_world = [trials[0]] * self._num_worlds
        running: dict[int, int] = {}  # world -> number
        pieces: dict[int, list[Steps]] = {}
        state: EnvState | None = None
        while waiting or running:
            idle = [world for world in range(self._num_worlds) if world not in running]
            if waiting and len(idle) * self.FEW >= self._num_worlds:
                fresh = np.zeros(self._num_worlds, bool)
                while idle and waiting:
                    world, number = idle.pop(0), waiting.popleft()
                    running[world], pieces[world], of_world[world], fresh[world] = number, [], trials[number], True
                state = self._with_fresh(state, of_world, fresh)
            if interrupted():
                raise Abandoned
            keys = jax.vmap(jax.random.key)(np.array([trial.seed for trial in of_world], np.uint32)) if stochastic else None
            light = self._worlds.light([trial.condition for trial in of_world])
            state, steps = self._run(policy.params, policy.stats, state, keys, light)
            steps = jax.device_get(steps)  # waits for it, lest all of them be under way at once
            for world, number in list(running.items()):
                pieces[world].append(jax.tree.map(lambda x, world=world: x[:, world], steps))
                if pieces[world][-1].done.any():
                    del running[world]
                    yield number, _outcome(trials[number].seed, pieces.pop(world))

    def _with_fresh(self, state: EnvState | None, of_world: list[Trial], fresh: np.ndarray) -> EnvState:
        """These worlds, of which some begin anew."""
        starts = [trial.condition.start(self._env.task.start_from_seed(trial.seed), trial.seed) for trial in of_world]
        conditions = [trial.condition for trial in of_world]
        models = self._worlds.models(conditions)
        domain = self._worlds.domain(conditions, [trial.seed for trial in of_world])
        begun = self._begin(np.stack(starts).astype(np.float32), domain, models)
        # Committed to the device, as a training's and a checkpoint's parameters are, and so all that follows from them: else the
        # first chunk would be compiled for itself.
        begun = jax.device_put(begun, jax.devices()[0])
        return begun if state is None else self._replace(fresh, begun, state)


def _begin(env: Env, starts: jax.Array, domain: Domain, models: jax.Array) -> EnvState:
    state = env.reset_from(starts, domain=domain)
    return state._replace(physics=env.engine.under_models(state.physics, models)) if isinstance(env.engine, CEngine) else state


def _replace(fresh: jax.Array, begun: EnvState, state: EnvState) -> EnvState:
    names = [name for name in EnvState._fields if name != "key"]  # without autoreset nobody draws from that
    return state._replace(**{name: choose(fresh, getattr(begun, name), getattr(state, name)) for name in names})


def lit(obs: Observation, light: jax.Array | None) -> dict[str, jax.Array]:
    """As a policy's inputs, the pictures brighter or darker by factors float32[N]."""
    inputs = as_inputs(obs)
    if light is None or "pixels" not in inputs:
        return inputs
    pixels = jnp.clip(light[:, None, None, None] * inputs["pixels"], 0, 255).astype(jnp.uint8)
    return {**inputs, "pixels": pixels}


def _run(
    config: Config,
    env: Env,
    length: int,
    params: Any,
    stats: Any,
    state: EnvState,
    keys: jax.Array | None,
    light: jax.Array | None,
) -> tuple[EnvState, Steps]:
    """The next state, and `length` steps on the way there; with `keys` [N] of the episodes, of sampled actions."""

    def sampled(obs: Any, key: jax.Array, clock: jax.Array) -> jax.Array:
        # By its seed and its step alone, as before the judge: not by which episodes are run beside it.
        return act(config, params, stats, jax.tree.map(lambda x: x[None], obs), jax.random.fold_in(key, clock))[0]

    def step(state: EnvState, _: None) -> tuple[EnvState, Steps]:
        obs = lit(state.obs, light)
        action = act(config, params, stats, obs, None) if keys is None else jax.vmap(sampled)(obs, keys, state.clock)
        state = env.step(state, action)
        return state, Steps(state.level, state.final_qpos, state.target, state.reward, state.done)

    return jax.lax.scan(step, state, length=length)


def _outcome(seed: int, pieces: list[Steps]) -> Outcome:
    steps = jax.tree.map(lambda *x: np.concatenate(x), *pieces)
    episode: Steps = jax.tree.map(lambda x: x[: steps.done.argmax() + 1], steps)
    return Outcome(Trajectory(seed, episode.level, episode.qpos, episode.target), float(episode.reward.sum()))


def engine_episodes(
    policy: Policy,
    simulator: str,
    seeds: Sequence[int],
    stochastic: bool = False,
    conditions: Sequence[Condition] = (NOMINAL,),
) -> Iterator[Trajectory]:
    """Episodes in one of our engines under the policy's own physics: for each condition in turn, in the order of the seeds.

    Args:
        policy: who acts.
        simulator: `c` or `mjx`.
        seeds: an episode's start is that of gym_aloha.
        stochastic: sample actions instead of taking their mean.
        conditions: how worlds differ, with `c`; those that are `Condition.is_ours`.
    """
    for condition in conditions:
        if condition != NOMINAL and (simulator != "c" or not condition.is_ours):
            raise ValueError(f"{condition} is for --sim {'gym_aloha' if simulator == 'c' else 'c'}")
    config = dataclasses.replace(policy.config, engine=cast(Any, simulator), reward="sparse", episode_length=EPISODE_LENGTH)
    trials = [Trial(seed, condition) for condition in conditions for seed in seeds]
    worlds = OurWorlds(conditions)
    engine = worlds.engine(config.task, config.physics) if simulator == "c" else None
    env = make_from_config(config, min(len(trials), AT_ONCE), autoreset=False, engine=engine)
    with contextlib.closing(env):
        for outcome in EngineEvaluator(config, env, worlds)(policy, trials, stochastic):
            yield outcome.trajectory
