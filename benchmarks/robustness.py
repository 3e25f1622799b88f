"""What a policy can bear: its success in gym_aloha under other start poses, friction, masses, delay, cameras and light.

uv run -m benchmarks.robustness --model-path pretrained/insertion-state --n-episodes 100
uv run -m benchmarks.robustness --model-path runs/insertion --only friction mass --n-episodes 64 --sim c    # sooner
uv run -m benchmarks.robustness --model-path pretrained/insertion-state-robust --only yaw --n-episodes 1 --videos turned
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from aloha_jax import atomic, checkpoints, cli, evaluation, judge, trials
from aloha_jax.conditions import NOMINAL, Condition
from aloha_jax.config import ConfigError
from aloha_jax.policy import Policy

CONDITIONS = {
    "as it is": NOMINAL,
    "start: yaw up to 15 degrees": Condition(yaw=np.radians(15)),
    "start: yaw up to 30 degrees": Condition(yaw=np.radians(30)),
    "start: up to 3 cm outside": Condition(shift=0.03),
    "friction x 2": Condition(friction=2.0),
    "friction x 0.5": Condition(friction=0.5),
    "mass x 2": Condition(mass=2.0),
    "mass x 0.5": Condition(mass=0.5),
    "actions one step late": Condition(delay=1),
}
# A policy that sees pictures does not notice these,
STATE_CONDITIONS = {f"objects seem {mm} mm and {mm} degrees off": Condition(pose_noise=1e-3 * mm) for mm in (2, 4, 6)}
# and one that does not, these.
VISUAL_CONDITIONS = {
    "camera 1 cm along x": Condition(camera_shift=(0.01, 0.0)),
    "camera 1 cm along y": Condition(camera_shift=(0.0, 0.01)),
    "camera 2 cm along x": Condition(camera_shift=(0.02, 0.0)),
    "camera 2 cm along y": Condition(camera_shift=(0.0, 0.02)),
    "brightness x 0.8": Condition(brightness=0.8),
    "brightness x 1.2": Condition(brightness=1.2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to try, and how often."""

    model_path: str
    """The policy."""
    only: tuple[str, ...] = ()
    """Only conditions in whose name one of these occurs, such as `camera`; by default all that the policy can notice."""
    n_episodes: int = 50
    """Episodes per condition."""
    sim: Literal["gym_aloha", "c"] = "gym_aloha"
    """The judge, or C MuJoCo with its physics and the policy's own pictures: sooner, all conditions side by side."""
    num_workers: int = 1
    """Processes that run them side by side."""
    seed: int = 4_000_000
    """Of the first episode; the same starts under every condition."""
    json: Path | None = None
    """Write the figures to this file."""
    videos: Path | None = None
    """Film the first episode under each condition into this folder."""


def conditions(flags: Flags, has_pixels: bool) -> dict[str, Condition]:
    """Those to try.

    Raises:
        ConfigError: --only names none of them.
    """
    known = CONDITIONS | (VISUAL_CONDITIONS if has_pixels else STATE_CONDITIONS)
    return named(known, flags.only)


def named(known: dict[str, Any], only: tuple[str, ...]) -> dict[str, Any]:
    """Those in whose name one of `only` occurs; all if there is none.

    Raises:
        ConfigError: one of `only` occurs nowhere.
    """
    for part in only:
        if not any(part in name for name in known):
            raise ConfigError(f"--only {part}: occurs in none of {'; '.join(known)}")
    return {name: known[name] for name in known if not only or any(part in name for part in only)}


def episodes_of(flags: Flags, policy: Policy, tried: list[Condition]) -> Iterator[judge.Trajectory]:
    """Those of the first condition, then those of the second, and so on."""
    seeds, filmed = list(range(flags.seed, flags.seed + flags.n_episodes)), int(flags.videos is not None)
    if flags.sim == "gym_aloha" or filmed:
        judge.require_judge()
    if flags.sim == "gym_aloha":
        return judge.gym_aloha_episodes(policy, seeds, keep_frames=filmed, conditions=tried, num_workers=flags.num_workers)
    there = Policy(
        dataclasses.replace(policy.config, engine=flags.sim, impl="auto", physics="exact"), policy.params, policy.stats
    )
    return trials.engine_episodes(there, flags.sim, seeds, conditions=tried)


def main(flags: Flags) -> None:
    """Print a row per condition."""
    policy = checkpoints.load_policy(flags.model_path)
    tried = conditions(flags, policy.config.has_pixels)
    cli.require_episodes(flags.n_episodes, flags.seed, flags.num_workers)
    if flags.num_workers > 1 and flags.sim != "gym_aloha":
        raise ConfigError(f"--num-workers is for --sim gym_aloha; {flags.sim} runs its episodes as one batch")
    for path in (flags.videos, flags.json and flags.json.parent):  # before the first episode, not after the last
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    if flags.json is not None:
        cli.require_writable("--json", flags.json, in_place=True)
    found, judged = {}, episodes_of(flags, policy, list(tried.values()))
    print("| condition | success | 95 % interval | clean |\n|---|---|---|---|", flush=True)
    try:
        for name in tried:
            episodes = list(itertools.islice(judged, flags.n_episodes))
            report = evaluation.summarize(episodes, flags.sim)
            low, high = report.success_interval
            found[name] = {"success_rate": report.success_rate, "success_interval": [low, high], "clean_rate": report.clean_rate}
            print(f"| {name} | {report.success_rate:.0%} | {low:.0%}..{high:.0%} | {report.clean_rate:.0%} |", flush=True)
            if flags.videos is not None:
                film = flags.videos / f"{re.sub('[^a-z0-9.]+', '-', name)}.mp4"
                evaluation.film(episodes[0], policy.config, film, tried[name])
    finally:  # what goes wrong does not take with it what is known
        if flags.json is not None and found:
            text = json.dumps({"episodes": flags.n_episodes, "conditions": found}, indent=2)
            atomic.write_text(flags.json, text + "\n")


if __name__ == "__main__":
    with cli.user_errors():
        main(tyro.cli(Flags))
