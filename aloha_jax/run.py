"""One run: its loop and its records."""

import contextlib
import functools
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aloha_jax import checkpoints, evaluation, hints, origins, plots, startup, training
from aloha_jax.atomic import replacing
from aloha_jax.checkpoints import CheckpointError, CheckpointWriter
from aloha_jax.config import Config
from aloha_jax.env import Env
from aloha_jax.factory import make_from_config
from aloha_jax.metrics import MetricsLogger
from aloha_jax.networks import num_parameters
from aloha_jax.pixels import Renderer, RendererUnavailable, make_renderer
from aloha_jax.pixels.egl import EglRenderer, num_gpus
from aloha_jax.policy import Policy
from aloha_jax.profiling import Profiler
from aloha_jax.run_directory import identity, require_same, write_down
from aloha_jax.signals import Interrupted, StopRequest
from aloha_jax.training import RunState
from aloha_jax.trials import Abandoned, EngineEvaluator, Trial

EVALUATION_SEED = 1_000_000  # evaluations during training; those after it start from `launch.FINAL_SEED`

# Train steps in a row with gradients that are not finite, after which a run gives up.
MAX_BROKEN_UPDATES = 3
DUMP = "diverged"  # where in the run the state before the last of them is kept

DRAWING_INTERVAL = 30.0  # seconds at least from one drawing of the learning curve to the next: one takes half a second of a core

VIDEO_SHAPE = (120, 160)  # height, width of an evaluation's, where the policy sees no pictures


class Diverged(RuntimeError):
    """Training broke down; the message says where to look and what to change."""


class Run:
    """Trains, evaluates and saves; `train` does all of it, and `close` ends it. Takes over `env`, by default that of `config`."""

    def __init__(self, config: Config, directory: Path, resume: bool = False, quiet: bool = False, env: Env | None = None):
        self.config, self.directory = config, directory
        self._identity = identity(directory)
        self.env: Env = env or make_from_config(config)
        eval_env = make_from_config(config, config.eval_episodes, autoreset=False, renderer=self.env.renderer)
        self.evaluator = EngineEvaluator(config, eval_env)
        teacher = origins.load_teacher(config)
        self._teacher_sha256 = None if teacher is None else checkpoints.digest((teacher.params, teacher.stats))
        self.train_step = training.make_train_step(config, self.env, teacher=teacher)
        self.writer = CheckpointWriter(directory / "checkpoints", config.keep_period)
        self.state: RunState = training.init_run(config, self.env)
        self.best_score = -1.0
        self._score: float | None = None  # of the policy as it stands, if it has been evaluated
        self._complained = False
        self._last_drawing = time.monotonic()  # of the learning curve; of so young a run there is nothing to draw
        self.profiler = Profiler(config.profile)
        self.broken_updates = 0  # in a row, up to the newest one whose metrics were read
        # Environment steps and metrics, not read yet, of the newest update, and when it was done (on an accelerator: begun).
        self._pending: tuple[int, Any, float] | None = None
        records = self._restore() if resume else {}
        initial = None if resume else origins.load_initial(config)
        if initial is not None:
            average = None if self.state.average is None else training.copy(initial.params)
            self.state = self.state._replace(params=initial.params, stats=initial.stats, average=average)
        # Restored arrays are committed to a device, fresh ones are not: a mixture would compile `train_step` twice.
        self.state = jax.device_put(self.state, jax.devices()[0])
        self.logger = MetricsLogger(directory, config.total_timesteps, self.env_steps, quiet, records)
        # An evaluation that was made up for has its row, and its policy is `best_model`, but no checkpoint came after it.
        columns = ("success_rate", "mean_max_reward", "mean_train_reward")
        for row in self.logger.earlier_evaluations:
            self.best_score = max(self.best_score, score(config.eval_episodes, *(float(row[name]) for name in columns)))
        if not (directory / "best_model").exists():  # in a replay of gradients that diverged none is kept
            self.best_score = -1.0

    @property
    def env_steps(self) -> int:
        """Environment steps done, over all worlds."""
        return int(self.state.update) * self.config.rollout_size

    @property
    def policy(self) -> Policy:
        """The policy as it stands; a copy, for `train_step` donates the original's buffers."""
        return Policy(self.config, *training.copy((self.state.judged, self.state.stats)))

    def require_directory(self) -> None:
        """Raises `ConfigError` if it is not where it was."""
        require_same(self.directory, self._identity)

    def train(self, stop: StopRequest | None = None) -> None:
        """Run to `config.total_timesteps`; leaves `final_model`, the last checkpoint and the learning curve.

        Raises:
            Interrupted: `stop` was asked for; everything is saved. An evaluation under way is given up, and made when resumed.
            Diverged: gradients were not finite in `MAX_BROKEN_UPDATES` updates in a row; they left no trace in the parameters.
        """
        config, first = self.config, int(self.state.update)

        def interrupted() -> bool:
            return stop is not None and stop.signum is not None

        self._print_start()
        if self._evaluation_is_due(first) and self.logger.last_evaluation < self.env_steps:
            self._evaluate(self.env_steps)  # at the start, or due when a signal ended the run
        for update in range(first + 1, config.num_updates + 1):
            self._train_step(update * config.rollout_size)
            self._score = None
            if update == first + 1:
                jax.block_until_ready(self.state)
                self.logger.console.print(f"first training step done {startup.seconds_since_start():.0f} s after the start")
            if stop is not None:
                stop.nothing_to_save = False
            if self._evaluation_is_due(update):
                with contextlib.suppress(Abandoned):
                    self._evaluate(update * config.rollout_size, interrupted)
            signum = None if stop is None else stop.signum  # once, for it may come at any time
            if signum or update == config.num_updates or self._crossed(config.checkpoint_freq, update):
                self._save()
            if stop is not None and signum is not None:
                self._draw()
                raise Interrupted(signum, stop.farewell)
        self._read_metrics()
        self.require_directory()
        checkpoints.save_model(self.directory / "final_model", self.policy)
        self._draw()

    def close(self) -> None:
        """Release the renderer, flush the records and wait for the checkpoints under way."""
        with contextlib.ExitStack() as closing:  # each of them, even if another fails
            closing.callback(self.profiler.close)
            closing.callback(self.writer.close)
            closing.callback(self.logger.close)
            closing.callback(self.env.close)
            if "_camera" in vars(self) and self._camera is not None and self._camera is not self.env.renderer:
                closing.callback(self._camera.close)

    def _crossed(self, interval: int, update: int) -> bool:
        """Whether this update was the one that crossed a multiple of so many environment steps."""
        size = self.config.rollout_size
        return (update - 1) * size // interval < update * size // interval

    def _evaluation_is_due(self, update: int) -> bool:
        return update in (0, self.config.num_updates) or self._crossed(self.config.eval_freq, update)

    def _train_step(self, env_steps: int) -> None:
        """One update; its metrics are read later, for reading them now would make the device wait for the host."""
        before = (training.copy(self.state), self._records()) if self.broken_updates else None
        self.profiler.before_update()
        self.state, metrics = self.train_step(self.state)
        self.profiler.after_update(metrics)
        self._read_metrics()
        if jax.default_backend() == "cpu":  # the update needs the cores that would do something else meanwhile
            jax.block_until_ready(metrics)
        self._pending = (env_steps, metrics, time.monotonic())
        if self.broken_updates:
            self._read_metrics()
        if self.broken_updates >= MAX_BROKEN_UPDATES:
            assert before is not None  # the first of them was known before the last began
            raise Diverged(self._dump(*before))

    def _read_metrics(self) -> None:
        """Log the newest update, if that has not been done."""
        if self._pending is None:
            return
        env_steps, metrics, finished = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        self.require_directory()
        self.logger.log_update(env_steps, metrics, finished)
        self.broken_updates = self.broken_updates + 1 if metrics["skipped_minibatches"] > 0 else 0

    def _dump(self, state: RunState, records: dict[str, Any]) -> str:
        """Keep the state from which an update broke down, as a run that `--resume` replays; returns what to tell the user."""
        directory = self.directory / DUMP
        with replacing(directory) as fresh:
            write_down(self.config, fresh)
            writer = CheckpointWriter(fresh / "checkpoints")
            self._save_to(writer, state, records)
            writer.close()
        replay = f"uv run train.py --resume {shlex.quote(str(directory))}"
        return (
            f"gradients were not finite in {MAX_BROKEN_UPDATES} updates in a row, up to {self.env_steps} steps: "
            f"lower --learning-rate or --max-grad-norm; `{replay}` replays it; the checkpoints are intact"
        )

    def _evaluate(self, env_steps: int, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._read_metrics()
        policy = self.policy
        trials = [Trial(EVALUATION_SEED + i) for i in range(self.config.eval_episodes)]
        outcomes = list(self.evaluator(policy, trials, interrupted=interrupted))
        self.require_directory()
        trajectories = [outcome.trajectory for outcome in outcomes]
        train_reward = float(np.mean([outcome.reward for outcome in outcomes]))
        report = evaluation.summarize(trajectories, "mjx" if self.config.engine == "mjx" else "c")
        self._score = score(report.n_episodes, report.success_rate, report.mean_max_reward, train_reward)
        if self._camera is not None:
            self.logger.log_video(env_steps, "eval/video", list(self._camera.render(trajectories[0].qpos[::2])))
        if self._score > self.best_score:
            self.best_score = self._score
            checkpoints.save_model(self.directory / "best_model", policy)
        # Behind the model, for a row says that it has been evaluated: killed in between, a run that is resumed does so again.
        self.logger.log_evaluation(env_steps, report, train_reward)
        if time.monotonic() - self._last_drawing > DRAWING_INTERVAL:
            self._draw()
        self._complain_once()
        self.logger.stop_clock()

    def _draw(self) -> None:
        plots.learning_curve(self.directory)
        self._last_drawing = time.monotonic()

    @functools.cached_property
    def _camera(self) -> Renderer | None:
        """What draws the evaluations' videos: the worlds' renderer, or if nobody sees pictures OpenGL, where that works."""
        if self.env.renderer is not None:
            return self.env.renderer
        try:
            return make_renderer("egl", self.config.task, *VIDEO_SHAPE, num_workers=1)
        except RendererUnavailable:
            return None

    def _complain_once(self) -> None:
        if not self._complained and (complaint := self.env.engine.complaint(self.state.env.physics)):
            self._complained = True
            self.logger.console.print(f"[yellow]warning:[/] {complaint}")

    def _save(self) -> None:
        self.require_directory()
        self._read_metrics()  # what a checkpoint stands for must be on the disk before it: nobody would make it again
        self.logger.flush()
        # Written in the background, while `train_step` donates the original.
        self._save_to(self.writer, training.copy(self.state), self._records(), self._score)
        self.logger.stop_clock()

    def _records(self) -> dict[str, Any]:
        """What a run remembers beside its state, as JSON."""
        return {
            "best_score": self.best_score,
            "broken_updates": self.broken_updates,
            "teacher_sha256": self._teacher_sha256,
            "logger": self.logger.records,
        }

    def _save_to(self, writer: CheckpointWriter, state: RunState, records: dict[str, Any], score: float | None = None) -> None:
        policy, rest = _policy_and_rest(state)
        writer.save(int(state.update) * self.config.rollout_size, self.config, policy, rest, score, records)

    def _restore(self) -> dict[str, Any]:
        """Take the newest checkpoint's state; returns the logger's."""
        saved = self.writer.restore(None, *_policy_and_rest(self.state))
        judged = {self.state.judged_field: saved.policy["params"]}
        self.state = saved.run["state"]._replace(stats=saved.policy["stats"], **judged)
        self.best_score = saved.records["best_score"]
        self.broken_updates = saved.records["broken_updates"]
        if saved.records["teacher_sha256"] != self._teacher_sha256:
            raise CheckpointError(
                f"--teacher {self.config.teacher} is no longer the model that this run has learned from: put that back, "
                f"or begin another run with --init-from {self.directory}"
            )
        logger: dict[str, Any] = saved.records["logger"]
        return logger

    def _print_start(self) -> None:
        config, device, console = self.config, jax.devices()[0], self.logger.console
        given = [
            hints.idle_gpu(config, device.platform, num_gpus()),
            hints.physics_on_cpu(config, device.platform),
            hints.lopsided_crop(config),
            hints.silent_teacher(config),
            hints.unheard_reward(config),
            hints.idle_settings(config),
        ]
        if isinstance(self.env.renderer, EglRenderer):
            console.print(f"OpenGL renderer: {self.env.renderer.gl_renderer}")
            given.append(hints.software_opengl(self.env.renderer.gl_renderer, num_gpus()))
        elif self.env.renderer is not None:
            console.print("pictures: ray tracing (MJX-Warp)")
        for hint in filter(None, given):
            console.print(f"[yellow]warning:[/] {hint}")
        observation = f"{config.image_height}x{config.image_width} {config.obs}" if config.has_pixels else config.obs
        console.print(
            f"[bold]aloha_jax[/] preset {config.preset} on {device.device_kind}: {observation}, {config.action} actions, "
            f"{config.reward} reward, {config.n_envs} worlds, {num_parameters(self.state.params):,} parameters"
        )
        if device.platform != "cpu":
            console.print("compiling; the first time on a machine this takes minutes")


def score(episodes: int, success_rate: float, mean_level: float, mean_reward: float) -> float:
    """Ranks evaluations of so many episodes: by success, then by mean level, then by mean training reward."""
    # Success and mean level move by 1/n at least, what comes after must weigh less: 4 levels of 1/5n, a reward of +-1/11n^2.
    return success_rate + mean_level / (5 * episodes) + float(np.tanh(mean_reward / 50)) / (11 * episodes**2)


def _policy_and_rest(state: RunState) -> tuple[Any, Any]:
    """The two items of a checkpoint: what `load_policy` reads, and the rest of the state, without what the first has."""
    judged: dict[str, Any] = {state.judged_field: None}
    rest = state._replace(stats={}, **judged)
    return {"params": state.judged, "stats": state.stats}, {"state": rest}
