"""Pictures of worlds now and, where an episode has just ended, before their reset: as few of them twice as possible."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aloha_jax.pixels import DeviceRenderer, Renderer

FEW = 16  # one world in so many may end in a step before the device draws all of them again


def render_now_and_ended(
    renderer: Renderer, qpos: jax.Array, final_qpos: jax.Array, ended: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pictures uint8[N, H, W, 3] of all worlds now, and the same with the ended worlds before their reset.

    Args:
        renderer: what draws: inside the jit boundary if it can, else behind one callback.
        qpos: float32[N, nq], joint positions now.
        final_qpos: float32[N, nq], before any reset; other than `qpos` only where `ended`.
        ended: bool[N].
    """
    if isinstance(renderer, DeviceRenderer):
        return _on_device(renderer, qpos, final_qpos, ended)
    return _on_host(renderer, qpos, final_qpos, ended)


def _on_device(renderer: DeviceRenderer, qpos: jax.Array, final_qpos: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
    now = renderer.trace(qpos)
    num_worlds = len(qpos)
    few = -(-num_worlds // FEW)

    def of_none() -> jax.Array:
        return now

    def of_few() -> jax.Array:
        worlds = jnp.nonzero(ended, size=few, fill_value=0)[0]  # shapes are fixed: spare places go to world 0
        frames = jnp.where(ended[worlds, None, None, None], renderer.trace(final_qpos[worlds]), now[worlds])
        return now.at[worlds].set(frames)

    def of_many() -> jax.Array:
        return jnp.where(ended[:, None, None, None], renderer.trace(final_qpos), now)

    count = ended.sum()
    return now, jax.lax.switch((count > 0).astype(jnp.int32) + (count > few), (of_none, of_few, of_many))


def _on_host(renderer: Renderer, qpos: jax.Array, final_qpos: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
    frames = jax.ShapeDtypeStruct((qpos.shape[0], renderer.height, renderer.width, 3), jnp.uint8)
    draw = functools.partial(draw_now_and_ended, renderer)
    return jax.pure_callback(draw, (frames, frames), qpos, final_qpos, ended)


def draw_now_and_ended(renderer: Renderer, *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """`render_now_and_ended` outside of JAX, of the same three arrays."""
    qpos, final_qpos, ended = map(np.asarray, arrays)
    frames = renderer.render(np.concatenate([qpos, final_qpos[ended]]))
    now, final = frames[: len(qpos)], frames[: len(qpos)].copy()
    final[ended] = frames[len(qpos) :]
    return now, final
