"""Kills a training at random moments, inside saves too, and holds what is left behind to its promises.

uv run -m benchmarks.kill                          # 100 moments by freezing, 20 of them finished, and 10 real kills
uv run -m benchmarks.kill --freezes 0 --kills 100  # real kills alone: as many starts of train.py

What SIGKILL leaves on the disk is what is there at that instant, for everything not yet written dies with the process. So most
moments are taken by freezing one training (SIGSTOP), copying its directory and letting it go on: a kill without the restart.
After each: the newest checkpoint and best_model load, digest and all, every directory that looks like a checkpoint is complete,
and best_model, once there, is always there. Those that are finished, and the run that was really killed, must end in the same
bits as the run that was left in peace: parameters, optimizer, worlds, keys, best_model, and every row of its records.
"""

import dataclasses
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import psutil
import tyro

from aloha_jax import checkpoints, run
from aloha_jax.config import Config
from aloha_jax.env import make_from_config
from tests.crash import assert_same_run, require_whole, start_training

ARGS = (
    *("--preset", "smoke", "--device", "cpu", "--obs", "state", "--episode-length", "20", "--final-eval-episodes", "0"),
    *("--checkpoint-freq", "64", "--eval-freq", "256", "--keep-period", "640"),
)
UNDER_WAY = ("checkpoints/*.orbax-checkpoint-tmp*", "checkpoints/.deleted/*", ".best_model.new", ".final_model.new", ".*.part")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """How often."""

    freezes: int = 100
    """Moments taken by freezing."""
    finish: int = 20
    """How many of those are finished and compared, evenly spread."""
    kills: int = 10
    """Real kills of another run, each followed by a resume."""
    updates: int = 60
    """Length of the run; a checkpoint after every update."""
    seed: int = 0
    """Of the moments."""


class Tally(Counter[str]):
    """Counts by name; prints as lines."""

    def __str__(self) -> str:
        return "\n".join(f"{count:6d}  {name}" for name, count in self.items())


def under_way(directory: Path) -> list[str]:
    """What is half done in a run directory."""
    return [pattern for pattern in UNDER_WAY if any(directory.glob(pattern))]


def check(directory: Path, had_best_model: bool, tally: Tally) -> bool:
    """Hold a killed run to its promises; returns whether it has a best_model."""
    tally["moments checked"] += 1
    for pattern in under_way(directory):
        tally[f"of these while {pattern} existed"] += 1
    require_whole(directory)
    has_best_model = (directory / "best_model").exists()
    assert has_best_model or not had_best_model, "best_model is gone"
    if checkpoints.latest_checkpoint(directory) is None:
        tally["of these before the first checkpoint"] += 1
    return has_best_model


def wait_for_a_moment(directory: Path, process: subprocess.Popen[str], rng: random.Random, longest: float) -> None:
    """Until a random moment, or (every other time) one just after a save has begun."""
    time.sleep(rng.uniform(0, longest))
    if rng.random() < 0.5:
        while process.poll() is None and not under_way(directory):
            pass
        time.sleep(rng.uniform(0, 0.03))


def freeze_often(flags: Flags, directory: Path, copies: Path, rng: random.Random, tally: Tally) -> list[Path]:
    """Train in one go, taking copies at random moments; returns those from which `--resume` can go on."""
    process = start_training(*ARGS, "--total-timesteps", str(64 * flags.updates), "--log-dir", str(directory))
    while process.poll() is None and not (directory / "eval" / "evaluations.csv").exists():
        time.sleep(0.05)  # Python, JAX and the compiler start: nothing is written yet
    resumable, had_best_model = [], False
    for i in range(flags.freezes):
        wait_for_a_moment(directory, process, rng, longest=0.2)
        if process.poll() is not None:
            tally["freezes for which the run was too short"] = flags.freezes - i
            break
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        copy = Path(shutil.copytree(directory, copies / str(i)))
        had_best_model = check(copy, had_best_model, tally)
        if checkpoints.latest_checkpoint(copy) is not None:
            resumable.append(copy)
        process.send_signal(signal.SIGCONT)
        if i % 10 == 9:
            print(f"{i + 1} moments", flush=True)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return resumable


class Finisher:
    """Resumes runs of one configuration in this process, compiling once."""

    def __init__(self, directory: Path):
        self._config = Config.load(directory / "config.json")
        self._env = make_from_config(self._config)
        self._compiled: tuple | None = None

    def __call__(self, directory: Path) -> None:
        config = run.resumed_config(directory, dataclasses.replace(self._config, resume=str(directory)), set())
        resumed = run.Run(config, directory, resume=True, quiet=True, env=self._env)
        if self._compiled:
            resumed.train_step, resumed.evaluator = self._compiled
        self._compiled = resumed.train_step, resumed.evaluator
        resumed.train()
        resumed.close()


def kill_often(flags: Flags, directory: Path, rng: random.Random, tally: Tally) -> None:
    """Start, kill, resume, until it was killed `flags.kills` times; then let it finish."""
    fresh = [*ARGS, "--total-timesteps", str(64 * flags.updates), "--log-dir", str(directory), "--overwrite"]
    had_best_model = False
    for _ in range(flags.kills):
        resumable = checkpoints.latest_checkpoint(directory) is not None
        process = start_training(*(["--resume", str(directory)] if resumable else fresh))
        newest = directory / "eval" / "evaluations.csv"
        written = newest.stat().st_mtime_ns if newest.exists() else 0
        while process.poll() is None and not (newest.exists() and newest.stat().st_mtime_ns > written):
            if rng.random() < 0.001:  # now and then while it starts
                break
            time.sleep(0.02)
        wait_for_a_moment(directory, process, rng, longest=1.0)
        process.kill()
        _, errors = process.communicate()
        tally[{0: "kills that came too late", -9: "real kills"}.get(process.returncode, f"ended by itself: {errors}")] += 1
        had_best_model = check(directory, had_best_model and resumable, tally)
    process = start_training(*(["--resume", str(directory)] if checkpoints.latest_checkpoint(directory) else fresh))
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def main(flags: Flags) -> None:
    rng, tally = random.Random(flags.seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        whole = root / "whole"
        copies = freeze_often(flags, whole, root / "copies", rng, tally)
        print(tally, flush=True)
        finish = Finisher(whole)
        for copy in copies[:: max(1, len(copies) // max(1, flags.finish))][: flags.finish]:
            finish(copy)
            assert_same_run(copy, whole)
            tally["of these finished, to the same bits"] += 1
            shutil.rmtree(copy)
        if flags.kills:
            kill_often(flags, root / "killed", rng, tally)
            assert_same_run(root / "killed", whole)
            tally["runs killed again and again that ended in the same bits"] += 1
        print(tally)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
