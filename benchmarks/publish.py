"""Put a trained policy under `pretrained/`: its parameters and configuration, its report, a video and its training's records.

uv run -m benchmarks.publish --model-path runs/state/best_model --to pretrained/insertion-state
"""

import dataclasses
import shutil
from pathlib import Path

import tyro

from aloha_jax import checkpoints, cli, evaluation, judge
from aloha_jax.config import ConfigError
from aloha_jax.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to publish, and where."""

    model_path: str
    """A run (its best_model), its final_model, or one of its checkpoints."""
    to: Path
    """The new folder."""
    teacher: str | None = None
    """What to call the teacher, if there was one."""
    n_episodes: int = 500
    """Episodes in gym_aloha."""
    seed: int = 3_000_000
    """Seed of the first episode; evaluations of a run and after it start from others."""
    num_workers: int = 1
    """Processes that run them side by side."""


def main(flags: Flags) -> None:
    """Copy, judge, film."""
    cli.require_episodes(flags.n_episodes, flags.seed, flags.num_workers)
    if flags.to.exists():
        raise ConfigError(f"--to {flags.to} exists: choose another, or delete it yourself")
    policy = checkpoints.load_policy(flags.model_path)
    judge.require_judge()  # before anything is written
    run = checkpoints.run_of(Path(flags.model_path))
    # Nothing of where it was made, and nothing that a reader of the configuration would look for in vain.
    config = dataclasses.replace(
        policy.config,
        log_dir=f"runs/{flags.to.name}",
        teacher=flags.teacher,
        init_from=None,
        overwrite=False,
        resume=None,
        profile=None,
    ).validate()
    checkpoints.save_model(flags.to, Policy(config, policy.params, policy.stats))
    for note in flags.to.rglob("commit_success.txt"):  # Orbax writes the absolute path there
        note.write_text("Checkpoint commit was successful\n")
    done = 0

    def count(trajectory: judge.Trajectory) -> None:
        nonlocal done
        done += 1
        print(f"seed {trajectory.seed}: level {trajectory.levels.max()}, {done} of {flags.n_episodes}", flush=True)

    if run is not None:  # else a model that was copied out of its run
        for record in ("progress.csv", "eval/evaluations.csv"):
            source, copy = run / record, flags.to / record
            if source.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(source, copy)
    try:
        report = evaluation.evaluate(
            policy,
            "gym_aloha",
            flags.n_episodes,
            flags.seed,
            video=flags.to / "insertion.mp4",
            num_workers=flags.num_workers,
            on_episode=count,
            on_report=lambda report: report.write(flags.to / "report.json"),
        )
    except BaseException:
        if not (flags.to / "report.json").exists():  # or the same command would be refused
            shutil.rmtree(flags.to)
        raise
    print(
        f"success {report.success_rate:.1%} {report.success_interval}, clean {report.clean_rate:.1%}, jerk {report.mean_jerk:.0f}"
    )


if __name__ == "__main__":
    with cli.user_errors():
        main(tyro.cli(Flags))
