"""Kills a training at random moments, inside saves too, and holds what is left behind to its promises.

uv run -m benchmarks.kill                                                # 100 moments by freezing, 20 of them finished
uv run -m benchmarks.kill --freezes 0 --kills 100                        # real kills: as many starts of train.py
uv run -m benchmarks.kill --freezes 0 --kills 10 --obs pixels_agent_pos  # the same from pixels

What SIGKILL leaves on the disk is what is there at that instant, for everything not yet written dies with the process. So many
moments are taken cheaply by freezing one training (SIGSTOP), copying its directory and letting it go on.
After each: the newest checkpoint and best_model load, digest and all, every directory that looks like a checkpoint is complete,
and best_model, once there, is always there. Those that are finished, and the run that was really killed, must end in the same
bits as the run that was left in peace: parameters, optimizer, worlds, keys, best_model, and every row of its records.

Starting costs most, and compiling most of that: XLA_FLAGS=--xla_backend_optimization_level=0 in the environment makes it cheaper.
"""

import contextlib
import dataclasses
import math
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import psutil
import tyro

from aloha_jax import checkpoints, run
from aloha_jax.config import Config
from aloha_jax.factory import make_from_config
from aloha_jax.run_directory import resumed_config
from tests.crash import assert_same_run, require_whole, start_training

# The smallest worlds, pictures (32x32) and networks that still go through everything, so that 2000 updates take a minute.
STEPS_PER_UPDATE = 16
ARGS = (
    *("--preset", "smoke", "--device", "cpu", "--episode-length", "20", "--final-eval-episodes", "0", "--eval-episodes", "1"),
    *("--n-envs", "2", "--n-steps", "8", "--batch-size", "8", "--n-epochs", "1", "--hidden-sizes", "8"),
    *("--checkpoint-freq", "320", "--eval-freq", "1600", "--keep-period", "3200"),
)
UNDER_WAY = ("checkpoints/*.orbax-checkpoint-tmp*", "checkpoints/.deleted/*", ".best_model.new", ".final_model.new", ".*.part")
EARLY, START_SECONDS = 0.5, 15.0  # share of the kills that come at any moment of so many seconds from the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What and how often."""

    obs: Literal["state", "pixels_agent_pos"] = "state"
    """What the policy sees."""
    updates: int = 2000
    """Length of the run; a checkpoint after every 20, an evaluation after every 100."""
    freezes: int = 100
    """Moments taken by freezing."""
    finish: int = 20
    """How many of those are finished and compared, evenly spread."""
    kills: int = 0
    """Real kills of another run, each followed by a start that resumes it."""
    seed: int = 0
    """Of the moments."""

    def new_run(self, directory: Path) -> list[str]:
        """Arguments of `train.py`."""
        total = str(STEPS_PER_UPDATE * self.updates)
        return [*ARGS, "--obs", self.obs, "--total-timesteps", total, "--log-dir", str(directory)]


class Tally(Counter[str]):
    """Counts by name; prints as lines."""

    def __str__(self) -> str:
        return "\n".join(f"{count:6d}  {name}" for name, count in self.items())


def under_way(directory: Path) -> list[str]:
    """Patterns of what is half done in a run directory."""
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
        leftover = set(under_way(directory))  # an earlier kill's
        while process.poll() is None and leftover.issuperset(under_way(directory)):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))


def wait_until_it_trains(directory: Path, process: subprocess.Popen[str], updates: int = 1, longest: float = math.inf) -> bool:
    """Until so many rows were seen to be added to the records; False if that takes too long."""
    file, least, deadline = directory / "progress.csv", math.inf, time.monotonic() + longest
    while process.poll() is None and time.monotonic() < deadline:
        rows = file.read_bytes().count(b"\n") if file.exists() else 0
        least = min(least, rows)  # a resumed run begins by dropping some
        if rows >= least + updates:
            return True
        time.sleep(0.01)
    return False


def freeze_often(flags: Flags, directory: Path, copies: Path, rng: random.Random, tally: Tally) -> list[Path]:
    """Train in one go, taking copies at random moments; returns those from which `--resume` can go on."""
    with ended_at_last(start_training(*flags.new_run(directory))) as process:
        return freeze_it_often(flags, process, directory, copies, rng, tally)


@contextlib.contextmanager
def ended_at_last(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Whatever is found: it may be stopped, and would stay so."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def freeze_it_often(
    flags: Flags, process: subprocess.Popen[str], directory: Path, copies: Path, rng: random.Random, tally: Tally
) -> list[Path]:
    """As `freeze_often`, of a training that has begun."""
    wait_until_it_trains(directory, process)
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
        config = resumed_config(directory, dataclasses.replace(self._config, resume=str(directory)), set())
        resumed = run.Run(config, directory, resume=True, quiet=True, env=self._env)
        if self._compiled:
            resumed.train_step, resumed.evaluator = self._compiled
        self._compiled = resumed.train_step, resumed.evaluator
        resumed.train()
        resumed.writer.close()  # not the renderer, which the next one needs
        resumed.logger.close()


def kill_often(flags: Flags, directory: Path, rng: random.Random, tally: Tally) -> None:
    """Start, kill, resume, until it was killed `flags.kills` times, spread over its updates; then let it finish."""
    had_best_model = False
    for i in range(flags.kills):
        resumable, process = start_or_resume(flags, directory)
        with ended_at_last(process):
            if early := rng.random() < EARLY:
                trains = wait_until_it_trains(directory, process, longest=rng.uniform(0, START_SECONDS))
            else:  # so many updates that half of the pieces get beyond a checkpoint, and all of them together not to the end
                trains = wait_until_it_trains(directory, process, rng.randint(1, max(1, 2 * flags.updates // flags.kills)))
            if trains and not early:
                wait_for_a_moment(directory, process, rng, longest=0.2)
            process.kill()
            _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        tally["real kills" if process.returncode else "kills that came too late"] += 1
        tally["of these while it started, imported, compiled"] += not trains
        had_best_model = check(directory, had_best_model and resumable, tally)
        if i % 10 == 9:
            print(f"so far, newest checkpoint {checkpoints.latest_checkpoint(directory)}:\n{tally}", flush=True)
    _, process = start_or_resume(flags, directory)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def start_or_resume(flags: Flags, directory: Path) -> tuple[bool, subprocess.Popen[str]]:
    """What its user would type; whether there was something to resume."""
    if checkpoints.latest_checkpoint(directory) is None:
        return False, start_training(*flags.new_run(directory), "--overwrite")
    return True, start_training("--resume", str(directory))


@contextlib.contextmanager
def kept_if_broken() -> Iterator[Path]:
    """A temporary folder, which stays if something is wrong in it, and is named."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    except Exception:
        print(f"what was found is in {folder}", flush=True)
        raise
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def main(flags: Flags) -> None:
    rng, frozen, killed = random.Random(flags.seed), Tally(), Tally()
    with kept_if_broken() as root:
        jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        whole = root / "whole"
        copies = freeze_often(flags, whole, root / "copies", rng, frozen)
        print(f"in one piece: {flags.updates} updates\n{frozen}", flush=True)
        if flags.finish and copies:
            finish = Finisher(whole)
            for copy in copies[:: max(1, len(copies) // flags.finish)][: flags.finish]:
                finish(copy)
                assert_same_run(copy, whole)
                frozen["of these finished, to the same bits"] += 1
            print(frozen, flush=True)
        if flags.kills:
            kill_often(flags, root / "killed", rng, killed)
            assert_same_run(root / "killed", whole)
            print(f"{killed}\nthe killed run ended in the same bits as the one in one piece")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
