"""Saving and loading. The only file that knows Orbax.

Every model directory holds `config.json`, a `policy` item (parameters and observation statistics) and its digest; a training
checkpoint `checkpoints/<step>` also holds a `run` item with the rest of the `RunState`, and as JSON in the item `config` its
configuration, the records' state and both digests. Arrays and JSON, nothing else: loading runs no code.
"""

import contextlib
import errno
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from aloha_jax.atomic import replacing
from aloha_jax.config import Config, ConfigError, require_single_precision
from aloha_jax.policy import Policy, init_params, init_stats

# Of what a run goes on from; to be raised with every change of `RunState` or of what it is paid for. Policies: FORMAT_VERSION.
RUN_FORMAT = 10
DIGEST = "policy.sha256"  # in a model directory
TRASH = ".deleted"  # in `checkpoints`


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found or read; the message says which, and why."""


class Checkpoint(NamedTuple):
    """What `CheckpointWriter.restore` reads.

    Attributes:
        step: environment steps.
        policy: parameters and observation statistics.
        run: the rest of the run's state.
        records: what else a run remembers, as JSON.
    """

    step: int
    policy: Any
    run: Any
    records: dict[str, Any]


class FirstOfEach:
    """Orbax preservation policy: keep the first checkpoint at or after each multiple of `period` steps.

    Orbax's `EveryNSteps` keeps exact multiples, which steps that come in rollouts hardly ever hit.
    """

    def __init__(self, period: int):
        self._period = period

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        periods = [checkpoint.step // self._period for checkpoint in checkpoints]
        return [period > 0 and period not in periods[:i] for i, period in enumerate(periods)]


class CheckpointWriter:
    """Writes `checkpoints/<step>` in the background, atomically.

    Keeps the newest three, the best of those with a score and, if asked to, the first of every `keep_period` steps.
    """

    def __init__(self, directory: Path, keep_period: int | None = None):
        keep: list[Any] = [
            # Never the best alone: the newest must stay, or the run could not be resumed from where it was.
            checkpoint_managers.LatestN(3),
            checkpoint_managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
        keep += [FirstOfEach(keep_period)] if keep_period else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            best_fn=_score,  # without it scores are not written, and a resumed run would not know which checkpoint was the best
            cleanup_tmp_directories=True,
            todelete_subdir=TRASH,  # moved there in one instant: a kill amid deleting must not leave half a checkpoint
        )
        self._directory = directory.absolute()
        with _Readable(self._directory):  # it reads every checkpoint's score
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._empty_trash()

    def save(
        self, step: int, config: Config, policy: Any, run: Any, score: float | None, records: Mapping[str, Any] | None = None
    ) -> None:
        """Start to save; returns once the arrays are copied. A higher `score` is better; without one it is never the best."""
        if step in self._manager.all_steps():
            return
        about = {
            "run_format": RUN_FORMAT,
            "config": config.to_json(),
            "records": dict(records or {}),
            "records_sha256": _json_digest(dict(records or {})),
            "sha256": {"policy": digest(policy), "run": digest(run)},
        }
        items = ocp.args.Composite(
            policy=ocp.args.StandardSave(policy), run=ocp.args.StandardSave(run), config=ocp.args.JsonSave(about)
        )
        with _Writable(self._directory / str(step)):
            self._manager.save(step, args=items, metrics=None if score is None else {"score": score})
        self._empty_trash()

    def restore(self, step: int | None, policy: Any, run: Any) -> Checkpoint:
        """The newest (or given) step, its trees in the structure of the two given.

        Raises:
            CheckpointError: there is none, or it does not have that structure.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"no complete checkpoint in {self._directory}")
        directory = self._directory / str(step)
        items = ocp.args.Composite(
            policy=ocp.args.StandardRestore(_abstract(policy)), run=ocp.args.StandardRestore(_abstract(run))
        )
        with _Readable(directory):
            about = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
            if about.get("run_format", 1) != RUN_FORMAT:
                version = about.get("run_format", 1)
                raise CheckpointError(f"{directory} has run format {version}; this program goes on from format {RUN_FORMAT} only")
            restored = self._manager.restore(step, args=items)
            for name, expected in about["sha256"].items():
                _require_digest(restored[name], expected)
            if _json_digest(about["records"]) != about["records_sha256"]:
                raise ValueError("its records are not those that were saved")
            return Checkpoint(step, restored.policy, restored.run, about["records"])

    def close(self) -> None:
        """Wait for the saves under way."""
        try:
            with _Writable(self._directory):
                self._manager.wait_until_finished()
                self._manager.close()
        finally:
            self._remove_unfinished()
            self._empty_trash()
            with contextlib.suppress(OSError):
                (self._directory / TRASH).rmdir()

    def _remove_unfinished(self) -> None:
        """Of a failed save, whose other threads may still be writing: until half a second brings nothing back, 5 at most."""
        deadline = time.monotonic() + 5.0
        quiet_until = 0.0
        while (now := time.monotonic()) < deadline:
            if unfinished := list(self._directory.glob("*.orbax-checkpoint-tmp*")):
                quiet_until = now + 0.5
                for directory in unfinished:
                    shutil.rmtree(directory, ignore_errors=True)
            elif now >= quiet_until:
                return
            time.sleep(0.05)

    def _empty_trash(self) -> None:
        for deleted in (self._directory / TRASH).glob("*"):
            shutil.rmtree(deleted, ignore_errors=True)


def save_model(directory: Path, policy: Policy) -> None:
    """Write a self-contained model directory; an older one there is replaced once the new one is complete."""
    tree = {"params": policy.params, "stats": policy.stats}
    with replacing(directory) as fresh:
        (fresh / "config.json").write_text(policy.config.to_json() + "\n")
        (fresh / DIGEST).write_text(digest(tree) + "\n")
        with _Writable(directory), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((fresh / "policy").absolute(), tree)


def load_policy(path: str | Path, flag: str = "--model-path") -> Policy:
    """Load a policy from a run (its best model, else its final one, else its newest checkpoint) or one of its models.

    Args:
        path: a run directory, its `best_model` or `final_model`, or one step of its `checkpoints`.
        flag: what the user gave it as, for messages.

    Raises:
        CheckpointError: there is nothing to load there, or it does not fit its configuration.
        ConfigError: its configuration is damaged or of another format version, or JAX computes with 64 bits.
    """
    require_single_precision()
    while True:
        directory = _find_model(Path(path), flag)
        before = os.stat(directory)
        try:
            return _load_model(directory)
        except (CheckpointError, ConfigError):  # a training may have put a better model in its place meanwhile
            if directory.exists() and os.path.samestat(before, os.stat(directory)):
                raise


def _load_model(directory: Path) -> Policy:
    config, sha256 = _read_config(directory)
    structure = jax.eval_shape(lambda: {"params": init_params(config, jax.random.key(0)), "stats": init_stats(config)})
    with _Readable(directory), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((directory / "policy").absolute(), _abstract(structure))
        _require_digest(tree, sha256)
    return Policy(config, tree["params"], tree["stats"])


def digest(tree: Any) -> str:
    """SHA-256 of the types, shapes and bits of a tree's arrays: Orbax itself does not notice a flipped bit in them."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf)
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def _json_digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def run_of(model: Path) -> Path | None:
    """The run that a model directory lies in, or is; None if it was copied out of it."""
    model = model.absolute()
    near = (model, *model.parents[:2])  # <run>, <run>/best_model, <run>/checkpoints/<step>
    return next((p for p in near if (p / "checkpoints").is_dir() and (p / "config.json").is_file()), None)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    steps = [p for p in (run / "checkpoints").glob("*") if p.name.isdigit() and (p / "policy").is_dir()]
    return max(steps, key=lambda p: int(p.name), default=None)


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the `policy` and the `run` of a training checkpoint, as they were saved."""
    return dict(_read_about(checkpoint)["sha256"])


def _read_about(checkpoint: Path) -> Any:
    with _Readable(checkpoint), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore((checkpoint / "config").absolute())


def _find_model(path: Path, flag: str) -> Path:
    if not path.exists():
        raise CheckpointError(f"{flag} {path} does not exist")
    candidates = [path, path / "best_model", path / "final_model", latest_checkpoint(path)]
    for candidate in candidates:
        if candidate is not None and (candidate / "policy").is_dir():
            return candidate
    raise CheckpointError(f"{flag} {path} holds no model: give a run, its best_model, final_model or a checkpoints/<step>")


def _read_config(directory: Path) -> tuple[Config, str | None]:
    """The configuration of a model, and the digest of its policy if it was written down."""
    if (directory / "config.json").exists():
        config = Config.load(directory / "config.json")
        with _Readable(directory):
            return config, (directory / DIGEST).read_text().strip() if (directory / DIGEST).exists() else None
    about = _read_about(directory)
    with _Readable(directory):
        text, sha256 = about["config"], about.get("sha256", {}).get("policy")
    return Config.from_json(text, f"{directory}/config"), sha256


def _require_digest(tree: Any, expected: str | None) -> None:
    if expected is not None and digest(tree) != expected:
        raise ValueError("its arrays are not those that were saved")


def _abstract(tree: Any) -> Any:
    """Shapes and types of a tree, on the default device whatever device it was saved from."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _score(metrics: Any) -> float:
    try:
        return float(metrics["score"])
    except (KeyError, TypeError, ValueError):  # damaged; it ranks old checkpoints, no more
        return -math.inf


class _Writable:
    """Turns what Orbax and TensorStore raise where nothing can be written into the OSError that Python would raise."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            if isinstance(error, Exception) and os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(self._path)) from error


class _Readable:
    """Turns whatever Orbax raises on a damaged or foreign checkpoint into a CheckpointError that names it."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        own = isinstance(error, (CheckpointError, ConfigError))
        if own or not isinstance(error, Exception) or getattr(error, "errno", None) in (errno.EROFS, errno.EACCES, errno.ENOSPC):
            return
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"cannot load {self._directory}, which is damaged or does not fit its configuration: {reason}"
        ) from error


def silence_orbax() -> None:
    """For the rest of a program's life: what Orbax has to say beside what it raises, which is told in one sentence."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # After the first array that cannot be read or written, Orbax abandons the others. Their errors asyncio would print,
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook, is_coroutine = sys.unraisablehook, inspect.iscoroutine  # `inspect` has lost its names by the time Python exits

    def unraisable(event: Any) -> None:  # and Python that they are left behind
        if not is_coroutine(event.object) and "Event loop is closed" not in str(event.exc_value):
            hook(event)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
