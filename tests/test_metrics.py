"""The records of a run: TensorBoard's tags, well-formed CSV files, the picture of them, and honest means and speeds."""

import csv
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from aloha_jax import metrics, plots, run
from aloha_jax.evaluation import summarize
from aloha_jax.judge import Trajectory
from aloha_jax.metrics import CsvFile, MetricsLogger, judging, print_report
from tests.small_run import PIXELS, STATE, small_run

# What design and documents promise.
PROMISED = {
    *("rollout/ep_rew_mean", "rollout/ep_len_mean"),
    *("train/policy_loss", "train/value_loss", "train/entropy_loss", "train/approx_kl", "train/clip_fraction"),
    *("train/explained_variance", "time/sps"),
    *("eval/mean_reward", "eval/success_rate", "eval/level_1", "eval/level_2", "eval/level_3", "eval/level_4"),
}
# More that is there.
BESIDES = {
    *("train/grad_norm", "train/learning_rate", "train/update_share", "train/skipped_minibatches"),
    *("rollout/ep_level_mean", "rollout/success_rate", "rollout/invalid_worlds"),
    *("eval/mean_max_reward", "eval/mean_train_reward", "eval/mean_length"),
}


@pytest.fixture(scope="module")
def state_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory, STATE).directory


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()


def steps_of(file: Path) -> list[int]:
    return [int(row["env_steps"]) for row in rows_of(file)]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_tensorboard_has_the_promised_tags(state_run: Path) -> None:
    board = events(state_run)
    assert set(board.Tags()["scalars"]) == PROMISED | BESIDES
    for tag in ("train/policy_loss", "time/sps"):
        assert [event.step for event in board.Scalars(tag)] == [64, 128, 192]
    assert [event.step for event in board.Scalars("eval/success_rate")] == [0, 64, 128, 192]
    # The worlds' clocks start anywhere, but nothing ends an episode of 20 steps but its end.
    assert all(0 < event.value <= 20 for event in board.Scalars("rollout/ep_len_mean"))
    assert board.Scalars("eval/mean_reward")[0].value == 0.0


def test_tensorboard_shows_what_the_simulators_state_led_to(state_run: Path) -> None:
    """In pictures that the policy does not see."""
    videos = events(state_run).Images("eval/video")
    assert [video.step for video in videos] == [0, 64, 128, 192]
    assert (videos[0].height, videos[0].width) == run.VIDEO_SHAPE


def test_tensorboard_shows_evaluations_as_videos(tmp_path_factory: pytest.TempPathFactory) -> None:
    board = events(small_run(tmp_path_factory, PIXELS).directory)
    videos = board.Images("eval/video")
    assert [video.step for video in videos] == [0, 64, 128]
    assert videos[0].encoded_image_string.startswith(b"GIF89a")
    assert (videos[0].height, videos[0].width) == (24, 32)


def test_csv_files_are_well_formed(state_run: Path) -> None:
    assert steps_of(state_run / "progress.csv") == [64, 128, 192]
    assert steps_of(state_run / "eval" / "evaluations.csv") == [0, 64, 128, 192]
    for file in ("progress.csv", "eval/evaluations.csv"):
        for row in rows_of(state_run / file):
            assert None not in row
            assert all(name and math.isfinite(float(value)) for name, value in row.items() if value not in ("", "nan"))
    scalars = events(state_run).Scalars("train/value_loss")
    column = [float(row["train/value_loss"]) for row in rows_of(state_run / "progress.csv")]
    np.testing.assert_allclose(column, [event.value for event in scalars], rtol=1e-6)


def test_the_learning_curve_is_a_picture_with_something_on_it(state_run: Path, tmp_path: Path) -> None:
    with Image.open(state_run / "learning_curve.png") as image:
        assert image.format == "PNG"
        drawn = np.asarray(image.convert("RGB"))
    with Image.open(plots.learning_curve(tmp_path)) as image:  # of no run at all: axes only
        empty = np.asarray(image.convert("RGB"))
    assert drawn.shape[1] > 1000
    orange = (np.abs(drawn.astype(int) - (255, 127, 14)) < 10).all(axis=2).sum()
    assert orange > 100
    assert not (np.abs(empty.astype(int) - (255, 127, 14)) < 10).all(axis=2).any()
    assert [path.name for path in tmp_path.iterdir()] == ["learning_curve.png"]


def test_a_resumed_csv_file_forgets_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "numbers.csv"
    file = CsvFile(path)
    for steps in (10, 20, 30):
        file.append({"env_steps": steps, "x": steps / 2, "text": 'a "quoted", one'})
    with path.open("a") as cut_off:
        cut_off.write("40,2")
    file = CsvFile(path, last_env_steps=20)
    file.append({"env_steps": 30, "y": 7, "x": 0.5})  # columns stay what they were
    assert rows_of(path) == [
        {"env_steps": "10", "x": "5.0", "text": 'a "quoted", one'},
        {"env_steps": "20", "x": "10.0", "text": 'a "quoted", one'},
        {"env_steps": "30", "x": "0.5", "text": ""},
    ]
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_csv_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    path.touch()
    CsvFile(path).append({"env_steps": 1})
    assert rows_of(path) == [{"env_steps": "1"}]


def episode_sums(episodes: int, reward: float) -> dict[str, float]:
    sums = {"episode_reward": reward, "episode_length": 10.0, "episode_level": 2.0, "episode_success": 1.0}
    return {"episodes": float(episodes), "policy_loss": 0.5} | {name: episodes * value for name, value in sums.items()}


def test_episode_means_are_over_the_latest_hundred(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 1000, quiet=True)
    assert "rollout/ep_rew_mean" not in logger.log_update(1, episode_sums(0, 0.0))
    assert logger.log_update(2, episode_sums(60, 1.0))["rollout/ep_rew_mean"] == 1.0
    assert logger.log_update(3, episode_sums(60, 3.0))["rollout/ep_rew_mean"] == 2.0  # 60 are too few to do without the others
    assert logger.log_update(4, episode_sums(40, 5.0))["rollout/ep_rew_mean"] == pytest.approx((60 * 3 + 40 * 5) / 100)
    last = logger.log_update(5, episode_sums(0, 0.0))
    assert last["rollout/ep_rew_mean"] == pytest.approx(3.8)
    assert (last["rollout/ep_len_mean"], last["rollout/ep_level_mean"], last["rollout/success_rate"]) == (10.0, 2.0, 1.0)
    logger.close()


def test_speed_is_that_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    logger = MetricsLogger(tmp_path, 1000, quiet=True)
    logger.close()  # its bar reads the clock, too
    monkeypatch.setattr("aloha_jax.metrics.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(logger, "_start", 100.0)

    def speed_after(seconds: float, env_steps: int) -> float:
        clock[0] += seconds
        return logger.log_update(env_steps, episode_sums(0, 0.0))["time/sps"]

    monkeypatch.setattr(logger, "_show", lambda *args: None)
    assert speed_after(50.0, 100) == 2.0  # with compilation: all there is to go by
    assert speed_after(10.0, 200) == 10.0
    logger.stop_clock()
    assert speed_after(1000.0, 300) == 10.0  # an evaluation lay between
    assert speed_after(5.0, 400) == 20.0
    # Two updates whose metrics are read at the same moment, after the second of them.
    speeds = [logger.log_update(steps, episode_sums(0, 0.0), clock[0] + t)["time/sps"] for steps, t in ((500, 4.0), (600, 9.0))]
    assert speeds == [25.0, 20.0]


def test_a_report_is_printed_as_json_where_no_one_looks(capsys: pytest.CaptureFixture[str]) -> None:
    report = summarize([Trajectory(0, np.array([0, 4]), np.zeros((2, 30)), np.zeros((2, 14)))], "c")
    print_report(report, {"video": "film.mp4"})
    captured = capsys.readouterr()
    assert captured.out == report.to_json() + "\n"
    assert captured.err == "video: film.mp4\n"


def test_paths_stay_whole_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/rather/long/path/" + 5 * "of-folders-within-folders/"
    metrics.make_console().print(metrics.summary_table("done", {"best model": path}))
    assert path in capsys.readouterr().out


def test_whoever_stops_reading_a_report_gets_no_traceback() -> None:
    """As `eval.py | head -1` does."""
    program = """if True:
        from aloha_jax import cli
        with cli.user_errors():
            print("read", flush=True)
            input()
            print("x" * 100_000)
    """
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_whoever_stops_reading_the_console_stops_nothing() -> None:
    """As `train.py | head -1` does."""
    program = """if True:
        import sys
        from aloha_jax.metrics import make_console
        console = make_console()
        for _ in range(10_000):
            console.print("x" * 100)
        print("went on", file=sys.stderr)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "went on\n"
    assert process.returncode == 0


def test_a_judging_is_counted_on_a_terminal_and_silent_elsewhere() -> None:
    inserts, lifts = (
        Trajectory(seed, np.array([0, level]), np.zeros((2, 30)), np.zeros((2, 14))) for seed, level in enumerate((4, 2))
    )
    for terminal in (True, False):
        output = io.StringIO()
        with judging(Console(file=output, force_terminal=terminal, width=100), 3) as show:
            show(inserts)
            show(lifts)
        assert ("2 of 3 episodes, 1 inserted" in output.getvalue()) == terminal
        assert terminal or not output.getvalue()
