"""Does a long training stay as it is? Samples memory, file descriptors and speed of a training, and draws their curves.

uv run -m benchmarks.soak --run runs/long -- --preset cpu --total-timesteps 2000000   # starts a training and watches it
uv run -m benchmarks.soak --run runs/long --pid 1234                                  # watches one that is running
uv run -m benchmarks.soak --out soak.csv                                              # judges what was recorded

Ends with the training, after `--hours`, or at Ctrl-C; exit status 1 if memory, descriptors or speed did not stay flat.
"""

import csv
import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import psutil
import tyro

COLUMNS = ("seconds", "rss_mib", "processes", "file_descriptors", "env_steps", "steps_per_second")

# How far the last quarter's median may be from the first's, both after the warm-up.
MEMORY_GROWTH, SPEED_CHANGE = 0.05, 0.10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to watch, and for how long."""

    run: Path | None = None
    """The run directory: its progress.csv tells the speed."""
    pid: int | None = None
    """A train.py that is running; without it, one is started with the arguments after `--`."""
    every: float = 10.0
    """Seconds between two samples."""
    hours: float | None = None
    """How long to watch; by default until the training ends."""
    warm_up: float = 0.1
    """Share of the record that is not judged: compilation, and buffers that fill."""
    out: Path = Path("soak.csv")
    """Where the samples go; the curves go beside it, as a PNG."""


def process_tree(root: psutil.Process) -> list[psutil.Process]:
    """The process and all its descendants (render workers, above all)."""
    return [root, *root.children(recursive=True)]


def sample(root: psutil.Process) -> tuple[float, int, int]:
    """Resident memory in MiB (pages shared between processes count in each), processes, and open file descriptors."""
    memory, count, descriptors = 0.0, 0, 0
    for process in process_tree(root):
        try:
            with process.oneshot():
                memory += process.memory_info().rss / 2**20
                descriptors += process.num_fds()
            count += 1
        except psutil.NoSuchProcess:  # a child that ended meanwhile
            continue
    return memory, count, descriptors


def training_speed(run: Path, since: int) -> tuple[int, float]:
    """Newest `env_steps` of a run, and the mean of `time/sps` over the updates recorded since; NaN if there are none."""
    try:
        with (run / "progress.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        steps, speeds = [int(row["env_steps"]) for row in rows], [float(row["time/sps"] or "nan") for row in rows]
    except (OSError, KeyError, TypeError, ValueError):  # not there yet, or a row that is just being written
        return since, float("nan")
    fresh = [speed for step, speed in zip(steps, speeds, strict=True) if step > since]
    return (steps[-1], float(np.mean(fresh))) if fresh else (since, float("nan"))


def watch(flags: Flags, process: psutil.Process) -> None:
    """Write a row to `flags.out`, which must not exist, every `flags.every` seconds while the process lives."""
    start, env_steps = time.monotonic(), 0
    deadline = start + 3600 * flags.hours if flags.hours else float("inf")
    with flags.out.open("x", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        while time.monotonic() < deadline and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            try:
                memory, count, descriptors = sample(process)
            except psutil.NoSuchProcess:
                break
            env_steps, speed = training_speed(flags.run, env_steps) if flags.run else (0, float("nan"))
            elapsed = time.monotonic() - start
            writer.writerow([f"{elapsed:.1f}", f"{memory:.1f}", count, descriptors, env_steps, f"{speed:.1f}"])
            file.flush()
            time.sleep(flags.every)


def read(path: Path) -> dict[str, np.ndarray]:
    """The columns of a record."""
    if not path.is_file():
        raise SystemExit(f"error: --out {path}: there is no such record; give --pid, or a training after --")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in COLUMNS}


def quarters(record: dict[str, np.ndarray], name: str, warm_up: float) -> tuple[float, float]:
    """Medians of the first and the last quarter of a column after the warm-up."""
    seconds = record["seconds"]
    begin, end = seconds[0] + warm_up * (seconds[-1] - seconds[0]), seconds[-1]
    quarter = (end - begin) / 4
    first = record[name][(seconds >= begin) & (seconds <= begin + quarter)]
    last = record[name][seconds >= end - quarter]
    if np.isnan(first).all() or np.isnan(last).all():
        raise SystemExit(f"error: too short a record to judge: no {name} in its first or last quarter")
    return float(np.nanmedian(first)), float(np.nanmedian(last))


def judge(record: dict[str, np.ndarray], warm_up: float) -> dict[str, tuple[bool, str]]:
    """Per quantity whether it stayed flat, and the figures."""
    memory, descriptors = quarters(record, "rss_mib", warm_up), quarters(record, "file_descriptors", warm_up)
    verdicts = {
        "memory": (memory[1] <= (1 + MEMORY_GROWTH) * memory[0], f"{memory[0]:.0f} MiB -> {memory[1]:.0f} MiB"),
        "file descriptors": (descriptors[1] <= descriptors[0], f"{descriptors[0]:.0f} -> {descriptors[1]:.0f}"),
    }
    if not np.isnan(record["steps_per_second"]).all():
        speed = quarters(record, "steps_per_second", warm_up)
        verdicts["speed"] = (abs(speed[1] / speed[0] - 1) <= SPEED_CHANGE, f"{speed[0]:.0f} -> {speed[1]:.0f} steps/s")
    return verdicts


def draw(record: dict[str, np.ndarray], warm_up: float, path: Path) -> None:
    """Three curves over the hours, the warm-up shaded."""
    hours = record["seconds"] / 3600
    titles = {"rss_mib": "resident memory, MiB", "file_descriptors": "open file descriptors", "steps_per_second": "env steps/s"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        known = ~np.isnan(record[name])
        axis.plot(hours[known], record[name][known])
        axis.axvspan(hours[0], hours[0] + warm_up * (hours[-1] - hours[0]), color="0.9")
        axis.set(title=title, xlabel="hours", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(flags: Flags) -> bool:
    """Print what the record says; whether everything was flat."""
    record = read(flags.out)
    if len(record["seconds"]) < 8:
        raise SystemExit(f"error: {flags.out} has {len(record['seconds'])} samples; at least 8 are needed to judge")
    draw(record, flags.warm_up, flags.out.with_suffix(".png"))
    verdicts = judge(record, flags.warm_up)
    if flags.run is not None and "speed" not in verdicts:
        verdicts["speed"] = False, f"{flags.run / 'progress.csv'} told none"
    steps, hours = record["env_steps"][-1] - record["env_steps"][0], record["seconds"][-1] / 3600
    print(f"{len(record['seconds'])} samples over {hours:.2f} hours, {steps:,.0f} env steps; medians of first and last quarter:")
    for name, (flat, figures) in verdicts.items():
        print(f"{name:>16}: {'flat' if flat else 'NOT FLAT'}  {figures}")
    return all(flat for flat, _ in verdicts.values())


def main(flags: Flags, train_args: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: a training must not go on without us
        signal.signal(number, signal.default_int_handler)
    if (train_args or flags.pid is not None) and flags.out.exists():
        raise SystemExit(f"error: --out {flags.out} exists: choose another, or delete it yourself")
    started, status = None, None
    if train_args:
        log_dir = ["--log-dir", str(flags.run)] if flags.run else []
        # In a session of its own: a terminal's Ctrl-C would reach it, too, and SIGTERM, its second signal, would end it at once.
        started = subprocess.Popen([sys.executable, "train.py", *train_args, *log_dir], start_new_session=True)
    pid = started.pid if started else flags.pid
    try:
        if pid is not None:
            watch(flags, psutil.Process(pid))
    except KeyboardInterrupt:
        print("interrupted: judging what was recorded")
    except psutil.NoSuchProcess:
        raise SystemExit(f"error: --pid {pid}: there is no such process") from None
    finally:
        if started:
            status = started.poll()
            started.terminate()
            started.wait()
    if status:
        print(f"the training ended by itself with exit status {status}")
    return 0 if report(flags) and not status else 1


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.exit(main(tyro.cli(Flags, args=sys.argv[1:split], description=__doc__), sys.argv[split + 1 :]))
