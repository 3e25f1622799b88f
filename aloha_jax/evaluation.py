"""Policy x simulator -> report. The judge is the original gym_aloha environment: its physics, its frames, its reward."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

# The judge renders; this must be decided before MuJoCo's GL context is loaded.
os.environ.setdefault("MUJOCO_GL", "egl")

import jax
import jax.numpy as jnp
import numpy as np

from aloha_jax import history, quality
from aloha_jax.actions import delta_target, target_limits
from aloha_jax.conditions import NOMINAL, Condition
from aloha_jax.config import Config
from aloha_jax.engines import Physics, make_engine
from aloha_jax.env import EPISODE_LENGTH, Env, EnvState, make_from_config
from aloha_jax.pixels import frame_to_observation, make_renderer
from aloha_jax.pixels.egl import gl_renderer_string
from aloha_jax.policy import Policy, act
from aloha_jax.tasks import make_task
from aloha_jax.tasks.insertion import Progress
from aloha_jax.video import compose, write_mp4

SIMULATORS = ("gym_aloha", "c", "mjx")
NUM_LEVELS = 4


# --- Reports -----------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
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
        """Write as JSON; the file appears, or is replaced, once it is complete."""
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


def summarize(rollouts: list[Rollout], simulator: str) -> Report:
    """The report on some episodes."""
    best = np.array([r.levels.max(initial=0) for r in rollouts])
    qualities = [quality.measure(r.qpos) if r.levels.max(initial=0) == NUM_LEVELS else None for r in rollouts]
    returns = np.array([r.levels.sum() for r in rollouts])
    episodes = [
        {
            "seed": r.seed,
            "return": int(r.levels.sum()),
            "max_level": int(r.levels.max(initial=0)),
            "levels": {str(k): int(np.argmax(r.levels >= k)) + 1 for k in range(1, NUM_LEVELS + 1) if (r.levels >= k).any()},
            "length": len(r.levels),
            **({} if q is None else {"clean": q.clean} | {name: round(x, 2) for name, x in q._asdict().items()}),
        }
        for r, q in zip(rollouts, qualities, strict=True)
    ]
    successes = int((best == NUM_LEVELS).sum())
    return Report(
        simulator=simulator,
        n_episodes=len(rollouts),
        success_rate=successes / len(rollouts),
        success_interval=wilson_interval(successes, len(rollouts)),
        mean_reward=float(returns.mean()),
        mean_return=float(returns.mean()),
        mean_max_reward=float(best.mean()),
        mean_length=float(np.mean([len(r.levels) for r in rollouts])),
        clean_rate=sum(q is not None and q.clean for q in qualities) / len(rollouts),
        mean_jerk=float(np.mean([quality.jerk(r.targets) for r in rollouts])),
        level_rates={str(k): float((best >= k).mean()) for k in range(1, NUM_LEVELS + 1)},
        episodes=episodes,
    )


# --- In our engines ----------------------------------------------------------------------------------------------------------


class EngineEvaluator:
    """Runs a fixed set of seeds as one batch, again and again with new parameters; compiled once."""

    def __init__(self, config: Config, seeds: list[int], env: Env | None = None):
        self._seeds = seeds
        self.env = env or make_from_config(config, len(seeds), autoreset=False)
        self._starts = np.stack([self.env.task.start_from_seed(seed) for seed in seeds]).astype(np.float32)
        self._run = jax.jit(functools.partial(_engine_episodes, config, self.env))

    def __call__(self, policy: Policy, key: jax.Array | None = None) -> tuple[list[Rollout], np.ndarray]:
        """The episodes, and each one's sum of the environment's own (training) rewards, float[N]."""
        levels, qpos, targets, rewards, done = jax.device_get(self._run(policy.params, policy.stats, self._starts, key))
        ends = np.where(done.any(axis=0), done.argmax(axis=0) + 1, len(done))
        rollouts = [
            Rollout(seed, levels[:end, i], qpos[:end, i], targets[:end, i])
            for i, (seed, end) in enumerate(zip(self._seeds, ends, strict=True))
        ]
        return rollouts, np.array([rewards[:end, i].sum() for i, end in enumerate(ends)])


def _engine_episodes(config: Config, env: Env, params: Any, stats: Any, starts: jax.Array, key: jax.Array | None) -> Any:
    """Levels [T, N], positions [T, N, 30], targets [T, N, 14], rewards and ends [T, N] of one episode per world."""

    def step(state: EnvState, key: jax.Array | None) -> Any:
        state = env.step(state, act(config, params, stats, state.obs, key))
        return state, (state.level, state.final_qpos, state.target, state.reward, state.done)

    keys = None if key is None else jax.random.split(key, env.episode_length)
    return jax.lax.scan(step, env.reset_from(starts), keys, length=env.episode_length)[1]


# --- In gym_aloha ------------------------------------------------------------------------------------------------------------


class Controller:
    """Drives gym_aloha with a policy: observations in the policy's form, actions in gym_aloha's."""

    def __init__(self, policy: Policy):
        self._policy = policy
        config = policy.config
        self._exact = make_engine("c", config.task, "exact")
        self._task = make_task(config.task, self._exact.scene)
        low, high = target_limits(self._exact)
        self._delta_target = jax.jit(lambda target, pos, action: delta_target(target, pos, action, low, high))
        self._features = jax.jit(self._privileged)
        self._remember = jax.jit(
            lambda memory, pos: history.start(pos, config.history) if memory is None else history.push(memory, pos)
        )

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        physics = self._exact.reset(jnp.asarray(qpos[None], jnp.float32), jnp.asarray(qvel[None], jnp.float32))
        self._target = self._task.agent_pos(physics)
        self._progress = self._task.start_progress(physics)
        self._clock = 0
        self._memory: jax.Array | None = None

    @property
    def hold(self) -> np.ndarray:
        """The absolute action float32[14] that keeps the last targets."""
        return np.asarray(self._target[0])

    def __call__(self, observation: dict[str, Any], qpos: np.ndarray, qvel: np.ndarray, key: jax.Array | None) -> np.ndarray:
        """The absolute action float32[14] for gym_aloha's observation; `qpos` and `qvel` serve policies that see the state."""
        config = self._policy.config
        agent_pos = jnp.asarray(observation["agent_pos"], jnp.float32)[None]
        if config.obs == "state":
            obs: Any
            obs, self._progress = self._features(qpos[None], qvel[None], self._target, self._progress, self._clock)
        else:
            pixels = frame_to_observation(observation["pixels"]["top"], config.image_height, config.image_width, config.crop)
            obs = pixels[None] if config.obs == "pixels" else {"pixels": pixels[None], "agent_pos": agent_pos}
            if config.obs == "pixels_agent_pos" and config.observe_target:
                obs["target"] = self._target
            if config.obs == "pixels_agent_pos" and config.history:
                self._memory = self._remember(self._memory, agent_pos)
                obs["history"] = history.recall(self._memory, config.history)
        action = self._policy.act(obs, key)
        self._target = self._delta_target(self._target, agent_pos, action) if config.action == "delta" else action
        self._clock += 1
        return self.hold

    def _privileged(self, qpos: Any, qvel: Any, target: jax.Array, progress: Progress, clock: jax.Array) -> Any:
        physics: Physics = self._exact.reset(jnp.asarray(qpos, jnp.float32), jnp.asarray(qvel, jnp.float32))
        level = self._task.level(physics)
        failed, no_action = jnp.zeros(1, bool), jnp.zeros((1, 14))
        _, after = self._task.dense(physics, progress, level, failed, no_action)
        progress = jax.tree.map(lambda a, b: jnp.where(clock > 0, a, b), after, progress)
        return self._task.features(physics, target, progress), progress


def require_judge() -> None:
    """Raises `RendererUnavailable` if gym_aloha cannot run here: it wants OpenGL even if nobody looks."""
    gl_renderer_string()


def gym_aloha_episodes(
    policy: Policy, seeds: list[int], stochastic: bool = False, keep_frames: int = 0, condition: Condition = NOMINAL
) -> Iterator[Rollout]:
    """Episodes in `gym_aloha/AlohaInsertion-v0`, one after the other; frames are kept of the first `keep_frames`."""
    import gym_aloha  # noqa: F401  (registers the environment)
    import gymnasium

    env: Any = gymnasium.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels_agent_pos", disable_env_checker=True)
    physics, data = env.unwrapped._env.physics, env.unwrapped._env.physics.data
    condition.change_model(physics)
    controller = Controller(policy)
    for i, seed in enumerate(seeds):
        keep = i < keep_frames
        _render_only_what_is_seen(env, needed=keep or policy.config.has_pixels)
        observation, _ = env.reset(seed=seed)
        if condition.yaw or condition.shift:
            start, ctrl = condition.start(data.qpos.copy(), seed), data.ctrl.copy()
            with physics.reset_context():  # which first puts everything into the model's default pose
                data.qpos[:], data.ctrl[:] = start, ctrl
            observation = env.unwrapped._format_raw_obs(env.unwrapped._env.task.get_observation(physics))
        controller.reset(data.qpos, data.qvel)
        late = [controller.hold] * condition.delay
        levels, qpos, targets, frames = [], [], [], []
        done, step = False, 0
        while not done:
            key = jax.random.fold_in(jax.random.key(seed), step) if stochastic else None
            if policy.config.has_pixels:
                observation["pixels"]["top"] = condition.light(observation["pixels"]["top"])
            late.append(controller(observation, data.qpos.copy(), data.qvel.copy(), key))
            action = late.pop(0)
            observation, reward, terminated, truncated, _ = env.step(action)
            done, step = terminated or truncated, step + 1
            levels.append(int(reward))
            qpos.append(data.qpos.copy())
            targets.append(action)
            if keep:
                frames.append(observation["pixels"]["top"])
        yield Rollout(seed, np.array(levels), np.array(qpos), np.array(targets), frames or None)
    env.close()


def _render_only_what_is_seen(env: Any, needed: bool) -> None:
    """gym_aloha renders three cameras at every step and hands out one. Skip the others; the one that counts stays as it is."""
    task = env.unwrapped._env.task

    def get_observation(physics: Any) -> dict[str, Any]:
        top = physics.render(height=480, width=640, camera_id="top") if needed else np.zeros((1, 1, 3), np.uint8)
        return {"qpos": task.get_qpos(physics), "images": {"top": top}}

    task.get_observation = get_observation


# --- The whole of it -----------------------------------------------------------------------------------------------------------


def evaluate(
    policy: Policy,
    simulator: str,
    n_episodes: int,
    seed: int,
    *,
    stochastic: bool = False,
    video: Path | None = None,
    on_episode: Callable[[Rollout], None] = lambda rollout: None,
) -> Report:
    """Evaluate a policy; episode i starts from `seed + i`.

    Args:
        policy: what to evaluate.
        simulator: `gym_aloha`, or our engine `c` or `mjx` under the policy's own physics; 300 steps in each.
        n_episodes: how many episodes.
        seed: of the first one.
        stochastic: sample actions instead of taking their mean.
        video: film the first episode into this mp4.
        on_episode: called as each episode ends.
    """
    seeds = list(range(seed, seed + n_episodes))
    rollouts = []
    if simulator == "gym_aloha" or video is not None:
        require_judge()
    if simulator == "gym_aloha":
        for rollout in gym_aloha_episodes(policy, seeds, stochastic, keep_frames=int(video is not None)):
            on_episode(rollout)
            rollouts.append(rollout)
    else:
        config = dataclasses.replace(policy.config, engine=cast(Any, simulator), reward="sparse", episode_length=EPISODE_LENGTH)
        for start in range(0, n_episodes, 64):
            chunk = seeds[start : start + 64]
            key = jax.random.key(chunk[0]) if stochastic else None
            for rollout in EngineEvaluator(config, chunk)(policy, key)[0]:
                on_episode(rollout)
                rollouts.append(rollout)
    if video is not None:
        film(rollouts[0], policy.config, video)
    return summarize(rollouts, simulator)


def film(rollout: Rollout, config: Config, path: Path) -> None:
    """Write one episode as an mp4; frames that the simulator did not keep are rendered from the joint positions."""
    frames = rollout.frames
    if frames is None:
        with make_renderer("egl", config.task, 480, 640, None, quality="exact") as renderer:
            frames = list(renderer.render(rollout.qpos))
    best = np.maximum.accumulate(rollout.levels)

    def picture(step: int) -> np.ndarray:
        frame = frames[step]
        view = frame_to_observation(frame, config.image_height, config.image_width, config.crop) if config.has_pixels else None
        return compose(frame, view, step + 1, int(rollout.levels[step]), int(best[step]))

    # Hold the last picture for a second, so that one can see how it ended.
    steps = list(range(len(frames))) + [len(frames) - 1] * 50
    write_mp4(path, map(picture, steps))
