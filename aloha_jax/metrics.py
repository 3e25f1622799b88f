"""Where numbers go: TensorBoard, CSV files and the console. The only file that knows tensorboardX and rich."""

import contextlib
import csv
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from aloha_jax.config import ConfigError
from aloha_jax.evaluation import Report
from aloha_jax.judge import Trajectory
from aloha_jax.tasks.insertion import MAX_LEVEL
from aloha_jax.video import gif_bytes

FLUSH_SECONDS = 10.0  # how long a TensorBoard that looks on may lag behind
EPISODE_WINDOW = 100  # rollout means are over at least this many of the latest episodes, as in Stable-Baselines3

# What the train step calls it -> its TensorBoard tag.
TRAIN_TAGS = {
    "policy_loss": "train/policy_loss",
    "distill_loss": "train/distill_loss",
    "state_loss": "train/state_loss",
    "value_loss": "train/value_loss",
    "entropy_loss": "train/entropy_loss",
    "approx_kl": "train/approx_kl",
    "clip_fraction": "train/clip_fraction",
    "explained_variance": "train/explained_variance",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "update_share": "train/update_share",
    "skipped_minibatches": "train/skipped_minibatches",
    "invalid_worlds": "rollout/invalid_worlds",
}
EPISODE_TAGS = {
    "episode_reward": "rollout/ep_rew_mean",
    "episode_length": "rollout/ep_len_mean",
    "episode_level": "rollout/ep_level_mean",
    "episode_success": "rollout/success_rate",
}


class CsvFile:
    """Appends rows to a CSV file; the first row ever decides the columns, and the first column counts environment steps.

    Rows beyond `last_env_steps` are dropped from an older file: a resumed run makes them anew. So is a row that was cut off.

    Attributes:
        last_env_steps: of the newest row; -1 if there is none.
        kept: the rows of an older file.
    """

    def __init__(self, path: Path, last_env_steps: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._columns: list[str] | None = None
        self.last_env_steps = -1
        self.kept: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", errors="replace") as file:
                header, *rows = list(csv.reader(line for line in file if line.endswith("\n"))) or [[]]
            if header and header[0] != "env_steps":
                raise ConfigError(f"{path} is damaged, its first line is not that of a run: move it away to go on without it")
            rows = [row for row in rows if len(row) == len(header) and row[0].isdigit() and int(row[0]) <= last_env_steps]
            unfinished = path.with_name(f".{path.name}.part")
            with unfinished.open("w", newline="") as file:
                csv.writer(file).writerows([header, *rows] if header else [])
            unfinished.replace(path)
            self._columns = header or None
            self.last_env_steps = int(rows[-1][0]) if rows else -1
            self.kept = [dict(zip(header, row, strict=True)) for row in rows]

    def append(self, row: Mapping[str, Any]) -> None:
        fresh = self._columns is None
        self._columns = self._columns or list(row)
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        self.last_env_steps = row["env_steps"]


class TensorBoard:
    """Appends to a TensorBoard event file. If that fails it says so once and is silent from then on: the CSV files hold the same.

    No thread of its own, unlike tensorboardX's `SummaryWriter`, which waits forever once its thread has died.
    """

    def __init__(self, directory: Path, first_step: int, warn: Callable[[str], None]):
        """Begin a file; TensorBoard forgets what earlier ones hold from `first_step` on, for a resumed run makes it anew."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._warn = directory, warn
        self._events: EventsWriter | None = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        self._flushed = time.monotonic()
        if first_step:
            self._write(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, env_steps: int, *values: Summary.Value) -> None:
        self._write(Event(wall_time=time.time(), step=env_steps, summary=Summary(value=values)))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if self._events is not None:
            self._try(self._events.flush)

    def close(self) -> None:
        if self._events is not None:
            self._try(self._events.close)
        self._events = None

    def _write(self, event: Event) -> None:
        if self._events is not None:
            events = self._events
            self._try(lambda: events.write_event(event))

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            assert self._events is not None
            with contextlib.suppress(OSError):  # else its buffer would be tried again as Python exits
                self._events._py_recordio_writer.close()
            self._events = None
            self._warn(f"TensorBoard: cannot write {self._directory} ({error.strerror}); progress.csv goes on")


class MetricsLogger:
    """Turns metrics into TensorBoard scalars, `progress.csv`, `eval/evaluations.csv` and a progress bar."""

    def __init__(
        self,
        run_dir: Path,
        total_timesteps: int,
        start_timesteps: int = 0,
        quiet: bool = False,
        records: Mapping[str, Any] | None = None,
    ):
        """Begin to record, or go on after `start_timesteps` with the `records` of then."""
        self.console = make_console(quiet)
        records = records or {}
        first_step = start_timesteps + 1 if start_timesteps else 0
        self._progress_csv = CsvFile(run_dir / "progress.csv", start_timesteps)
        self._evaluations_csv = CsvFile(run_dir / "eval" / "evaluations.csv", start_timesteps)
        self._tensorboard = TensorBoard(run_dir / "tensorboard", first_step, self.console.print)
        self._episodes: deque[Mapping[str, float]] = deque(records.get("episodes", ()))
        self._seconds_before = float(records.get("seconds", 0.0))
        self._start = time.monotonic()
        self._last_time: float | None = None
        self._last_steps = self._start_steps = start_timesteps
        self._speed: float | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.completed:>9,.0f}[/] / {task.total:,.0f}"),
            BarColumn(),
            TextColumn("{task.fields[status]}  eta"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=total_timesteps, completed=start_timesteps, status="compiling")
        self._bar.start()

    @property
    def seconds(self) -> float:
        """Wall-clock time of training, earlier processes of the same run included."""
        return self._seconds_before + time.monotonic() - self._start

    @property
    def records(self) -> dict[str, Any]:
        """What another process needs to go on with the same figures, as JSON."""
        return {"seconds": self.seconds, "episodes": list(self._episodes)}

    @property
    def last_evaluation(self) -> int:
        """Environment steps of the newest evaluation, -1 if there is none."""
        return self._evaluations_csv.last_env_steps

    @property
    def earlier_evaluations(self) -> list[dict[str, str]]:
        """Rows of `evaluations.csv` that earlier processes of the same run left."""
        return self._evaluations_csv.kept

    def log_update(self, env_steps: int, metrics: Mapping[str, Any], finished: float | None = None) -> dict[str, float]:
        """Record one update's metrics, given as host scalars; returns the scalars by tag.

        `finished` is when the update was done, by `time.monotonic`; by default now. Metrics may be read late, and of two at once.
        """
        values = {name: float(x) for name, x in metrics.items()}
        scalars = {tag: values[name] for name, tag in TRAIN_TAGS.items() if name in values} | self._episode_means(values)
        scalars["time/sps"] = self._steps_per_second(env_steps, time.monotonic() if finished is None else finished)
        finite = {tag: value for tag, value in scalars.items() if np.isfinite(value)}
        self._tensorboard.add(env_steps, *(Summary.Value(tag=tag, simple_value=value) for tag, value in finite.items()))
        blank = dict.fromkeys(EPISODE_TAGS.values(), float("nan"))
        self._progress_csv.append({"env_steps": env_steps, "seconds": round(self.seconds, 2)} | blank | scalars)
        self._show(env_steps, scalars)
        return scalars

    def log_evaluation(self, env_steps: int, report: Report, train_reward: float) -> None:
        """Record an evaluation; `train_reward` is the mean sum of training rewards over its episodes."""
        levels = {f"eval/level_{k}": rate for k, rate in report.level_rates.items()}
        scalars = {
            "eval/mean_reward": report.mean_reward,
            "eval/mean_max_reward": report.mean_max_reward,
            "eval/mean_train_reward": train_reward,
            "eval/success_rate": report.success_rate,
            "eval/mean_length": report.mean_length,
        } | levels
        self._tensorboard.add(env_steps, *(Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()))
        row = {tag.removeprefix("eval/"): value for tag, value in scalars.items()}
        self._evaluations_csv.append({"env_steps": env_steps, "seconds": round(self.seconds, 2)} | row)
        shares = " ".join(f"{rate:4.0%}" for rate in report.level_rates.values())
        self.console.print(
            f"{env_steps:>9,} steps  evaluation: reward {train_reward:6.2f}  level {report.mean_max_reward:.2f}  "
            f"reached levels 1..4: {shares}"
        )

    def stop_clock(self) -> None:
        """Keep what comes now out of the training speed, until the next update is recorded."""
        self._last_time = None

    def log_video(self, env_steps: int, tag: str, frames: list[np.ndarray]) -> None:
        """Show uint8[H, W, 3] frames as an animation in TensorBoard's images."""
        height, width = frames[0].shape[:2]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif_bytes(frames))
        self._tensorboard.add(env_steps, Summary.Value(tag=tag, image=image))

    def flush(self) -> None:
        """Bring everything recorded so far to the disk."""
        self._tensorboard.flush()

    def close(self) -> None:
        """Stop the bar and flush every file."""
        self._bar.stop()
        self._tensorboard.close()

    def _steps_per_second(self, env_steps: int, now: float) -> float:
        """Of the update just recorded; after a stop of the clock the last speed known, or the mean so far."""
        steps = env_steps - self._last_steps
        if self._last_time is not None:
            self._speed = steps / max(now - self._last_time, 1e-9)
        self._last_steps, self._last_time = env_steps, now
        return self._speed or (env_steps - self._start_steps) / max(now - self._start, 1e-9)

    def _episode_means(self, values: Mapping[str, float]) -> dict[str, float]:
        if values.get("episodes"):
            self._episodes.append({name: values[name] for name in ("episodes", *EPISODE_TAGS)})
        while len(self._episodes) > 1 and sum(e["episodes"] for e in list(self._episodes)[1:]) >= EPISODE_WINDOW:
            self._episodes.popleft()
        count = sum(e["episodes"] for e in self._episodes)
        return {tag: sum(e[name] for e in self._episodes) / count for name, tag in EPISODE_TAGS.items()} if count else {}

    def _show(self, env_steps: int, scalars: Mapping[str, float]) -> None:
        parts = [f"{scalars['time/sps']:,.0f} steps/s"]
        if "rollout/ep_level_mean" in scalars:
            parts += [f"level {scalars['rollout/ep_level_mean']:.2f}", f"success {scalars['rollout/success_rate']:.0%}"]
        self._bar.update(self._task, completed=env_steps, status="  ".join(parts))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the console is gone, as `head` is after some lines: the training goes on in silence."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console(quiet: bool = False, stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that paths stay whole."""
    console = _Console(quiet=quiet, stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = 1000
    return console


def summary_table(title: str, rows: Mapping[str, Any]) -> Table:
    """Two columns: a name and its value."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def report_table(report: Report) -> Table:
    """An evaluation's report for the console."""
    low, high = report.success_interval
    rows = {
        "episodes": report.n_episodes,
        "success": f"{report.success_rate:.1%}  (95 % interval {low:.1%} .. {high:.1%})",
        "clean insertion": f"{report.clean_rate:.1%}",
        "mean highest level": f"{report.mean_max_reward:.2f}",
        "mean return": f"{report.mean_return:.1f}",
        "mean length": f"{report.mean_length:.1f}",
    }
    rows |= {f"reached level {k}": f"{rate:.1%}" for k, rate in report.level_rates.items()}
    return summary_table(f"evaluation in {report.simulator}", rows)


@contextlib.contextmanager
def judging(console: Console, n_episodes: int) -> Iterator[Callable[[Trajectory], None]]:
    """A bar for an evaluation, on a terminal only; what it yields is to be called as each episode ends."""
    bar = Progress(
        TextColumn("judging  {task.completed} of {task.total} episodes, {task.fields[inserted]} inserted"),
        BarColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task, inserted = bar.add_task("", total=n_episodes, inserted=0), 0

    def show(trajectory: Trajectory) -> None:
        nonlocal inserted
        inserted += int(trajectory.levels.max(initial=0) == MAX_LEVEL)
        bar.update(task, advance=1, inserted=inserted)

    with bar:
        yield show


def print_report(report: Report, paths: Mapping[str, Any]) -> None:
    """Print an evaluation: a table for people on a terminal, JSON for programs, to which `paths` go by stderr."""
    console = make_console()
    if console.is_terminal:
        console.print(report_table(report))
    else:
        print(report.to_json())
        console.stderr = True
    for name, path in paths.items():
        console.print(f"{name}: {path}")
