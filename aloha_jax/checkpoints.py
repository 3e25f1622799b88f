"""Saving and loading. The only file that knows Orbax.

Every model directory holds `config.json` and a `policy` item (parameters and observation statistics); a training checkpoint
`checkpoints/<step>` also holds a `run` item with the rest of the `RunState`, and its configuration as the item `config`.
"""

import errno
import inspect
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from aloha_jax.config import Config, ConfigError
from aloha_jax.policy import Policy, init_params, init_stats

# Orbax reports every step of every save at INFO through absl, and errors that it also raises at ERROR.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found or read; the message says which, and why."""


class CheckpointWriter:
    """Writes `checkpoints/<step>` in the background, atomically; keeps the newest three and the best one."""

    def __init__(self, directory: Path):
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                # Never the best alone: the newest must stay, or the run could not be resumed from where it was.
                checkpoint_managers.LatestN(3),
                checkpoint_managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        # Without `best_fn` scores are not written, and a resumed run would not know which checkpoint was the best.
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_score, cleanup_tmp_directories=True)
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, config: Config, policy: Any, run: Any, score: float) -> None:
        """Start to save; returns once the arrays are copied. `score` ranks checkpoints (higher is better)."""
        items = ocp.args.Composite(
            policy=ocp.args.StandardSave(policy),
            run=ocp.args.StandardSave(run),
            config=ocp.args.JsonSave({"config": config.to_json()}),
        )
        if step not in self._manager.all_steps():
            with _Writable(self._directory / str(step)):
                self._manager.save(step, args=items, metrics={"score": score})

    def restore(self, step: int | None, policy: Any, run: Any) -> tuple[int, Any, Any]:
        """The newest (or given) step, and its trees in the structure of the two given.

        Raises:
            CheckpointError: there is none, or it does not have that structure.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"no complete checkpoint in {self._directory}")
        items = ocp.args.Composite(
            policy=ocp.args.StandardRestore(_abstract(policy)), run=ocp.args.StandardRestore(_abstract(run))
        )
        with _Readable(self._directory / str(step)):
            restored = self._manager.restore(step, args=items)
        return step, restored.policy, restored.run

    def close(self) -> None:
        """Wait for the saves under way."""
        try:
            with _Writable(self._directory):
                self._manager.wait_until_finished()
                self._manager.close()
        finally:
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)


def save_model(directory: Path, policy: Policy) -> None:
    """Write a self-contained model directory; an older one there is replaced once the new one is complete."""
    fresh = directory.with_name(f".{directory.name}.new")
    stale = directory.with_name(f".{directory.name}.old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        (fresh / "config.json").write_text(policy.config.to_json() + "\n")
        with _Writable(directory), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((fresh / "policy").absolute(), {"params": policy.params, "stats": policy.stats})
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if directory.exists():
        os.rename(directory, stale)
    os.rename(fresh, directory)
    shutil.rmtree(stale, ignore_errors=True)


def load_policy(path: str | Path, flag: str = "--model-path") -> Policy:
    """Load a policy from a run (its best model, else its final one, else its newest checkpoint) or one of its models.

    Args:
        path: a run directory, its `best_model` or `final_model`, or one step of its `checkpoints`.
        flag: what the user gave it as, for messages.

    Raises:
        CheckpointError: there is nothing to load there, or it does not fit its configuration.
        ConfigError: its configuration is damaged or of another format version.
    """
    directory = _find_model(Path(path), flag)
    config = _read_config(directory)
    structure = jax.eval_shape(lambda: {"params": init_params(config, jax.random.key(0)), "stats": init_stats(config)})
    with _Readable(directory), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((directory / "policy").absolute(), _abstract(structure))
    return Policy(config, tree["params"], tree["stats"])


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    steps = [p for p in (run / "checkpoints").glob("*") if p.name.isdigit() and (p / "policy").is_dir()]
    return max(steps, key=lambda p: int(p.name), default=None)


def _find_model(path: Path, flag: str) -> Path:
    if not path.exists():
        raise CheckpointError(f"{flag} {path} does not exist")
    candidates = [path, path / "best_model", path / "final_model", latest_checkpoint(path)]
    for candidate in candidates:
        if candidate is not None and (candidate / "policy").is_dir():
            return candidate
    raise CheckpointError(f"{flag} {path} holds no model: give a run, its best_model, final_model or a checkpoints/<step>")


def _read_config(directory: Path) -> Config:
    if (directory / "config.json").exists():
        return Config.load(directory / "config.json")
    with _Readable(directory), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        text = checkpointer.restore((directory / "config").absolute())["config"]
    return Config.from_json(text, f"{directory}/config")


def _abstract(tree: Any) -> Any:
    """Shapes and types of a tree, on the default device whatever device it was saved from."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _score(metrics: Any) -> float:
    return float(metrics["score"])


class _Writable:
    """Turns what Orbax and TensorStore raise on a full disk into the OSError that Python would raise."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path)) from error


class _Readable:
    """Turns whatever Orbax raises on a damaged or foreign checkpoint into a CheckpointError that names it."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (CheckpointError, ConfigError)) or not isinstance(error, Exception):
            return
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"cannot load {self._directory}, which is damaged or does not fit its configuration: {reason}"
        ) from error


def _without_stragglers(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """After the first array that cannot be read or written, Orbax abandons the others, which complain when they arrive."""

    def unraisable(event: Any) -> None:
        if not inspect.iscoroutine(event.object) and "Event loop is closed" not in str(event.exc_value):
            hook(event)

    return unraisable


sys.unraisablehook = _without_stragglers(sys.unraisablehook)
warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
