"""Trainings that are killed, and what must be true of the run directory whenever that happens."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import jax

from aloha_jax import checkpoints

ROOT = Path(__file__).parents[1]
TIME_COLUMNS = ("seconds", "time/sps")


def start_training(*args: str, log: Path | None = None) -> subprocess.Popen[str]:
    """A `train.py` of its own, on the CPU; it shares this process's compilation cache, if there is one."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if cache := jax.config.values["jax_compilation_cache_dir"]:
        shortest = str(jax.config.values["jax_persistent_cache_min_compile_time_secs"])
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": shortest}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    with (log or Path(os.devnull)).open("a") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)


def complete_checkpoints(run: Path) -> list[Path]:
    """Every directory that looks like a complete checkpoint, oldest first."""
    return sorted((p for p in (run / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def rows(file: Path) -> list[dict[str, str]]:
    """Of a CSV file, without what depends on the clock."""
    with file.open(newline="") as lines:
        return [{name: value for name, value in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(lines)]


def require_whole(run: Path) -> None:
    """Whatever `eval.py` or `--resume` would pick up loads, down to its digest; raises `CheckpointError` if not."""
    models = [run / name for name in ("best_model", "final_model") if (run / name).exists()]
    for model in models + complete_checkpoints(run)[-1:]:
        checkpoints.load_policy(model)
    for checkpoint in complete_checkpoints(run)[:-1]:
        assert set(checkpoints.digests(checkpoint)) == {"policy", "run"}
        assert (checkpoint / "policy" / "manifest.ocdbt").is_file()
        assert (checkpoint / "run" / "manifest.ocdbt").is_file()


def assert_same_run(run: Path, other: Path) -> None:
    """Both ended in the same state to the last bit, parameters and worlds alike, and recorded the same on the way there."""
    newest, others_newest = checkpoints.latest_checkpoint(run), checkpoints.latest_checkpoint(other)
    assert newest is not None
    assert others_newest is not None
    assert newest.name == others_newest.name
    assert checkpoints.digests(newest) == checkpoints.digests(others_newest)
    for name in ("best_model", "final_model"):
        digests = [checkpoints.digest(tree) for tree in map(policy_tree, (run / name, other / name))]
        assert digests[0] == digests[1], name
    for file in ("progress.csv", "eval/evaluations.csv"):
        assert rows(run / file) == rows(other / file), file


def policy_tree(model: Path) -> dict[str, object]:
    policy = checkpoints.load_policy(model)
    return {"params": policy.params, "stats": policy.stats}
