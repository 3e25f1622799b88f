"""Calls to the host: what comes back, and what is said of a function that does not keep its promise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aloha_jax.host import call_host

THREE = jax.ShapeDtypeStruct((3,), jnp.float32)


def compiled(function: Callable[..., Any], result: Any) -> Any:
    return jax.jit(lambda *args: call_host(function, result, *args))


def test_pytrees_go_out_and_come_back() -> None:
    def both(x: np.ndarray, rest: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        assert type(x) is type(rest["y"]) is np.ndarray
        return x + rest["y"], {"twice": 2 * x[None]}

    result = (THREE, {"twice": jax.ShapeDtypeStruct((1, 3), jnp.float32)})
    total, rest = compiled(both, result)(jnp.arange(3.0), {"y": jnp.ones(3)})
    np.testing.assert_array_equal(total, [1, 2, 3])
    np.testing.assert_array_equal(rest["twice"], [[0, 2, 4]])


def test_each_step_of_a_scan_sees_the_one_before() -> None:
    """The program's memory is used again and again: what was read before must not change, nor be read too late."""
    step = lambda x, _: (call_host(lambda x: x * 2 + 1, THREE, x), x)  # noqa: E731
    last, seen = jax.jit(lambda x: jax.lax.scan(step, x, length=5))(jnp.zeros(3))
    np.testing.assert_array_equal(seen[:, 0], [0, 1, 3, 7, 15])
    np.testing.assert_array_equal(last, [31] * 3)


def raises(x: np.ndarray) -> np.ndarray:
    raise RuntimeError("the renderer is gone")


def writes(x: np.ndarray) -> np.ndarray:
    x[0] = 1
    return x


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raises, "the renderer is gone"),
        (writes, "read-only"),
        (lambda x: x[:1], r"float32\(1,\) is not float32\(3,\)"),
        (lambda x: x.astype(np.float64), "float64"),
        (lambda x: (x, x), "longer"),
    ],
)
def test_what_goes_wrong_is_told(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        compiled(function, THREE)(jnp.zeros(3)).block_until_ready()


def test_outside_of_a_program_only_the_first_call_compiles(caplog: pytest.LogCaptureFixture) -> None:
    def double(x: np.ndarray) -> np.ndarray:
        return np.asarray(x) * 2

    x = jnp.ones(3)
    with jax.log_compiles():
        np.testing.assert_array_equal(call_host(double, THREE, x), [2, 2, 2])
        assert "Compiling" in caplog.text
        caplog.clear()
        call_host(double, THREE, x)
    assert "Compiling" not in caplog.text
