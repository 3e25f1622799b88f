"""Calls from inside a compiled program to functions on the host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import Buffer, ExecutionContext, buffer_callback


def call_host(function: Callable[..., Any], result: Any, *args: Any) -> Any:
    """`jax.pure_callback`; where the program runs on the CPU without its copies, which take most of a millisecond at every call.

    Args:
        function: pure, from arrays that `np.asarray` reads, which it must neither change nor keep (they may be the program's own
            memory), to NumPy arrays.
        result: a pytree of `jax.ShapeDtypeStruct` like what `function` returns.
        args: pytrees of arrays.

    Raises:
        jax.errors.JaxRuntimeError, ValueError: as the program runs, the latter if it has run before; `function` raised something,
            or returned other shapes or types.
    """

    def fill(_: ExecutionContext, outputs: Any, *inputs: Any) -> None:
        arrays = function(*jax.tree.map(_view, inputs))
        for output, array in zip(jax.tree.leaves(outputs), jax.tree.leaves(arrays), strict=True):
            if (array.shape, array.dtype) != (output.shape, output.dtype):
                raise ValueError(f"{array.dtype}{array.shape} is not {output.dtype}{output.shape}, as was promised")
            np.asarray(output)[...] = array

    # Outside of a program what follows would be compiled anew for every call.
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
        return jax.pure_callback(function, result, *args)
    return jax.lax.platform_dependent(
        *args,
        cpu=lambda *args: buffer_callback(fill, result)(*args),
        default=lambda *args: jax.pure_callback(function, result, *args),
    )


def _view(buffer: Buffer) -> np.ndarray:
    array = np.asarray(buffer)
    array.flags.writeable = False
    return array
