"""What goes wrong around a training: it goes on where it can, stops in one sentence where not, and keeps its checkpoints."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from aloha_jax import checkpoints, cli, metrics, training
from aloha_jax.atomic import claimed
from aloha_jax.config import Config
from aloha_jax.networks import RunningStats
from tests.crash import require_whole, rows
from tests.small_run import FLAGS, STATE, small_run
from tests.tiny_disk import tiny_disk


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line on stderr of a `train.py` that ends with status 2."""
    with pytest.raises(SystemExit) as end, cli.user_errors():
        train.main(list(args))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert len(error.splitlines()) == 1, error
    return error


def test_gradients_that_are_never_finite_stop_the_run_with_a_dump_that_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate of 1e30: after the first minibatch the network answers infinities."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    run = tmp_path / "run"
    flags = (*FLAGS, *STATE, "--total-timesteps", "640", "--learning-rate", "1e30")
    error = refused(capsys, *flags, "--log-dir", str(run))
    assert f"--resume {run / 'diverged'}" in error
    assert "--learning-rate" in error
    skipped = [float(row["train/skipped_minibatches"]) for row in rows(run / "progress.csv")]
    assert [count > 0 for count in skipped] == [True] * 3  # it stopped at the third
    require_whole(run)
    for path in sorted((run / "checkpoints").iterdir()):
        assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), checkpoints.load_policy(path).params))
    # The dump is a run of its own, from before the third update, and ends as the run did.
    assert checkpoints.latest_checkpoint(run / "diverged") == run / "diverged" / "checkpoints" / "128"
    assert f"--resume {run / 'diverged' / 'diverged'}" in refused(capsys, "--resume", str(run / "diverged"))
    replayed = rows(run / "diverged" / "progress.csv")[0]
    assert replayed == rows(run / "progress.csv")[2]


def test_statistics_of_observations_never_take_in_what_is_not_finite() -> None:
    stats = RunningStats.create(2).update(jnp.arange(8.0).reshape(1, 4, 2))
    for bad in (jnp.nan, jnp.inf):
        after = training._updated(stats, jnp.ones((1, 4, 2)).at[0, 1, 1].set(bad))
        jax.tree.map(np.testing.assert_array_equal, after, stats)
    assert training._updated(stats, jnp.ones((1, 4, 2))).mean[0] != stats.mean[0]


@pytest.mark.parametrize("args", [("--resume", "{run}"), (*FLAGS, *STATE, "--log-dir", "{run}", "--overwrite")])
def test_two_trainings_never_write_into_one_run(
    args: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(small_run(tmp_path_factory, STATE).directory, tmp_path / "run"))
    command = [arg.format(run=directory) for arg in args]
    flags, wait = ["--total-timesteps", "256"], "import sys; print('mine', flush=True); sys.stdin.read()"
    claim = f"from aloha_jax.atomic import claimed; from pathlib import Path\nwith claimed(Path({str(directory)!r})): {wait}"
    other = subprocess.Popen([sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        before = sorted(directory.rglob("*"))
        assert f"another training runs in {directory}" in refused(capsys, *command, *flags)
        assert sorted(directory.rglob("*")) == before
    finally:
        other.kill()
        other.communicate()
    train.main([*command, *flags])  # whatever became of the other, it is free now
    assert (directory / "checkpoints" / "256").is_dir()
    with claimed(directory):  # and given back at the end
        pass


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_whose_directory_is_taken_away_says_so_and_makes_no_other(
    moved: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, make = tmp_path / "run", training.make_train_step

    def making(*args: Any, **options: Any) -> Any:
        step = make(*args, **options)

        def taking(state: training.RunState) -> Any:
            after = step(state)
            shutil.move(directory, tmp_path / "elsewhere") if moved else shutil.rmtree(directory)
            return after

        return taking

    monkeypatch.setattr(training, "make_train_step", making)
    assert f"{directory} was deleted or moved away" in refused(capsys, *FLAGS, *STATE, "--log-dir", str(directory))
    assert not directory.exists()


def test_a_tensorboard_that_cannot_be_written_is_told_once_and_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)
    with tiny_disk(tmp_path / "tensorboard") as disk:
        logger = metrics.MetricsLogger(tmp_path, 1000)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        for step in range(1, 200):
            logger.log_update(step, {"policy_loss": 0.5})
        logger.close()
    assert capsys.readouterr().out.count("TensorBoard: cannot write") == 1
    assert [row["env_steps"] for row in rows(tmp_path / "progress.csv")] == [str(step) for step in range(1, 200)]


def test_a_full_disk_ends_a_run_in_one_line_with_its_last_checkpoint_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        error = refused(capsys, *FLAGS, *STATE, "--total-timesteps", "6400", "--log-dir", str(disk / "run"))
        assert "No space left on device" in error
        assert "free some space" in error
        require_whole(disk / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_system_that_is_read_only(tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: bool) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        run = disk / "run"
        config = Config(log_dir=str(run), obs="state", n_envs=4, n_steps=16, batch_size=32)
        if resume:
            run.mkdir()
            (run / "config.json").write_text(config.to_json())
            writer = checkpoints.CheckpointWriter(run / "checkpoints")
            writer.save(1, config, {"w": np.zeros(3)}, {"x": np.zeros(2)}, score=0.0)
            writer.close()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        args = ["--resume", str(run)] if resume else [*FLAGS, *STATE, "--log-dir", str(run)]
        assert "Read-only file system" in refused(capsys, *args)


def test_the_second_signal_ends_a_process_at_once() -> None:
    """Although its main thread is deaf: it never returns to Python's interpreter loop, as in a long compilation."""
    program = (
        "import hashlib, os, signal, threading, time\n"
        "from aloha_jax.signals import StopRequest\n"
        "def twice():\n"
        "    time.sleep(0.3); os.kill(os.getpid(), signal.{first}); time.sleep(0.3); print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "with StopRequest('stopped; to go on') as stop:\n"
        "    stop.nothing_to_save = False\n"
        "    threading.Thread(target=twice, daemon=True).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    for first, number in (("SIGINT", "2"), ("SIGTERM", "15")):
        end = subprocess.run([sys.executable, "-c", program.format(first=first)], capture_output=True, text=True, timeout=30)
        assert (end.returncode, end.stdout.strip(), end.stderr) == (130, number, "error: stopped; to go on\n")
