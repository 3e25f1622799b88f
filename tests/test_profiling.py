"""A profile holds the updates it should, and a run that ends early still leaves one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aloha_jax.profiling import UPDATES, Profiler


@pytest.mark.parametrize("updates", [2, 1 + UPDATES, 3 + UPDATES])
def test_a_profile_is_written(tmp_path: Path, updates: int) -> None:
    profiler, step = Profiler(str(tmp_path)), jax.jit(jnp.sin)
    x = jnp.ones(3)
    for _ in range(updates):
        profiler.before_update()
        x = step(x)
        profiler.after_update(x)
    profiler.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_without_a_directory_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profiler = Profiler(None)
    for _ in range(3):
        profiler.before_update()
        profiler.after_update(None)
    profiler.close()
    assert list(tmp_path.iterdir()) == []
