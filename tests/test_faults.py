"""What goes wrong around a training: it goes on where it can, stops in one sentence where not, and keeps its checkpoints."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from aloha_jax import checkpoints, cli, launch, metrics, training
from aloha_jax.config import Config, ConfigError
from aloha_jax.factory import make_from_config
from aloha_jax.networks import RunningStats
from aloha_jax.run_directory import alone_in, prepare_directory
from tests.crash import require_whole, rows
from tests.small_run import FLAGS, STATE, small_run
from tests.tiny_disk import tiny_disk


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line on stderr of a `train.py` that ends with status 2."""
    with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
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
    assert rows(run / "diverged" / "progress.csv") == rows(run / "progress.csv")[2:]
    assert checkpoints.latest_checkpoint(run / "diverged" / "diverged") == run / "diverged" / "diverged" / "checkpoints" / "128"


def test_statistics_of_observations_never_take_in_what_is_not_finite() -> None:
    stats = RunningStats.create(2).update(jnp.arange(8.0).reshape(1, 4, 2))
    for bad in (jnp.nan, jnp.inf):
        after = training._updated(stats, jnp.ones((1, 4, 2)).at[0, 1, 1].set(bad))
        jax.tree.map(np.testing.assert_array_equal, after, stats)
    assert training._updated(stats, jnp.ones((1, 4, 2))).mean[0] != stats.mean[0]


START = (*FLAGS, *STATE, "--log-dir", "{run}", "--total-timesteps", "256")
RESUME = ("--resume", "{run}", "--total-timesteps", "256")


@pytest.fixture
def after_updates(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What is put in here is done after the first update, the second, and so on."""
    deeds: list[Callable[[], None]] = []
    make = training.make_train_step

    def making(*args: Any, **options: Any) -> Any:
        step = make(*args, **options)

        def stepping(state: training.RunState) -> Any:
            after = step(state)
            if deeds:
                deeds.pop(0)()
            return after

        return stepping

    monkeypatch.setattr(training, "make_train_step", making)
    return deeds


@pytest.mark.parametrize("args", [RESUME, pytest.param((*START, "--overwrite"), marks=pytest.mark.slow)])
def test_a_run_that_another_process_trains_is_left_alone(
    args: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(small_run(tmp_path_factory, STATE).directory, tmp_path / "run"))
    command = [arg.format(run=directory) for arg in args]
    wait = "import sys; print('mine', flush=True); sys.stdin.read()"
    claim = f"from aloha_jax.atomic import claimed; from pathlib import Path\nwith claimed(Path({str(directory)!r})): {wait}"
    other = subprocess.Popen([sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        before = sorted(directory.rglob("*"))
        assert f"another training runs in {directory}" in refused(capsys, *command)
        assert sorted(directory.rglob("*")) == before
    finally:
        other.kill()
        other.communicate()
    with alone_in(directory) as exists:  # a kill leaves nothing behind
        assert exists


@pytest.mark.parametrize(
    "args", [*(pytest.param(args, marks=pytest.mark.slow) for args in (START, RESUME)), (*START, "--overwrite")]
)
def test_a_training_keeps_others_out_of_its_run_until_it_ends(
    args: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    after_updates: list[Callable[[], None]],
) -> None:
    directory = tmp_path / "run"
    if args != START:
        shutil.copytree(small_run(tmp_path_factory, STATE).directory, directory)
    refusals = []

    def intrude() -> None:
        with pytest.raises(ConfigError, match="another training runs in"), alone_in(directory):
            pass
        refusals.append(directory)

    after_updates.append(intrude)
    train.main([arg.format(run=directory) for arg in args])
    assert refusals == [directory]
    with alone_in(directory) as exists:
        assert exists


def test_two_that_begin_the_same_run_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other makes its directory after ours was looked for, and before we make it: even --overwrite must not take it away."""
    directory = tmp_path / "run"
    with contextlib.ExitStack() as other:

        def late(config: Config, *args: Any, **options: Any) -> Any:
            prepare_directory(config)
            other.enter_context(alone_in(directory))
            return make_from_config(config, *args, **options)

        monkeypatch.setattr(launch, "make_from_config", late)
        error = refused(capsys, *FLAGS, *STATE, "--log-dir", str(directory), "--overwrite")
        assert f"another training runs in {directory}" in error


@pytest.mark.parametrize(
    ("interval", "then"),
    [
        ("64", "nothing"),
        ("100000", "another"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("100000", "nothing"), ("64", "moved"), ("100000", "moved"), ("64", "another"))
        ),
    ],
)
def test_a_run_whose_directory_is_taken_away_says_so_and_makes_no_other(
    interval: str, then: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], after_updates: list[Callable[[], None]]
) -> None:
    directory = tmp_path / "run"

    def take() -> None:
        if then == "nothing":
            shutil.rmtree(directory)
            return
        shutil.move(directory, tmp_path / "elsewhere")
        if then == "another":
            prepare_directory(Config(log_dir=str(directory)))

    after_updates.append(take)
    flags = ("--log-dir", str(directory), "--eval-freq", interval, "--checkpoint-freq", interval)
    assert f"{directory} was deleted or moved away" in refused(capsys, *FLAGS, *STATE, *flags)
    left = {path.name for path in directory.iterdir()} if directory.exists() else set()
    assert left == ({"config.json", "command.txt"} if then == "another" else set())


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


def test_a_signal_before_there_is_anything_to_go_on_from_says_so() -> None:
    program = (
        "import os, signal, time\n"
        "from aloha_jax.signals import StopRequest\n"
        "with StopRequest('go on', 'start again') as stop:\n"
        "    {first}os.kill(os.getpid(), signal.SIGTERM); time.sleep(1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
    )
    for first, says in (("", "start again"), ("stop.nothing_to_save = False; ", "go on")):
        end = subprocess.run([sys.executable, "-c", program.format(first=first)], capture_output=True, text=True, timeout=60)
        assert (end.returncode, end.stderr) == (143, f"error: {says}\n")


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    """As under `uv run`, when a whole process group is signalled."""
    program = (
        "import os, signal, time\n"
        "from aloha_jax.signals import StopRequest\n"
        "with StopRequest('stopped; to go on') as stop:\n"
        "    stop.nothing_to_save = False\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.05)\n"
        "    print(stop.signum, flush=True)\n"
        "    {then}os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\n"
    )
    for then, number in (("os._exit(0); ", 0), ("", 130)):  # another signal is no echo
        end = subprocess.run([sys.executable, "-c", program.format(then=then)], capture_output=True, text=True, timeout=60)
        assert (end.returncode, end.stdout.strip()) == (number, "15")


def test_the_second_signal_ends_a_process_at_once() -> None:
    """Although its main thread is deaf: it never returns to Python's interpreter loop, as in a long compilation."""
    program = (
        "import hashlib, os, signal, threading, time\n"
        "from aloha_jax.signals import StopRequest\n"
        "def twice():\n"
        "    time.sleep(0.3); os.kill(os.getpid(), signal.{first}); time.sleep(0.8); print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "with StopRequest('stopped; to go on') as stop:\n"
        "    stop.nothing_to_save = False\n"
        "    threading.Thread(target=twice, daemon=True).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    for first, number in (("SIGINT", "2"), ("SIGTERM", "15")):
        end = subprocess.run([sys.executable, "-c", program.format(first=first)], capture_output=True, text=True, timeout=30)
        assert (end.returncode, end.stdout.strip(), end.stderr) == (130, number, "error: stopped; to go on\n")
