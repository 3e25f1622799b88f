"""A training, from what was asked for to what is there at its end: checks, directory, run, judge, summary."""

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from aloha_jax import checkpoints, evaluation, judge, origins
from aloha_jax.config import Config
from aloha_jax.env import Env
from aloha_jax.evaluation import Report
from aloha_jax.factory import make_from_config
from aloha_jax.memory import require_memory
from aloha_jax.metrics import MetricsLogger, judging, report_table, summary_table
from aloha_jax.profiling import require_profile
from aloha_jax.run import Run
from aloha_jax.run_directory import alone_in, check_directory, identity, prepare_directory, require_same, write_down
from aloha_jax.signals import Interrupted, StopRequest

FINAL_SEED = 2_000_000  # the judge's; evaluations during training start from `run.EVALUATION_SEED`


def execute(config: Config, resume: bool = False) -> Path:
    """Train as configured, judge the result and print where everything is; returns the run directory."""
    with contextlib.ExitStack() as claims:
        config, env = prepare(config, resume, claims)
        return _train_and_judge(config, resume, env)


def prepare(config: Config, resume: bool, claims: contextlib.ExitStack) -> tuple[Config, Env]:
    """What is wrong or missing shows here, before anything is deleted or written; then the directory, and it is ours alone."""
    directory = Path(config.log_dir)
    if not resume:
        check_directory(config)
    existed = claims.enter_context(alone_in(directory))
    require_memory(config)
    if config.final_eval_episodes:
        judge.require_judge()
    if resume:
        origins.load_teacher(config)  # it goes on under the saved configuration
    else:
        config = origins.with_teachers_grip(config)
        origins.load_initial(config)
    require_profile(config)
    env = make_from_config(config)
    if env.renderer is not None:  # other pictures would be another task: a run that is resumed has these, or says why not
        config = dataclasses.replace(config, renderer=env.renderer.name)
    if resume:
        write_down(config, directory)
    else:
        if not existed:  # meanwhile it may
            claims.enter_context(alone_in(directory))
        prepare_directory(config)
        claims.enter_context(alone_in(directory))  # the new one; the other is deleted
    return config, env


def _train_and_judge(config: Config, resume: bool, env: Env) -> Path:
    directory = Path(config.log_dir)
    go_on, again = (
        f"stopped; to go on: uv run train.py --resume {shlex.quote(str(directory))}",
        "stopped before there was a checkpoint: start it again, with --overwrite",
    )
    with StopRequest(go_on, go_on if checkpoints.latest_checkpoint(directory) is not None else again) as stop:
        run = Run(config, directory, resume, env=env)
        try:
            with contextlib.closing(run):
                run.train(stop)
                seconds = run.logger.seconds
        except Exception:  # whatever went wrong first, this would be why
            run.require_directory()
            raise
        # From here on a signal ends the program at once, with these words; one that came before is seen below.
        stop.early_farewell = go_on
        stop.nothing_to_save = True
        if stop.signum is not None:
            raise Interrupted(stop.signum, stop.farewell)
        console = run.logger.console
        paths = {
            "env steps": f"{run.env_steps:,} in {seconds / 60:.1f} minutes",
            "best model": directory / "best_model",
            "final model": directory / "final_model",
            "learning curve": directory / "learning_curve.png",
            "TensorBoard": f"tensorboard --logdir {shlex.quote(str(directory / 'tensorboard'))}",
        }
        if config.final_eval_episodes:
            report, video = final_evaluation(config, directory, run.logger)
            console.print(report_table(report))
            paths |= {"report": directory / "eval" / "report.json"} | ({"video": video} if video else {})
    paths["evaluate"] = f"uv run eval.py --model-path {shlex.quote(str(directory / 'best_model'))}"
    console.print(summary_table("done", paths))
    return directory


def final_evaluation(config: Config, directory: Path, logger: MetricsLogger) -> tuple[Report, Path | None]:
    """Judge the best model in gym_aloha; writes `eval/report.json` and a video."""
    policy = checkpoints.load_policy(directory / "best_model")
    video = directory / "eval" / "videos" / "best_model.mp4" if config.final_video else None
    before = identity(directory)
    with judging(logger.console, config.final_eval_episodes) as show:

        def on_episode(trajectory: judge.Trajectory) -> None:
            require_same(directory, before)
            show(trajectory)

        def on_report(report: Report) -> None:
            require_same(directory, before)
            report.write(directory / "eval" / "report.json")

        options: dict[str, Any] = {"video": video, "on_episode": on_episode, "on_report": on_report}
        report = evaluation.evaluate(policy, "gym_aloha", config.final_eval_episodes, FINAL_SEED, **options)
    return report, video
