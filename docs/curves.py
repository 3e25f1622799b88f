"""Draws learning curves from the logs of runs: success and level 3, over environment steps and over minutes.

    uv run docs/curves.py --runs "state=runs/state" "pixels=runs/pixels" --out docs/images/curves.png
    uv run docs/curves.py --runs "state=runs/ablations/state/*" "joint=runs/ablations/state-joint/*" --out docs/images/joint.png
    uv run docs/curves.py --runs "in two stages=runs/state,runs/polish" --out docs/images/stages.png

Runs of one label are one line, their mean, in a band from the lowest to the highest; its minutes are their mean, too. What is
drawn are the evaluations during training (eval/evaluations.csv). Where a stage begins, the policy is evaluated again, as that
stage does. A run that kept only progress.csv, as those in pretrained/, is a
dashed line of its training episodes, which have noise and may start in easier states; their level 3 was not recorded.
It also prints when each line first reached 50, 90 and 95 % success.
"""

import dataclasses
import glob
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from aloha_jax import plots

TITLES = {"success": "success (level 4)", "level 3": "level 3 reached"}
TRAINING = " (training episodes)"
MARKS = (0.5, 0.9, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Which runs, and where the picture goes."""

    runs: tuple[str, ...]
    """LABEL=DIRECTORY each; `*` in the directory stands for several runs, commas are between the stages of one."""
    out: Path
    """The PNG."""
    minutes: bool = True
    """Over minutes, too; --no-minutes where runs had cores of their own and others had not."""


class Curve(NamedTuple):
    """What a run's logs tell.

    Attributes:
        env_steps: float[T], rising.
        minutes: float[T] since the start of the training.
        shares: float[T] of each of `TITLES` that was recorded.
        of_training: whether the episodes are those of training, not of evaluation.
    """

    env_steps: np.ndarray
    minutes: np.ndarray
    shares: dict[str, np.ndarray]
    of_training: bool


class Line(NamedTuple):
    """One or several runs as a line with a band.

    Attributes:
        env_steps: float[T].
        minutes: float[T], mean over the runs.
        shares: float[runs, T] of each of `TITLES` that was recorded.
        of_training: as in `Curve`.
    """

    env_steps: np.ndarray
    minutes: np.ndarray
    shares: dict[str, np.ndarray]
    of_training: bool


def read(run: Path) -> Curve:
    """A run's evaluations, or else its training episodes.

    Raises:
        SystemExit: it has neither.
    """
    evaluations, progress = plots.columns(run / "eval" / "evaluations.csv"), plots.columns(run / "progress.csv")
    columns = {name: np.array(values) for name, values in (evaluations or progress).items()}
    names = {"success": "success_rate", "level 3": "level_3"} if evaluations else {"success": "rollout/success_rate"}
    known = ~np.isnan(columns.get(names["success"], np.zeros(0)))  # no training episode may have ended yet
    if not known.any():
        raise SystemExit(f"error: {run} has neither eval/evaluations.csv nor progress.csv, or nothing in them yet")
    shares = {title: columns[name][known] for title, name in names.items()}
    return Curve(columns["env_steps"][known], columns["seconds"][known] / 60, shares, not evaluations)


def join(stages: list[Curve]) -> Curve:
    """One curve of the trainings that a policy went through one after the other; what not all recorded is left out."""
    steps: list[np.ndarray] = []
    minutes: list[np.ndarray] = []
    ends = 0.0, 0.0
    for stage in stages:
        first = 1 if steps else 0  # a later stage begins one step after the end of the one before
        steps.append(ends[0] + np.maximum(stage.env_steps, first))
        minutes.append(ends[1] + stage.minutes)
        ends = steps[-1][-1], minutes[-1][-1]
    shares = {name: np.concatenate([s.shares[name] for s in stages]) for name in TITLES if all(name in s.shares for s in stages)}
    return Curve(np.concatenate(steps), np.concatenate(minutes), shares, any(stage.of_training for stage in stages))


def merge(curves: list[Curve]) -> Line:
    """Curves of one kind at every point that any of them has, as far as all of them go; in between they are straight."""
    first, last = max(c.env_steps[0] for c in curves), min(c.env_steps[-1] for c in curves)
    steps = np.unique(np.concatenate([c.env_steps for c in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    minutes = np.mean([np.interp(steps, c.env_steps, c.minutes) for c in curves], axis=0)
    shares = {name: np.array([np.interp(steps, c.env_steps, c.shares[name]) for c in curves]) for name in curves[0].shares}
    return Line(steps, minutes, shares, curves[0].of_training)


def lines_of(runs: tuple[str, ...]) -> dict[str, Line]:
    """Label -> line, in the order in which labels first come; training episodes have a line of their own.

    Raises:
        SystemExit: a run is not given as LABEL=DIRECTORY, or not there.
    """
    curves: dict[str, list[Curve]] = {}
    for word in runs:
        label, separator, patterns = word.partition("=")
        stages = [[path for path in map(Path, sorted(glob.glob(pattern))) if path.is_dir()] for pattern in patterns.split(",")]
        if not separator or not all(stages):
            raise SystemExit(f"error: --runs {word}: must be LABEL=DIRECTORY of a run that is there")
        if len({len(runs) for runs in stages}) > 1:
            raise SystemExit(f"error: --runs {word}: as many runs must match in each stage")
        for directories in zip(*stages, strict=True):
            curve = join([read(directory) for directory in directories])
            curves.setdefault(label + TRAINING * curve.of_training, []).append(curve)
    return {label: merge(group) for label, group in curves.items()}


def draw(lines: dict[str, Line], minutes: bool = True) -> Figure:
    """A row of two panels, over steps and minutes, for each of `TITLES` that any line has; without minutes all in one row."""
    names = [name for name in TITLES if any(name in line.shares for line in lines.values())]
    rows, columns = (len(names), 2) if minutes else (1, len(names))
    size = (11, 0.6 + 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex="col", sharey=True, squeeze=False, layout="constrained")
    palette = plt.colormaps["tab10" if len(lines) <= 10 else "tab20"]
    for panels, name in zip(axes if minutes else axes.T, names, strict=True):
        for i, (label, line) in enumerate(lines.items()):
            if name not in line.shares:
                continue
            shares, style, color = line.shares[name], "--" if line.of_training else "o-", palette(i)
            for axis, x in zip(panels, (line.env_steps / 1e6, line.minutes), strict=minutes):
                axis.plot(x, shares.mean(axis=0), style, color=color, markersize=3.5, label=label)
                if len(shares) > 1:
                    axis.fill_between(x, shares.min(axis=0), shares.max(axis=0), color=color, alpha=0.15, linewidth=0)
        panels[0].set_ylabel(TITLES[name])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set(xlim=(0, None), ylim=(-0.03, 1.03))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    for i, axis in enumerate(axes[-1]):
        axis.set_xlabel("minutes" if minutes and i == 1 else "environment steps, millions")
    handles, labels = axes[0, 0].get_legend_handles_labels()  # every line has its success
    _add_legend(figure, handles, labels)
    return figure


def _add_legend(figure: Figure, handles: list[Artist], labels: list[str]) -> None:
    """Below the panels, in as many columns as the figure is wide enough for."""
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def table(lines: dict[str, Line], minutes: bool = True) -> str:
    """Markdown: environment steps and minutes at the first point where each line's mean success is at least each of `MARKS`.

    A line goes as far as the shortest of its runs, and nothing is said of what comes after.
    """
    rows = [["success", *(f"{mark:.0%}" for mark in MARKS)], ["---"] * (1 + len(MARKS))]
    for label, line in lines.items():
        success, steps = line.shares["success"].mean(axis=0), [f"{n / 1e6:.2f} M" for n in line.env_steps]
        times = [f", {x:.0f} min" if minutes else "" for x in line.minutes]
        first = [np.flatnonzero(success >= mark)[:1] for mark in MARKS]
        rows.append([label, *(f"{steps[i[0]]}{times[i[0]]}" if i.size else f"not by {steps[-1]}" for i in first)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(flags: Flags) -> None:
    lines = lines_of(flags.runs)
    figure = draw(lines, flags.minutes)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(flags.out, dpi=120)
    plt.close(figure)
    print(table(lines, flags.minutes))


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
