"""How alike a policy's grips are: where its fingers hold each object as it lifts it, and how far that shifts on the way.

And what comes of it: how high the peg's tip is over the socket's axis when it comes to the mouth, and how many are inserted then.

uv run -m benchmarks.grips --model-path pretrained/insertion-state-scratch
uv run -m benchmarks.grips --model-path runs/pixels-ppo/final_model --n-episodes 128
"""

import contextlib
import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from aloha_jax import checkpoints, cli
from aloha_jax.config import Config
from aloha_jax.engines import make_engine
from aloha_jax.factory import make_from_config
from aloha_jax.judge import Trajectory
from aloha_jax.policy import Policy
from aloha_jax.scene import HALF_WIDTH
from aloha_jax.tasks import make_task
from aloha_jax.tasks.potentials import MOUTH, Geometry, peg_in_socket
from aloha_jax.trials import AT_ONCE, EngineEvaluator, Trial

ARMS = ("socket", "peg")
STEPS = 120  # of each episode
LATER = (0, 10, 20)  # control steps after an object has left the table
AT_REST, LIFTED = 0.003, 0.01  # metres over where an object lies
IN_HAND = 0.06  # metres from the fingertips' midpoint to the object's centre
AT_MOUTH = MOUTH + 0.006  # metres along the socket's axis
HEIGHTS = (0, 4, 8, 12, 40)  # mm off the socket's axis; 8 are between the peg and the socket's wall


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Whose grips, and how many."""

    model_path: str
    """The policy."""
    n_episodes: int = 64
    """Episodes, in C MuJoCo under the policy's own physics."""
    seed: int = 4_800_000
    """Of the first episode."""


class Grips(NamedTuple):
    """Where an arm's fingertips' midpoint is in its object's frame, and how the hand is turned; per moment of a list.

    Attributes:
        along: float[M], toward the object's mating end, mm from its centre.
        height: float[M], over the object's centre, mm.
        roll: float[M], the closing direction over the object's side's normal, degrees.
        pitch: float[M], how far the hand points down, in the object's frame, degrees.
    """

    along: np.ndarray
    height: np.ndarray
    roll: np.ndarray
    pitch: np.ndarray


def geometry_along(trajectories: list[Trajectory], config: Config) -> Geometry:
    """The episodes' geometry; axes [episode, step, ...]. An episode that has ended stays as it was."""
    engine = make_engine("c", config.task, "exact")
    task = make_task(config.task, engine.scene)
    compute = jax.jit(lambda qpos: task.geometry(engine.reset(qpos, jnp.zeros((STEPS, engine.scene.model.nv)))))
    padded = [np.concatenate([r.qpos, np.repeat(r.qpos[-1:], STEPS - len(r.qpos), axis=0)]) for r in trajectories]
    episodes = [jax.device_get(compute(jnp.asarray(qpos, jnp.float32))) for qpos in padded]
    return jax.tree.map(lambda *x: np.stack(x), *episodes)


def lift_offs(height: np.ndarray, in_hand: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int[N], the step at which each object, having lain on the table, is first `LIFTED` over it in a hand; −1: at none.

    Args:
        height: float[N, T], over where it lies, metres.
        in_hand: bool[N, T]
        lengths: int[N], of the episodes.
    """
    has_lain = np.logical_or.accumulate(height < AT_REST, axis=1)
    lifted = has_lain & (height > LIFTED) & in_hand & (np.arange(height.shape[1]) < lengths[:, None])
    return np.where(lifted.any(axis=1), lifted.argmax(axis=1), -1)


def grips_of(geometry: Geometry, arm: int, lengths: np.ndarray) -> list[Grips]:
    """One arm's grips `LATER` steps after each of its lift-offs, of the objects that are still in the hand and up."""
    position, rotation = geometry.position[:, :, arm], geometry.rotation[:, :, arm]
    offset = np.einsum("ntj,ntji->nti", geometry.fingertips[:, :, arm].mean(axis=2) - position, rotation)
    hand = np.einsum("ntji,ntjk->ntik", rotation, geometry.gripper[:, :, arm])  # its axes in the object's frame
    height = position[..., 2] - HALF_WIDTH[arm]
    in_hand = np.linalg.norm(offset, axis=-1) < IN_HAND
    first = lift_offs(np.asarray(height), in_hand, lengths)
    grips = []
    for later in LATER:
        step = np.minimum(first + later, height.shape[1] - 1)
        episode = np.flatnonzero((first >= 0) & (first + later < lengths))
        episode = episode[(in_hand & (height > LIFTED))[episode, step[episode]]]
        at = episode, step[episode]
        degrees = np.degrees(np.arcsin(np.clip(hand[at], -1.0, 1.0)))
        place = 1000 * offset[at]
        grips.append(Grips(place[:, 0], place[:, 2], degrees[:, 2, 1], -degrees[:, 2, 0]))
    return grips


def heights_at_mouth(geometry: Geometry, lengths: np.ndarray) -> np.ndarray:
    """float[N], how high the peg's tip is over the socket's axis when it first comes to the mouth, mm; NaN if it never does."""
    tip = np.asarray(jax.vmap(peg_in_socket)(geometry)[0])
    near = (tip[..., 0] < AT_MOUTH) & (np.abs(tip[..., 1:]) < HEIGHTS[-1] / 1000).all(axis=-1)
    near &= np.arange(tip.shape[1]) < lengths[:, None]
    first = tip[np.arange(len(tip)), near.argmax(axis=1), 2]
    return np.where(near.any(axis=1), 1000 * first, np.nan)


def median_and_spread(values: np.ndarray) -> str:
    """The median, and 1.48 times the median absolute deviation, which is a normal distribution's standard deviation."""
    median = np.median(values)
    return f"{median:.1f} ± {1.48 * np.median(np.abs(values - median)):.1f}"


def main(flags: Flags) -> None:
    """Print a row per object and moment."""
    policy = checkpoints.load_policy(flags.model_path)
    cli.require_episodes(flags.n_episodes, flags.seed, 1)
    config = dataclasses.replace(policy.config, engine="c", impl="auto", reward="sparse", episode_length=STEPS)
    trials = [Trial(flags.seed + i) for i in range(flags.n_episodes)]
    with contextlib.closing(make_from_config(config, min(flags.n_episodes, AT_ONCE), autoreset=False)) as env:
        outcomes = EngineEvaluator(config, env)(Policy(config, policy.params, policy.stats), trials)
        trajectories = [outcome.trajectory for outcome in outcomes]
    lengths = np.array([len(trajectory.levels) for trajectory in trajectories])
    geometry = geometry_along(trajectories, config)
    inserted = np.array([trajectory.levels.max() == 4 for trajectory in trajectories])
    print(f"inserted in {inserted.mean():.0%} of {len(trajectories)} within {STEPS} steps")
    print("| object | steps after it leaves the table | held | along, mm | height, mm | roll, ° | pitch, ° |")
    print("|---" * 7 + "|")
    for arm, name in enumerate(ARMS):
        for later, grips in zip(LATER, grips_of(geometry, arm, lengths), strict=True):
            held = len(grips.along) / len(trajectories)
            shown = [median_and_spread(x) if len(x) else "" for x in grips]
            print(f"| {name} | {later} | {held:.0%} | {' | '.join(shown)} |")
    print("\n| the tip at the mouth, mm over or under the socket's axis | episodes | inserted |\n|---|---|---|")
    heights = np.abs(heights_at_mouth(geometry, lengths))
    for low, high in itertools.pairwise(HEIGHTS):
        among = (heights >= low) & (heights < high)
        print(f"| {low} to {high} | {among.sum()} | {f'{inserted[among].mean():.0%}' if among.any() else ''} |")


if __name__ == "__main__":
    with cli.user_errors():
        main(tyro.cli(Flags))
