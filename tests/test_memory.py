"""What does not fit is refused before it is allocated, with what would fit."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from aloha_jax import memory, startup, training
from aloha_jax.config import Config, ConfigError
from aloha_jax.factory import make_from_config
from aloha_jax.presets import PRESETS

GUIDE = PRESETS["guide"]


@pytest.mark.parametrize("preset", ["cpu", "gpu", "smoke"])
def test_a_preset_fits_into_a_laptop(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 8 * 10**9)
    memory.require_memory(PRESETS[preset])


def test_the_guides_rollout_is_its_pixels() -> None:
    """4 worlds x 2048 steps x 480 x 640 x 3 bytes are 7.5 GB; and 139 M parameters are 0.56 GB, several times."""
    fixed, per_world = memory.estimate(GUIDE)
    pixels = 2048 * 480 * 640 * 3
    assert pixels <= per_world <= 2.1 * pixels
    assert 3 * 0.56e9 <= fixed <= 8e9


def test_two_views_and_a_running_average_need_more() -> None:
    plain, mirrored, averaged = (
        memory.estimate(dataclasses.replace(PRESETS["cpu"], **change))[0]
        for change in ({"network": "joint", "average_decay": 0.0}, {"average_decay": 0.0}, {"network": "joint"})
    )
    assert plain < mirrored < 2 * plain
    assert plain < averaged < 1.2 * plain


def test_an_evaluations_worlds_count() -> None:
    few, many = (memory.estimate(dataclasses.replace(PRESETS["pixels"], eval_episodes=episodes))[0] for episodes in (10, 10_010))
    assert many - few > 10_000 * 72 * 120 * 3


@pytest.mark.parametrize(
    "change",
    [{}, {"obs": "pixels_agent_pos", "observe_target": True, "history": (4, 100)}, {"obs": "state"}, {"network": "mirrored"}],
)
def test_a_rollout_and_its_worlds_are_no_larger_than_estimated(change: dict[str, Any]) -> None:
    config = dataclasses.replace(PRESETS["smoke"], **change)
    env = make_from_config(config)
    state = jax.eval_shape(lambda: training.init_run(config, env))
    after, _, collected = jax.eval_shape(training.make_train_step(config, env)._collect, state.env, state)
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((after.obs, after.final_obs, after.history, collected[1:])))
    _, per_world = memory.estimate(config)
    assert needed / config.n_envs < per_world < 3 * needed / config.n_envs
    if env.renderer is not None:
        env.renderer.close()


def test_the_largest_number_of_worlds_is_named_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 16 * 10**9)

    def config(n_envs: int) -> Config:
        return dataclasses.replace(PRESETS["gpu"], n_envs=n_envs, batch_size=32)

    with pytest.raises(
        ConfigError, match=r"^--n-envs 10000000 needs about \d+ GB of memory, and 16 GB are there: at most "
    ) as error:
        memory.require_memory(config(10_000_000))
    found = re.search(r"at most (\d+) fit", str(error.value))
    assert found is not None
    largest = int(found[1])
    memory.require_memory(config(largest))
    with pytest.raises(ConfigError):
        memory.require_memory(config(largest + 1))


def test_what_no_number_of_worlds_makes_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    with pytest.raises(ConfigError, match="none fits: lower"):
        memory.require_memory(GUIDE)
    monkeypatch.setattr(memory, "available_memory", lambda: 5 * 10**8)
    for preset in ("state", "pixels"):  # small, but for the program
        with pytest.raises(ConfigError, match=r"and 0\.50 GB are there: JAX and MuJoCo alone take 0\.[79]0 GB"):
            memory.require_memory(PRESETS[preset])


def test_memory_of_this_machine_is_known() -> None:
    available = memory.available_memory()
    assert jax.default_backend() == "cpu"
    assert available is not None
    assert 10**9 < available < 10**14
    assert np.isfinite(available)


def test_a_container_has_the_memory_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(startup, "CGROUP", tmp_path)
    whole = memory.available_memory()
    assert whole is not None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == whole
    (tmp_path / "memory.max").write_text("123456789\n")
    assert memory.available_memory() == 123456789


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("250000 100000", 3)])
def test_a_container_has_the_cores_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(startup, "CGROUP", tmp_path)
    assert startup.usable_cores() == 8
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert startup.usable_cores() == cores
