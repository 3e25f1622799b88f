"""A run that is killed and resumed is the run that was not: every array, every row of its records."""

import contextlib
import functools
import signal
import time
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

import train
from aloha_jax import checkpoints, cli, plots, run
from aloha_jax.run_directory import prepare_directory
from aloha_jax.signals import Interrupted, StopRequest
from tests.crash import assert_same_run, complete_checkpoints, require_whole, rows, start_training
from tests.small_run import FLAGS, PIXELS, STATE, small_run


def signal_once_it_has(path: Path, number: signal.Signals, *args: str) -> tuple[int, str]:
    """Start a training and send it a signal as soon as `path` exists; exit status and stderr."""
    with start_training(*args) as process:
        try:
            while not path.exists():
                assert process.poll() is None, f"it ended by itself: {process.communicate()[1]}"
                time.sleep(0.002)
            process.send_signal(number)
            _, errors = process.communicate()
        finally:
            process.kill()
    return process.returncode, errors


@pytest.mark.slow
def test_a_run_that_keeps_an_average_goes_on_with_both(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    directory, flags = tmp_path / "run", (*STATE, "--average-decay", "0.9")
    train.main([*FLAGS, *flags, "--total-timesteps", "64", "--log-dir", str(directory)])
    train.main(["--resume", str(directory), "--total-timesteps", "192"])
    whole = small_run(tmp_path_factory, flags).directory
    assert_same_run(directory, whole)
    plain = small_run(tmp_path_factory, STATE).directory
    # What is saved is the average, not the parameters, which are those of the run without one, as another program rounds them.
    averaged, parameters = (checkpoints.load_policy(path / "final_model") for path in (whole, plain))
    assert checkpoints.digest(averaged.params) != checkpoints.digest(parameters.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), averaged.stats, parameters.stats)


@pytest.mark.parametrize("seen", [STATE, pytest.param(PIXELS, marks=pytest.mark.slow)], ids=["state", "pixels"])
def test_a_run_that_was_killed_and_then_stopped_ends_as_if_nothing_had_been(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, seen: tuple[str, ...]
) -> None:
    # Six updates: a signal may be noticed a few late.
    run, flags = tmp_path / "run", (*seen[:-1], "384", "--average-decay", "0.9", "--eval-freq", "128")
    status, _ = signal_once_it_has(run / "checkpoints" / "64", signal.SIGKILL, *FLAGS, *flags, "--log-dir", str(run))
    assert status == -signal.SIGKILL, "it was done before it could be killed"
    require_whole(run)
    assert [path.name for path in complete_checkpoints(run)] == ["64"]
    assert rows(run / "progress.csv")[0]["env_steps"] == "64"  # no checkpoint without the rows that lead to it

    status, errors = signal_once_it_has(run / "checkpoints" / "128", signal.SIGTERM, "--resume", str(run))
    assert (status, errors) == (128 + signal.SIGTERM, f"error: stopped; to go on: uv run train.py --resume {run}\n")
    require_whole(run)
    assert 128 < max(int(path.name) for path in complete_checkpoints(run)) < 384  # it saved where it was told to stop
    assert not (run / "final_model").exists()

    train.main(["--resume", str(run)])
    assert_same_run(run, small_run(tmp_path_factory, flags).directory)


def test_a_signal_does_not_wait_for_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it cost one: that is made up for on resume, as above. Its learning curve is left as it stands."""
    drawings: list[Path] = []
    monkeypatch.setattr(plots, "learning_curve", drawings.append)
    directory, stop, evaluations = tmp_path / "run", StopRequest("to be continued"), 0
    config, _ = cli.parse_config([*FLAGS, *STATE, "--log-dir", str(directory)])
    training = run.Run(config, prepare_directory(config), quiet=True)
    evaluate = training.evaluator

    def with_a_signal(*args: Any, **options: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        stop.signum = signal.SIGTERM if evaluations == 3 else None  # as after 128 steps it begins
        monkeypatch.setattr(run, "DRAWING_INTERVAL", float("inf") if evaluations == 1 else 0.0)
        return evaluate(*args, **options)

    training.evaluator = cast(Any, with_a_signal)
    with contextlib.closing(training), pytest.raises(Interrupted):
        training.train(stop)
    assert [row["env_steps"] for row in rows(directory / "eval" / "evaluations.csv")] == ["0", "64"]
    assert drawings == [directory] * 2  # not at 0 steps, too soon; after the second evaluation, and at the end
    assert [path.name for path in complete_checkpoints(directory)] == ["64", "128"]


@pytest.mark.slow
def test_a_run_in_three_pieces_is_the_run_in_one(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main([*FLAGS, *STATE, "--total-timesteps", "64", "--log-dir", str(run)])
    train.main(["--resume", str(run), "--total-timesteps", "128"])
    train.main(["--resume", str(run), "--total-timesteps", "192"])
    assert_same_run(run, small_run(tmp_path_factory, STATE).directory)
    seconds = [float(line.split(",")[1]) for line in (run / "progress.csv").read_text().splitlines()[1:]]
    assert seconds == sorted(seconds)  # the clock goes on, too


def test_the_digest_sees_every_array_of_the_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Else equal digests would prove nothing: checkpoints of one run differ in both."""
    run = small_run(tmp_path_factory, STATE).directory
    first, last = (checkpoints.digests(run / "checkpoints" / step) for step in ("64", "192"))
    assert set(first) == {"policy", "run"}
    assert first["policy"] != last["policy"]
    assert first["run"] != last["run"]
