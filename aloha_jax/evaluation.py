"""Policy x simulator -> report. The judge is the original gym_aloha environment: its physics, its frames, its reward."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aloha_jax import atomic, quality
from aloha_jax.conditions import NOMINAL, Condition
from aloha_jax.config import Config
from aloha_jax.judge import Trajectory, gym_aloha_episodes, require_judge
from aloha_jax.pixels import frame_to_observation, make_renderer
from aloha_jax.policy import Policy
from aloha_jax.scene import FRAME_SHAPE
from aloha_jax.tasks.insertion import MAX_LEVEL
from aloha_jax.trials import engine_episodes
from aloha_jax.video import compose, write_mp4
from aloha_jax.visual import Crop

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
        """Write as JSON; see `atomic.write_text`."""
        atomic.write_text(path, self.to_json() + "\n")


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
    on_report: Callable[[Report], None] = lambda report: None,
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
        on_report: called before the film is drawn, which may fail.
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
    report = summarize(trajectories, simulator)
    on_report(report)
    if video is not None:
        film(trajectories[0], policy.config, video, on_gpu=simulator == "mjx" and jax.default_backend() == "gpu")
    return report


def film(trajectory: Trajectory, config: Config, path: Path, condition: Condition = NOMINAL, on_gpu: bool = False) -> None:
    """Write one episode as an mp4; frames that the simulator did not keep are rendered from the joint positions.

    Args:
        trajectory: the episode.
        config: of the policy, whose view is shown beside.
        path: of the film.
        condition: how the world differed from gym_aloha's, whose camera and light frames that are rendered here have.
        on_gpu: whether the worlds were on a GPU, by which the renderer `auto` goes.
    """
    size, crop = (config.image_height, config.image_width), config.crop
    views: Sequence[np.ndarray] | None = None
    if trajectory.frames is not None:
        frames = trajectory.frames
        if config.has_pixels:
            views = [frame_to_observation(frame, *size, crop) for frame in frames]
    else:
        camera = np.tile(condition.camera_shift, (len(trajectory.qpos), 1))
        poses = np.concatenate([trajectory.qpos, camera], axis=1)

        def drawn(name: str, size: tuple[int, int], crop: Crop | None, quality: str) -> list[np.ndarray]:
            with make_renderer(name, config.task, *size, crop, quality=quality, on_gpu=on_gpu) as renderer:
                return [condition.light(picture) for picture in renderer.render(poses)]

        frames = drawn("egl", FRAME_SHAPE, None, "exact")
        if config.has_pixels:  # what it saw was not cut from such frames
            views = drawn(config.renderer, size, crop, config.render_quality)
    best = np.maximum.accumulate(trajectory.levels)

    def picture(step: int) -> np.ndarray:
        view = None if views is None else views[step]
        return compose(frames[step], view, step + 1, int(trajectory.levels[step]), int(best[step]))

    # Hold the last picture for a second, so that one can see how it ended.
    steps = list(range(len(frames))) + [len(frames) - 1] * 50
    write_mp4(path, map(picture, steps))
