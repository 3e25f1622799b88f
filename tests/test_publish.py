"""What is published of a run: the policy, what it is worth, how it was trained, and nothing of where."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from aloha_jax import checkpoints, evaluation
from aloha_jax.config import Config, ConfigError
from aloha_jax.pixels import RendererUnavailable
from benchmarks import publish
from tests.small_run import STATE, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory, STATE).directory


@pytest.mark.slow
def test_a_run_is_published_with_its_records_and_stands_alone(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "published"
    publish.main(publish.Flags(model_path=str(run), to=to, n_episodes=1))
    assert json.loads((to / "report.json").read_text())["n_episodes"] == 1
    assert (to / "insertion.mp4").stat().st_size > 0
    for record in ("progress.csv", "eval/evaluations.csv"):
        assert (to / record).read_bytes() == (run / record).read_bytes()
    assert Config.load(to / "config.json").log_dir == "runs/published"
    assert str(run.parent) not in "".join(path.read_text(errors="replace") for path in to.rglob("*") if path.is_file())
    elsewhere = shutil.move(to, tmp_path / "elsewhere")
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load_policy(elsewhere).params, checkpoints.load_policy(run).params)


def test_nothing_is_written_where_nothing_can_be_judged(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    flags = publish.Flags(model_path=str(run), to=tmp_path / "published", n_episodes=1)
    with pytest.raises(RendererUnavailable):
        publish.main(flags)
    assert not flags.to.exists()


def test_a_film_that_fails_leaves_report_and_records_and_a_judging_that_does_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = publish.Flags(model_path=str(run), to=tmp_path / "published", n_episodes=1)

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish.main(flags)
    assert not flags.to.exists()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def in_c(policy: Any, simulator: str, *args: Any, **options: Any) -> Any:
        return evaluate(policy, "c", *args, **options)

    monkeypatch.setattr(evaluation, "evaluate", in_c)
    monkeypatch.setattr(evaluation, "write_mp4", full)
    with pytest.raises(OSError, match="No space left"):
        publish.main(flags)
    assert (flags.to / "report.json").is_file()
    assert (flags.to / "eval" / "evaluations.csv").is_file()


def test_what_is_published_already_stays(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--to .* exists"):
        publish.main(publish.Flags(model_path=str(run), to=tmp_path, n_episodes=1))
