"""Pictures of a host renderer that are drawn while the program does something else.

JAX's callbacks run one after the other, so a picture that is asked for and waited for in one callback is drawn while everything
else stands still. Here one callback asks and returns a ticket, a later one waits.
"""

import concurrent.futures
import itertools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from aloha_jax.pixels import Renderer
from aloha_jax.pixels.ended import draw_now_and_ended

Pictures = tuple[np.ndarray, np.ndarray]


class Ahead:
    """Draws what is asked for in that order, on a thread of its own, which mostly waits for the renderer's processes."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._drawings: dict[int, concurrent.futures.Future[Pictures]] = {}
        self._tickets = itertools.count()
        self._lock = threading.Lock()

    def ask(self, poses: jax.Array, final_poses: jax.Array, ended: jax.Array) -> jax.Array:
        """Begin to draw what `render_now_and_ended` would; a ticket int32[] for it. Under `jit`."""
        return io_callback(self._ask, jax.ShapeDtypeStruct((), jnp.int32), poses, final_poses, ended)

    def receive(self, ticket: jax.Array, num_worlds: int, after: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Wait for a ticket's pictures, uint8[N, H, W, 3] twice; under `jit`, and not before the array `after` is there.

        Raises:
            RendererUnavailable: as the renderer does.
        """
        frames = jax.ShapeDtypeStruct((num_worlds, self._renderer.height, self._renderer.width, 3), jnp.uint8)
        return io_callback(self._receive, (frames, frames), ticket, after)

    def _ask(self, *arrays: Any) -> np.ndarray:
        arrays = tuple(np.array(x) for x in arrays)  # copies: JAX may reuse its buffers when this returns
        with self._lock:
            ticket = next(self._tickets) % 2**31
            self._drawings[ticket] = self._thread.submit(draw_now_and_ended, self._renderer, *arrays)
        return np.asarray(ticket, np.int32)

    def _receive(self, ticket: Any, after: Any) -> Pictures:
        with self._lock:
            drawing = self._drawings.pop(int(ticket))
        try:
            return drawing.result()
        except BaseException:
            with self._lock:
                self._drawings.clear()  # nobody will come for the others
            raise
