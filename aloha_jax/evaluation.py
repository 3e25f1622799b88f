"""Policy x simulator -> report. The judge is the original gym_aloha environment: its physics, its frames, its reward."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from aloha_jax import quality
from aloha_jax.conditions import NOMINAL, Condition
from aloha_jax.config import Config
from aloha_jax.env import EPISODE_LENGTH, Env, EnvState
from aloha_jax.factory import make_from_config
from aloha_jax.judge import Trajectory, gym_aloha_episodes, require_judge
from aloha_jax.pixels import frame_to_observation, make_renderer
from aloha_jax.policy import Policy, act
from aloha_jax.tasks.insertion import MAX_LEVEL
from aloha_jax.video import compose, write_mp4

AT_ONCE = 64  # episodes that our engines run as one batch


# --- Reports -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        simulator: where it was done.
        success_rate: share of episodes that reached level 4.
        success_interval: its 95 % Wilson score interval.
        mean_reward: mean over episodes of the sum of rewards (as Stable-Baselines3 reports it); the same as `mean_return`.
        mean_return: see `mean_reward`.
        mean_max_reward: mean over episodes of the highest level reached.
        mean_length: mean number of control steps.
        clean_rate: share of episodes that succeeded cleanly (`quality.Quality.clean`).
        mean_jerk: mean over episodes of `quality.jerk`, rad/s^3.
        level_rates: level "1".."4" -> share of episodes that reached it or a higher one.
        episodes: per episode its seed, return, highest level, the step at which each level was first reached, length, and of
            those that succeeded how well the peg was inserted (`quality.Quality`).
    """

    simulator: str
    n_episodes: int
    success_rate: float
    success_interval: tuple[float, float]
    mean_reward: float
    mean_return: float
    mean_max_reward: float
    mean_length: float
    clean_rate: float
    mean_jerk: float
    level_rates: dict[str, float]
    episodes: list[dict[str, Any]]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def write(self, path: Path) -> None:
        """Write as JSON; the file appears, or is replaced, once it is complete. What is no file, as a terminal, is written to."""
        if path.exists() and not path.is_file():
            path.write_text(self.to_json() + "\n")
            return
        path = path.resolve()  # a link stays one
        unfinished = path.with_name(f".{path.name}.part")
        try:
            unfinished.write_text(self.to_json() + "\n")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); z = 1.96 for 95 %."""
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def summarize(trajectories: list[Trajectory], simulator: str) -> Report:
    """The report on some episodes."""
    best = np.array([r.levels.max(initial=0) for r in trajectories])
    qualities = [quality.measure(r.qpos) if r.levels.max(initial=0) == MAX_LEVEL else None for r in trajectories]
    returns = np.array([r.levels.sum() for r in trajectories])
    episodes = [
        {
            "seed": r.seed,
            "return": int(r.levels.sum()),
            "max_level": int(r.levels.max(initial=0)),
            "levels": {str(k): int(np.argmax(r.levels >= k)) + 1 for k in range(1, MAX_LEVEL + 1) if (r.levels >= k).any()},
            "length": len(r.levels),
            **({} if q is None else {"clean": q.clean} | {name: round(x, 2) for name, x in q._asdict().items()}),
        }
        for r, q in zip(trajectories, qualities, strict=True)
    ]
    successes = int((best == MAX_LEVEL).sum())
    return Report(
        simulator=simulator,
        n_episodes=len(trajectories),
        success_rate=successes / len(trajectories),
        success_interval=wilson_interval(successes, len(trajectories)),
        mean_reward=float(returns.mean()),
        mean_return=float(returns.mean()),
        mean_max_reward=float(best.mean()),
        mean_length=float(np.mean([len(r.levels) for r in trajectories])),
        clean_rate=sum(q is not None and q.clean for q in qualities) / len(trajectories),
        mean_jerk=float(np.mean([quality.jerk(r.targets) for r in trajectories])),
        level_rates={str(k): float((best >= k).mean()) for k in range(1, MAX_LEVEL + 1)},
        episodes=episodes,
    )


# --- In our engines ----------------------------------------------------------------------------------------------------------


class Abandoned(Exception):
    """An evaluation was given up because somebody asked for it."""


class EngineEvaluator:
    """Runs a fixed set of seeds as one batch, again and again with new parameters; compiled once."""

    LONGEST_CHUNK = 8  # steps between two looks at whether to go on; in a few of them a process must be able to end

    def __init__(self, config: Config, seeds: list[int], env: Env | None = None, condition: Condition = NOMINAL):
        self.env = env or make_from_config(config, len(seeds), autoreset=False)
        self._condition = condition
        self.start_from(seeds)
        self._chunk = max(n for n in range(1, self.LONGEST_CHUNK + 1) if self.env.episode_length % n == 0)
        self._reset = jax.jit(self.env.reset_from)
        self._run = jax.jit(functools.partial(_engine_steps, config, self.env, self._chunk))

    def start_from(self, seeds: list[int]) -> None:
        """As many other seeds, from now on."""
        self._seeds = seeds
        starts = [self._condition.start(self.env.task.start_from_seed(seed), seed) for seed in seeds]
        self._starts = np.stack(starts).astype(np.float32)

    def __call__(
        self, policy: Policy, stochastic: bool = False, interrupted: Callable[[], bool] = lambda: False
    ) -> tuple[list[Trajectory], np.ndarray]:
        """The episodes, and each one's sum of the environment's own (training) rewards, float[N].

        Raises:
            Abandoned: `interrupted` said so, which is asked every few steps.
        """
        # Committed to the device, as a training's and a checkpoint's parameters are, and so all that follows from them: else the
        # first chunk would be compiled for itself.
        domain = self._condition.domain(len(self._seeds))
        state, chunks = jax.device_put(self._reset(self._starts, domain=domain), jax.devices()[0]), []
        ended = np.zeros(len(self._seeds), bool)
        keys = _keys_of_steps(self._seeds, self.env.episode_length) if stochastic else None
        for start in range(0, self.env.episode_length, self._chunk):
            if interrupted():
                raise Abandoned
            chunk_keys = None if keys is None else keys[start : start + self._chunk]
            state, chunk = self._run(policy.params, policy.stats, state, chunk_keys)
            chunks.append(jax.device_get(chunk))  # waits for it, lest all of them be under way at once
            ended |= chunks[-1][-1].any(axis=0)
            if ended.all():
                break
        levels, qpos, targets, rewards, done = map(np.concatenate, zip(*chunks, strict=True))
        ends = np.where(done.any(axis=0), done.argmax(axis=0) + 1, len(done))
        trajectories = [
            Trajectory(seed, levels[:end, i], qpos[:end, i], targets[:end, i])
            for i, (seed, end) in enumerate(zip(self._seeds, ends, strict=True))
        ]
        return trajectories, np.array([rewards[:end, i].sum() for i, end in enumerate(ends)])


def _keys_of_steps(seeds: list[int], length: int) -> jax.Array:
    """PRNG keys [length, N], the same as before the judge: an episode's do not depend on those beside it."""
    keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    return jax.vmap(lambda step: jax.vmap(lambda key: jax.random.fold_in(key, step))(keys))(np.arange(length))


def _engine_steps(config: Config, env: Env, length: int, params: Any, stats: Any, state: EnvState, keys: jax.Array | None) -> Any:
    """The next state, and levels [T, N], positions [T, N, 30], targets [T, N, 14], rewards and ends [T, N] of `length` steps."""

    def sampled(obs: Any, key: jax.Array) -> jax.Array:
        return act(config, params, stats, jax.tree.map(lambda x: x[None], obs), key)[0]

    def step(state: EnvState, keys: jax.Array | None) -> Any:
        action = act(config, params, stats, state.obs, None) if keys is None else jax.vmap(sampled)(state.obs, keys)
        state = env.step(state, action)
        return state, (state.level, state.final_qpos, state.target, state.reward, state.done)

    return jax.lax.scan(step, state, keys, length=length)


# --- The whole of it -----------------------------------------------------------------------------------------------------------


def evaluate(
    policy: Policy,
    simulator: str,
    n_episodes: int,
    seed: int,
    *,
    stochastic: bool = False,
    video: Path | None = None,
    num_workers: int = 1,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Report:
    """Evaluate a policy; episode i starts from `seed + i`.

    Args:
        policy: what to evaluate.
        simulator: `gym_aloha`, or our engine `c` or `mjx` under the policy's own physics; 300 steps in each.
        n_episodes: how many episodes.
        seed: of the first one.
        stochastic: sample actions instead of taking their mean.
        video: film the first episode into this mp4.
        num_workers: processes that run gym_aloha side by side; they change nothing but the time it takes.
        on_episode: called as each episode ends.
    """
    seeds = list(range(seed, seed + n_episodes))
    if simulator == "gym_aloha" or video is not None:
        require_judge()
    if simulator == "gym_aloha":
        episodes = gym_aloha_episodes(policy, seeds, stochastic, int(video is not None), num_workers=num_workers)
    else:
        episodes = engine_episodes(policy, simulator, seeds, stochastic)
    trajectories = []
    for trajectory in episodes:
        on_episode(trajectory)
        trajectories.append(trajectory)
    if video is not None:
        film(trajectories[0], policy.config, video)
    return summarize(trajectories, simulator)


def engine_episodes(
    policy: Policy, simulator: str, seeds: list[int], stochastic: bool = False, condition: Condition = NOMINAL
) -> Iterator[Trajectory]:
    """Episodes in one of our engines under the policy's own physics, in the order of the seeds, some at a time.

    Args:
        policy: who acts.
        simulator: `c` or `mjx`.
        seeds: an episode's start is that of gym_aloha.
        stochastic: sample actions instead of taking their mean.
        condition: how the worlds differ, with `c`; one that `is_ours`.
    """
    config = dataclasses.replace(policy.config, engine=cast(Any, simulator), reward="sparse", episode_length=EPISODE_LENGTH)
    size = min(len(seeds), AT_ONCE)
    if condition != NOMINAL and (simulator != "c" or not condition.is_ours):
        raise ValueError(f"{condition} is for --sim {'gym_aloha' if simulator == 'c' else 'c'}")
    engine = None if condition == NOMINAL else condition.engine(config.task, config.physics)
    env = make_from_config(config, size, autoreset=False, engine=engine)
    evaluator = EngineEvaluator(config, seeds[:size], env, condition)
    with contextlib.closing(evaluator.env):
        for start in range(0, len(seeds), size):
            chunk = seeds[start : start + size]
            evaluator.start_from((chunk + seeds)[:size])  # the last chunk is filled up: fewer worlds would be another program
            yield from evaluator(policy, stochastic)[0][: len(chunk)]


def film(trajectory: Trajectory, config: Config, path: Path) -> None:
    """Write one episode as an mp4; frames that the simulator did not keep are rendered from the joint positions."""
    frames = trajectory.frames
    if frames is None:
        with make_renderer("egl", config.task, 480, 640, None, quality="exact") as renderer:
            frames = list(renderer.render(trajectory.qpos))
    best = np.maximum.accumulate(trajectory.levels)

    def picture(step: int) -> np.ndarray:
        frame = frames[step]
        view = frame_to_observation(frame, config.image_height, config.image_width, config.crop) if config.has_pixels else None
        return compose(frame, view, step + 1, int(trajectory.levels[step]), int(best[step]))

    # Hold the last picture for a second, so that one can see how it ended.
    steps = list(range(len(frames))) + [len(frames) - 1] * 50
    write_mp4(path, map(picture, steps))
