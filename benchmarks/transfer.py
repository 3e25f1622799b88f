"""Where a policy loses what it had in training: its success from cheap physics and pictures to gym_aloha's, changed one by one.

uv run -m benchmarks.transfer --model-path pretrained/insertion-pixels --n-episodes 100
uv run -m benchmarks.transfer --model-path runs/gpu/final_model --only warp
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, Literal

import tyro

from aloha_jax import atomic, checkpoints, cli, evaluation
from aloha_jax.config import Config
from aloha_jax.policy import Policy
from benchmarks import robustness

PHYSICS = ("fast", "exact")
PICTURES = (("egl", "fast"), ("egl", "shadows"), ("egl", "exact"), ("warp", "fast"), ("warp", "shadows"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to try, and how often."""

    model_path: str
    """The policy."""
    only: tuple[str, ...] = ()
    """Only rows in whose name one of these occurs, such as `exact physics` or `warp`; by default all."""
    engine: Literal["c", "mjx"] = "c"
    """What physics runs on, where it is not gym_aloha itself."""
    n_episodes: int = 50
    """Episodes per row."""
    num_workers: int = 1
    """Processes that run gym_aloha side by side."""
    seed: int = 4_700_000
    """Of the first episode; the same starts in every row."""
    json: Path | None = None
    """Write the figures to this file."""


def worlds(flags: Flags, config: Config) -> dict[str, Config | None]:
    """The policy's configuration in each world to try it in, by name; None is gym_aloha itself.

    Raises:
        ConfigError: --only names none of them.
    """
    known: dict[str, Config | None] = {}
    for physics, pictures in itertools.product(PHYSICS, PICTURES if config.has_pixels else (None,)):
        world: dict[str, Any] = {"physics": physics}
        if pictures:
            world["renderer"], world["render_quality"] = pictures
        name = ", ".join([f"{physics} physics", *([f"{' '.join(pictures)} pictures"] if pictures else [])])
        # Whichever is the device's: `--impl jax` has no exact physics.
        known[name] = dataclasses.replace(config, engine=flags.engine, impl="auto", **world)
    known["gym_aloha"] = None
    return robustness.named(known, flags.only)


def main(flags: Flags) -> None:
    """Print a row per world."""
    policy = checkpoints.load_policy(flags.model_path)
    tried = worlds(flags, policy.config)
    cli.require_episodes(flags.n_episodes, flags.seed, flags.num_workers)
    if flags.json is not None:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        cli.require_writable("--json", flags.json, in_place=True)
    found = {}
    print("| | success | 95 % interval | clean | steps to success |\n|---|---|---|---|---|", flush=True)
    try:
        for name, config in tried.items():
            simulator = "gym_aloha" if config is None else flags.engine
            there = policy if config is None else Policy(config, policy.params, policy.stats)
            report = evaluation.evaluate(there, simulator, flags.n_episodes, flags.seed, num_workers=flags.num_workers)
            low, high = report.success_interval
            lengths = [episode["length"] for episode in report.episodes if "4" in episode["levels"]]
            mean_length = sum(lengths) / len(lengths) if lengths else None
            found[name] = {
                "success_rate": report.success_rate,
                "success_interval": [low, high],
                "clean_rate": report.clean_rate,
                "mean_steps_to_success": mean_length,
            }
            steps = f"{mean_length:.0f}" if mean_length else ""
            print(
                f"| {name} | {report.success_rate:.0%} | {low:.0%}..{high:.0%} | {report.clean_rate:.0%} | {steps} |", flush=True
            )
    finally:  # what goes wrong does not take with it what is known
        if flags.json is not None and found:
            text = json.dumps({"episodes": flags.n_episodes, "worlds": found}, indent=2)
            atomic.write_text(flags.json, text + "\n")


if __name__ == "__main__":
    with cli.user_errors():
        main(tyro.cli(Flags))
