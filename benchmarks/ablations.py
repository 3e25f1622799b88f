"""What is each choice of a recipe worth? Trainings that differ from a preset in one thing, at an equal budget.

    uv run -m benchmarks.ablations --json ablations.json                       # those that see the state
    uv run -m benchmarks.ablations --teacher pretrained/insertion-scratch      # those that see pixels, too
    uv run -m benchmarks.ablations --only state state-joint --seeds 0 1 --total-timesteps 1000000
    uv run -m benchmarks.ablations --no-train                                  # the table of what there is

They run one after another, every seed of the first before the second's. Called again, those that are finished are skipped and
those that were cut off go on from their newest checkpoint. The table has each run's last evaluation: 64 episodes without noise
from the task's own starts, under the run's own physics and episode length.
"""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import tyro

from aloha_jax import atomic, checkpoints, cli, origins, plots
from aloha_jax.config import Config, ConfigError
from aloha_jax.presets import PRESETS

TRAIN = Path(__file__).parents[1] / "train.py"
EVALUATION_EPISODES = 64
CHECKPOINTS = 4  # per training: seldom, for they only serve to go on after an interruption
LEVELS = ("level_1", "level_2", "level_3", "level_4")
# What two runs of the same ablation may differ in: nothing of it reaches what is learned.
INCIDENTAL = (
    *("log_dir", "resume", "overwrite", "device", "profile"),
    *("checkpoint_freq", "keep_period", "final_eval_episodes", "final_video"),
)

Row = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A training and how it differs from its recipe."""

    recipe: str
    """The preset whose budget it has."""
    what: str
    """What is different, for the table."""
    flags: tuple[str, ...] = ()
    """Flags of `train.py`; those that they repeat are the recipe's."""
    taught: bool = False
    """Whether it needs --teacher."""


def _pixels(what: str, *flags: str) -> Ablation:
    """The pixel recipe and its teacher, with other pictures."""
    return Ablation("pixels", what, flags, taught=True)


def _whole_frame(height: int, width: int) -> Ablation:
    size = ("--image-height", str(height), "--image-width", str(width))
    return _pixels(f"{height}×{width} pixels of the whole frame", "--crop", "None", *size)


ABLATIONS: dict[str, Ablation] = {
    "state": Ablation("state", "the recipe"),
    "state-absolute": Ablation("state", "absolute actions", ("--action", "absolute")),
    "state-shaped": Ablation("state", "the guide's reward", ("--reward", "shaped")),
    "state-joint": Ablation("state", "one network for both arms", ("--network", "joint")),
    "state-task-starts": Ablation("state", "no expert states", ("--start-states", "task")),
    "state-one-bin": Ablation("state", "advantages whitened all together", ("--advantage-bins", "1")),
    "state-half": Ablation("state", "half of the episodes from expert states", ("--start-share", "0.5")),
    "state-average": Ablation("state", "a running average is judged", ("--average-decay", "0.98")),
    # Where the guide, which sees pixels, has nothing to say: observations are whitened and physics is cheap as in the recipe, and
    # its rollouts of 8192 steps come from 64 worlds instead of 4, which is several times as fast.
    "state-guide": Ablation(
        "state",
        "the guide's recipe",
        (
            *("--preset", "guide", "--obs", "state", "--normalize-obs", "--physics", "fast"),
            *("--n-envs", "64", "--n-steps", "128"),
        ),
    ),
    "pixels": _pixels("the recipe: 72×120 pixels of the table"),
    "pixels-64x64": _whole_frame(64, 64),
    "pixels-84x84": _whole_frame(84, 84),
    "pixels-120x160": _whole_frame(120, 160),
    "pixels-cheap": _pixels("cheap physics and pictures", "--physics", "fast", "--render-quality", "fast"),
    "pixels-cheap-physics": _pixels("cheap physics", "--physics", "fast"),
    "pixels-no-shadows": _pixels("pictures without shadows", "--render-quality", "fast"),
    "pixels-few-worlds": _pixels("128 worlds of 16 steps", "--n-envs", "128", "--n-steps", "16"),
    "pixels-no-state": _pixels("the state is not predicted", "--state-coef", "0"),
    "pixels-untaught": Ablation("pixels-ppo", "PPO without a teacher"),
    "pixels-untaught-no-state": Ablation("pixels-ppo", "the same, the state is not predicted", ("--state-coef", "0")),
    "pixels-untaught-own-critic": Ablation(
        "pixels-ppo", "the same, its critic sees pixels", ("--state-coef", "0", "--no-privileged-critic")
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to train, how long, and where the results go."""

    only: tuple[str, ...] = ()
    """Names of ablations; by default those that see the state, and with --teacher all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds of each."""
    total_timesteps: int | None = None
    """Environment steps of every training; by default those of the preset."""
    evaluations: int = 10
    """During each training, beside the one of the untrained policy. One costs its 64 episodes' steps."""
    teacher: str | None = None
    """A run or model trained with --obs state, for those that see pixels."""
    out: Path = Path("runs/ablations")
    """Runs go into <name>/<seed> there."""
    train: bool = True
    """Train what is missing; --no-train only makes the table."""
    json: Path | None = None
    """Write the figures to this file."""

    @property
    def names(self) -> tuple[str, ...]:
        """The ablations meant.

        Raises:
            ConfigError: one does not exist, or lacks its teacher.
        """
        names = self.only or tuple(name for name, ablation in ABLATIONS.items() if self.teacher or ablation.recipe == "state")
        for name in names:
            if name not in ABLATIONS:
                raise ConfigError(f"--only {name}: there is no such ablation; there are {', '.join(ABLATIONS)}")
            if ABLATIONS[name].taught and self.teacher is None:
                raise ConfigError(f"--teacher is needed by {name}: give a run or model trained with --obs state")
        return names

    def directory(self, name: str, seed: int) -> Path:
        """Where that training goes."""
        return self.out / name / str(seed)

    def budget(self, name: str) -> int:
        """Environment steps of that training."""
        return self.total_timesteps or PRESETS[ABLATIONS[name].recipe].total_timesteps


def train_flags(flags: Flags, name: str, seed: int) -> list[str]:
    """The flags with which `train.py` begins a training."""
    ablation, budget = ABLATIONS[name], flags.budget(name)
    own = ablation.flags if "--preset" in ablation.flags else ("--preset", ablation.recipe, *ablation.flags)
    teacher = ("--teacher", str(flags.teacher)) if ablation.taught else ()
    records = {
        "seed": seed,
        "total-timesteps": budget,
        "eval-freq": max(1, budget // flags.evaluations),
        "eval-episodes": EVALUATION_EPISODES,
        "checkpoint-freq": max(1, budget // CHECKPOINTS),
        "final-eval-episodes": 0,
        "log-dir": flags.directory(name, seed),
    }
    return [*own, *teacher, *(word for flag, value in records.items() for word in (f"--{flag}", str(value)))]


def what_is_left(directory: Path, wanted: list[str]) -> list[str] | None:
    """The flags with which `train.py` begins this training or goes on with it; None if it is finished.

    Raises:
        ConfigError: the run there has other settings.
    """
    if not (directory / "config.json").exists():
        return wanted
    saved = Config.load(directory / "config.json")
    config = origins.with_teachers_grip(cli.parse_config(wanted)[0])
    for field in dataclasses.fields(Config):
        old, new = getattr(saved, field.name), getattr(config, field.name)
        if new not in (old, "auto") and field.name not in INCIDENTAL:  # a run writes down what `auto` found
            flag = f"--{field.name.replace('_', '-')}"
            raise ConfigError(f"{directory} was trained with {flag} {old}, not {new}: delete it, or choose another --out")
    if (directory / "final_model").exists():
        return None
    if checkpoints.latest_checkpoint(directory) is None:
        return [*wanted, "--overwrite"]
    return ["--resume", str(directory)]


def train(args: list[str]) -> int:
    """Run `train.py`; returns its exit status, which is at least 128 if a signal ended it in good order."""
    print(shlex.join(["train.py", *args]), flush=True)
    process = subprocess.Popen([sys.executable, str(TRAIN), *args])
    # It is the training that has something to save. A terminal sends it Ctrl-C by itself.
    old = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number)),
    }
    try:
        return process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def last_evaluation(directory: Path) -> Row | None:
    """Environment steps, seconds, success and levels of a run's newest evaluation."""
    columns = plots.columns(directory / "eval" / "evaluations.csv")
    return {name: columns[name][-1] for name in ("env_steps", "seconds", "success_rate", *LEVELS)} if columns else None


def results(flags: Flags) -> dict[str, dict[str, Row]]:
    """Per ablation the last evaluation of each seed, and of those at the end of their budget the `mean`."""
    found = {}
    for name in flags.names:
        runs = {str(seed): last_evaluation(flags.directory(name, seed)) for seed in flags.seeds}
        rows = {seed: row for seed, row in runs.items() if row is not None}
        finished = [row for row in rows.values() if row["env_steps"] >= flags.budget(name)]
        mean = {column: sum(row[column] for row in finished) / len(finished) for column in finished[0]} if finished else None
        found[name] = rows | ({"mean": mean} if mean else {})
    return found


def table(found: dict[str, dict[str, Row]]) -> str:
    """`results` in Markdown: a line per run, and a bold one per ablation for the mean of its finished runs."""
    lines = [
        "| ablation | what | seed | env steps | minutes | level 1 | level 2 | level 3 | level 4 = success |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for seed, row in rows.items():
            cells = [f"{row['env_steps'] / 1e6:.2f} M", f"{row['seconds'] / 60:.1f}", *(f"{row[level]:.0%}" for level in LEVELS)]
            cells = [name, ABLATIONS[name].what, seed, *cells]
            lines.append(f"| {' | '.join(f'**{cell}**' if seed == 'mean' else cell for cell in cells)} |")
    return "\n".join(lines)


def write_json(flags: Flags, found: dict[str, dict[str, Row]], path: Path) -> None:
    figures = {
        name: {
            "what": ABLATIONS[name].what,
            "flags": shlex.join(ABLATIONS[name].flags),
            "total_timesteps": flags.budget(name),
            "seeds": {seed: row for seed, row in rows.items() if seed != "mean"},
            "mean": rows.get("mean"),
        }
        for name, rows in found.items()
    }
    atomic.write_text(path, json.dumps({"evaluation_episodes": EVALUATION_EPISODES, "ablations": figures}, indent=2) + "\n")


def main(flags: Flags) -> int:
    """Train what is missing, print the table; returns 1 if a training failed, or the status of one that a signal ended."""
    status = 0
    if flags.evaluations < 1:
        raise ConfigError(f"--evaluations must be at least 1, got {flags.evaluations}")
    if flags.json is not None:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        cli.require_writable("--json", flags.json, in_place=True)
    wanted = {(name, seed): train_flags(flags, name, seed) for name in flags.names for seed in flags.seeds}
    left = {run: what_is_left(flags.directory(*run), args) for run, args in wanted.items()}  # complaints come before any training
    for (name, seed), args in left.items() if flags.train else ():
        if args is None:
            continue
        ended = train(args)
        if ended < 0 or ended >= 128:
            print("stopped; the same command goes on", file=sys.stderr)
            return 128 - ended if ended < 0 else ended
        if ended:
            status = 1
            print(f"error: {name}, seed {seed}, ended with exit status {ended}; going on with the others", file=sys.stderr)
    found = results(flags)
    print(table(found))
    if flags.json is not None:
        write_json(flags, found, flags.json)
    return status


if __name__ == "__main__":
    with cli.user_errors(trains=True):
        sys.exit(main(tyro.cli(Flags, description=__doc__)))
