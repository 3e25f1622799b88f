"""How far off the state is that a policy from pixels predicts, and acts on (`--state-coef`), in the steps that hold both objects.

And, with --told, how often it inserts if it is told the state instead: what then fails does not fail for want of seeing.

uv run -m benchmarks.prediction --model-path pretrained/insertion-pixels-robust --only "as it is" friction
uv run -m benchmarks.prediction --model-path pretrained/insertion-pixels-robust --only "friction x 2" --told
"""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from aloha_jax import checkpoints, cli
from aloha_jax.conditions import Condition, OurWorlds
from aloha_jax.config import ConfigError
from aloha_jax.env import EPISODE_LENGTH, EnvState
from aloha_jax.evaluation import wilson_interval
from aloha_jax.factory import make_from_config
from aloha_jax.networks import as_inputs, normalize_inputs
from aloha_jax.policy import Policy, clip_action, make_network
from aloha_jax.tasks.insertion import MAX_LEVEL
from benchmarks.robustness import CONDITIONS, VISUAL_CONDITIONS, named

CHUNK = 10  # steps between two looks at whether all episodes have ended
HELD = 0.2  # of a hold, which may count as little as 0.3 (--grip-tolerance)

# Where an arm's view of `Insertion.features` has the fingertips, its object's position and the two columns of its rotation,
# whether both fingers hold it, and from its mating end to the other's.
FINGERTIPS, POSITION, ROTATION, HOLD, TO_OTHER = slice(21, 27), slice(33, 36), slice(36, 42), 57, slice(65, 68)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Whose prediction, and where."""

    model_path: str
    """The policy, with --state-coef and --network mirrored."""
    only: tuple[str, ...] = ("as it is", "friction")
    """Conditions of `benchmarks.robustness` in whose name one of these occurs; all but brightness."""
    told: bool = False
    """The policy acts on the state itself in place of its prediction."""
    n_episodes: int = 64
    """Episodes per condition, in C MuJoCo by the judge's physics, as one batch."""
    seed: int = 8_300_000
    """Of the first episode; the same starts under every condition."""


class Errors(NamedTuple):
    """One per step, arm, and fingertip, if it is of these.

    Attributes:
        fingertips: float[K], from a fingertip to where it was said to be, mm. Joints alone tell where they are.
        position: float[M], likewise of the object, mm.
        axis: float[M], between the object's long axis and what was said of it, degrees.
        to_other: float[M], likewise of the way from its mating end to the other's, mm.
    """

    fingertips: np.ndarray
    position: np.ndarray
    axis: np.ndarray
    to_other: np.ndarray


def errors(predicted: np.ndarray, true: np.ndarray) -> Errors:
    """Of arms' views, float[..., 142] in metres."""
    difference = predicted - true

    def millimetres(part: slice) -> np.ndarray:
        return 1000 * np.linalg.norm(difference[..., part].reshape(-1, 3), axis=-1)

    axes = [x[..., ROTATION][..., ::2].reshape(-1, 3) for x in (predicted, true)]  # its first column
    axes = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in axes]
    angle = np.degrees(np.arccos(np.clip((axes[0] * axes[1]).sum(axis=-1), -1.0, 1.0)))
    return Errors(millimetres(FINGERTIPS), millimetres(POSITION), angle, millimetres(TO_OTHER))


def median_and_most(x: np.ndarray) -> str:
    """What half of them are below, and nine tenths. A mean would tell of the few episodes in which all is lost."""
    return "{:.1f}, {:.1f}".format(*np.quantile(x, (0.5, 0.9))) if x.size else "none held"


def decide(policy: Policy, told: bool, state: EnvState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Actions float32[N, 14], and the state as predicted and as it is, whitened, as each arm sees it, float32[N, 2, 142]."""
    network, predictions = make_network(policy.config), []
    inputs = normalize_inputs(as_inputs(state.obs, state.privileged), policy.stats)
    truth = network.views("privileged", inputs["privileged"])

    def listen(head: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        answer = head(*args, **kwargs)
        if context.module.name != "state_head":
            return answer
        predictions.append(answer)
        return truth if told else answer

    with nn.intercept_methods(listen):
        distribution: Any = network.apply(policy.params, inputs, method="policy")
    return clip_action(policy.config, distribution.mean), predictions[0], truth


def try_under(policy: Policy, condition: Condition, flags: Flags) -> tuple[int, Errors]:
    """How many episodes end in an insertion, and the errors."""
    config = dataclasses.replace(
        policy.config, engine="c", impl="auto", physics="exact", reward="sparse", episode_length=EPISODE_LENGTH
    )
    worlds = OurWorlds([condition])
    env = make_from_config(config, flags.n_episodes, autoreset=False, engine=worlds.engine(config.task, config.physics))
    seeds = range(flags.seed, flags.seed + flags.n_episodes)
    starts = np.stack([condition.start(env.task.start_from_seed(seed), seed) for seed in seeds]).astype(np.float32)

    def step(state: EnvState, _: None) -> tuple[EnvState, Any]:
        action, predicted, true = decide(policy, flags.told, state)
        state = env.step(state, action)
        return state, (state.level, state.done, predicted, true)

    steps = jax.jit(lambda state: jax.lax.scan(step, state, length=CHUNK))

    chunks, ended = [], np.zeros(flags.n_episodes, bool)
    with contextlib.closing(env):
        state = jax.jit(env.reset_from)(starts, domain=worlds.domain([condition] * flags.n_episodes, seeds))
        while not ended.all():
            state, chunk = steps(state)
            chunks.append(jax.device_get(chunk))
            ended |= chunks[-1][1].any(axis=0)
    level, done, predicted, true = map(np.concatenate, zip(*chunks, strict=True))
    running = np.cumsum(done, axis=0) - done == 0
    predicted, true = (np.asarray(policy.stats["privileged"].denormalize(jnp.asarray(x))) for x in (predicted, true))
    held = running & (true[..., HOLD] > HELD).all(axis=-1)
    return int((running & (level == MAX_LEVEL)).any(axis=0).sum()), errors(predicted[held], true[held])


def main(flags: Flags) -> None:
    """Print a row per condition."""
    policy = checkpoints.load_policy(flags.model_path)
    cli.require_episodes(flags.n_episodes, flags.seed, 1)
    config = policy.config
    if not config.state_coef or config.network != "mirrored" or not config.normalize_obs:
        raise ConfigError(f"{flags.model_path}: predicts no state (--state-coef), or not by a mirrored network that whitens")
    known = CONDITIONS | VISUAL_CONDITIONS
    tried = named({name: condition for name, condition in known.items() if condition.brightness == 1.0}, flags.only)
    print("Errors: of half the steps, and of nine tenths.")
    print("| condition | success | fingertips, mm | object, mm | its axis, ° | to the other's end, mm |")
    print("|---" * 6 + "|")
    for name, condition in tried.items():
        inserted, found = try_under(policy, condition, flags)
        low, high = wilson_interval(inserted, flags.n_episodes)
        success = f"{inserted} of {flags.n_episodes} ({low:.0%}..{high:.0%})"
        print(f"| {name} | {success} | {' | '.join(map(median_and_most, found))} |", flush=True)


if __name__ == "__main__":
    with cli.user_errors():
        main(tyro.cli(Flags))
