"""Pixel PPO, everything counted (physics, rendering, policy, update): ours against Stable-Baselines3 on gym_aloha, in one run.

uv run benchmarks/end_to_end.py --sb3-python .venv-bench/bin/python
"""

import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Literal

import jax
import tyro

from aloha_jax import training
from aloha_jax.config import Config
from aloha_jax.factory import make_from_config
from aloha_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to measure."""

    sb3_python: Path | None = None
    """Interpreter of the environment that has Stable-Baselines3 (benchmarks/README.md); without it, ours alone."""
    size: int = 84
    """Height and width of the observation."""
    network: Literal["guide", "patches"] = "guide"
    """The guide's, or the guide's heads behind the encoder of our `pixels` preset, whose first convolution has no overlap. The
    same for both libraries."""
    updates: int = 10
    """Our updates that are timed, after the first."""
    sb3_updates: int = 2
    """Stable-Baselines3's updates that are timed, after the first."""


def encoder_of(flags: Flags) -> tuple[tuple[tuple[int, int, int], ...], int]:
    """Convolutions and features."""
    preset = PRESETS["guide" if flags.network == "guide" else "pixels"]
    return preset.conv, preset.features_dim


def our_config(flags: Flags) -> Config:
    """Written out, so that no preset's change changes what is measured."""
    conv, features_dim = encoder_of(flags)
    return Config(
        obs="pixels",
        image_height=flags.size,
        image_width=flags.size,
        crop=None,
        network="joint",
        conv=conv,
        features_dim=features_dim,
        hidden_sizes=(256, 256),
        activation="elu",
        action="delta",
        reward="dense",
        episode_length=60,
        n_envs=64,
        n_steps=32,
        batch_size=512,
        n_epochs=4,
    ).validate()


def ours(flags: Flags) -> float:
    """Env steps per second of our PPO with the guide's picture and heads: four epochs of every rollout."""
    env = make_from_config(config := our_config(flags))
    run = training.init_run(config, env)
    train_step = training.make_train_step(config, env)
    run, _ = train_step(run)
    jax.block_until_ready(run.params)
    start = time.perf_counter()
    for _ in range(flags.updates):
        run, metrics = train_step(run)
    jax.block_until_ready((run.params, metrics))
    seconds = time.perf_counter() - start
    assert env.renderer is not None
    env.renderer.close()
    return config.rollout_size * flags.updates / seconds


def stable_baselines(flags: Flags) -> float:
    """Env steps per second of the guide's set-up: two processes, batches of 64, 10 epochs; shorter rollouts change no rate."""
    script = Path(__file__).with_name("sb3_insertion.py")
    conv, features_dim = encoder_of(flags)
    settings = {"size": flags.size, "conv": json.dumps(conv), "features-dim": features_dim, "updates": flags.sb3_updates}
    settings |= {"n-envs": 2, "n-steps": 64, "batch-size": 64, "n-epochs": 10}
    command = [str(flags.sb3_python), str(script), *(f"--{name}={value}" for name, value in settings.items())]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["env_steps_per_second"])


def main(flags: Flags) -> None:
    if flags.sb3_python is not None and shutil.which(flags.sb3_python) is None:
        raise SystemExit(f"error: there is no {flags.sb3_python}: benchmarks/README.md says how to make that environment")
    theirs = None if flags.sb3_python is None else stable_baselines(flags)
    our_rate = ours(flags)
    print(f"| pixel PPO at {flags.size}x{flags.size}, {flags.network} network | env steps/s | ratio |\n|---|---|---|")
    if theirs is not None:
        print(f"| Stable-Baselines3 on gym_aloha | {theirs:.1f} | 1 |")
    print(f"| aloha_jax, C engine, EGL | {our_rate:.0f} | {f'{our_rate / theirs:.0f}' if theirs else ''} |")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
