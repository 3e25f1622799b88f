"""Learning curves from a run's CSV files. The only file that knows matplotlib."""

import csv
from pathlib import Path


def columns(path: Path) -> dict[str, list[float]]:
    """Columns of a CSV file of numbers; empty fields become NaN."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}


def learning_curve(run_dir: Path) -> Path:
    """Draw `learning_curve.png` from `progress.csv` and `eval/evaluations.csv`; returns its path."""
    # A quarter of a program's start, and who evaluates or asks for help draws nothing.
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    progress, evaluations = columns(run_dir / "progress.csv"), columns(run_dir / "eval" / "evaluations.csv")
    figure = Figure(figsize=(13, 3.8))  # not pyplot's, which would choose a notebook's backend
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.125, top=0.92, wspace=0.11)  # a layout engine draws twice
    axes = figure.subplots(1, 3)
    for axis, title in zip(axes, ("reward per episode", "highest level reached", "share of evaluation episodes"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("environment steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 2.5M: whole numbers run into each other
        axis.grid(alpha=0.3)
    reward, level, share = axes
    if progress:
        reward.plot(progress["env_steps"], progress["rollout/ep_rew_mean"], label="training", color="tab:blue", alpha=0.6)
        level.plot(progress["env_steps"], progress["rollout/ep_level_mean"], label="training", color="tab:blue", alpha=0.6)
    if evaluations:
        steps = evaluations["env_steps"]
        reward.plot(steps, evaluations["mean_train_reward"], "o-", label="evaluation", color="tab:orange")
        level.plot(steps, evaluations["mean_max_reward"], "o-", label="evaluation", color="tab:orange")
        for k in range(1, 5):
            label = "success (level 4)" if k == 4 else f"level {k}"
            share.plot(steps, evaluations[f"level_{k}"], "o-", label=label, color=colormaps["viridis"](k / 4 - 0.2))
    level.set_ylim(-0.1, 4.1)
    share.set_ylim(-0.05, 1.05)
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best", fontsize="small")
    path = run_dir / "learning_curve.png"
    unfinished = path.with_name(".learning_curve.part.png")
    figure.savefig(unfinished, dpi=120)
    unfinished.replace(path)
    return path
