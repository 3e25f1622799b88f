"""What does not fit is refused before it is allocated, with what would fit."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from aloha_jax import memory
from aloha_jax.config import Config, ConfigError
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


def test_memory_of_this_machine_is_known() -> None:
    available = memory.available_memory()
    assert jax.default_backend() == "cpu"
    assert available is not None
    assert 10**9 < available < 10**14
    assert np.isfinite(available)
