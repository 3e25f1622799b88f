"""Runs of `train.py` that are as small as they can be and still do everything; made once, read by several test files.

Once for all of pytest's processes, as pytest-xdist's documentation does it: by a lock on a file in the folder they share.
"""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

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


def small_run(factory: pytest.TempPathFactory, flags: tuple[str, ...]) -> SmallRun:
    """The run that has these flags beside `FLAGS`, made by the first of pytest's processes that asks for it."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    base = factory.getbasetemp() if alone else factory.getbasetemp().parent  # which the processes share
    place = base / ("run-" + hashlib.sha256(repr(flags).encode()).hexdigest()[:16])
    place.mkdir(exist_ok=True)
    directory, told = place / "run", place / "told.json"
    with FileLock(place / "lock"):
        if not told.exists():
            with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
                steps = keep_train_steps(patch)
                train.main([*FLAGS, *flags, "--log-dir", str(directory)])
            told.write_text(json.dumps({"printed": out.getvalue(), "compilations": steps[0].compilations}))
    return SmallRun(directory, **json.loads(told.read_text()))


def keep_train_steps(patch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which every train step made from now on is added."""
    make, made = training.make_train_step, []

    def keeping(*args: Any, **options: Any) -> Any:
        made.append(make(*args, **options))
        return made[-1]

    patch.setattr(training, "make_train_step", keeping)
    return made
