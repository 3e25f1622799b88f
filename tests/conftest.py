"""The suite runs on the CPU, under JAX's strict modes, and remembers between runs what it compiled."""

import importlib.metadata
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MUJOCO_GL", "egl")
# Most of the suite is compilation, of programs that then run for an instant. Unoptimised, it takes two thirds of the time;
# without the emitters that turn every fusion into a kernel by MLIR, programs compile in half of that. JAX 0.11 ends at once, and
# without a word that pytest would show, where it is told to do without them.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    )
)

import jax
import pytest

from aloha_jax import checkpoints


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_debug_key_reuse", True)
    cache = getattr(config, "cache", None)  # there is none under `-p no:cacheprovider`
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session", autouse=True)
def silent_orbax() -> None:
    """As in the programs: what it has to say beside what it raises would fail other tests."""
    checkpoints.silence_orbax()


@pytest.fixture
def rank_promotion() -> Iterator[None]:
    """For tests that run MJX's `jax` implementation, which relies on implicit rank promotion."""
    with jax.numpy_rank_promotion("allow"):
        yield
