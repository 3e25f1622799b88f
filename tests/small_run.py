"""Runs of `train.py` that are as small as they can be and still do everything; made once, read by several test files."""

import contextlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import train
from aloha_jax import training

# 4 worlds x 16 steps: 64 environment steps per update. An evaluation and a checkpoint after each.
FLAGS = (
    *("--preset", "smoke", "--device", "cpu", "--episode-length", "20", "--final-eval-episodes", "0"),
    *("--checkpoint-freq", "64", "--eval-freq", "64"),
)
STATE = ("--obs", "state", "--total-timesteps", "192")
PIXELS = ("--obs", "pixels_agent_pos", "--image-height", "24", "--privileged-critic", "--total-timesteps", "128")


class SmallRun(NamedTuple):
    """A finished run.

    Attributes:
        directory: its directory, to be read only.
        printed: what it printed.
        compilations: how often its train step was compiled.
    """

    directory: Path
    printed: str
    compilations: int


_runs: dict[tuple[str, ...], SmallRun] = {}


def small_run(factory: pytest.TempPathFactory, flags: tuple[str, ...]) -> SmallRun:
    """The run that has these flags beside `FLAGS`."""
    if flags not in _runs:
        directory = factory.mktemp("runs") / "run"
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
            steps = keep_train_steps(patch)
            train.main([*FLAGS, *flags, "--log-dir", str(directory)])
        _runs[flags] = SmallRun(directory, out.getvalue(), steps[0].compilations)
    return _runs[flags]


def keep_train_steps(patch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which every train step made from now on is added."""
    make, made = training.make_train_step, []

    def keeping(*args: Any, **options: Any) -> Any:
        made.append(make(*args, **options))
        return made[-1]

    patch.setattr(training, "make_train_step", keeping)
    return made
