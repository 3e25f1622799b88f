"""Pictures of worlds now and, where an episode has just ended, before their reset: as few of them twice as possible."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aloha_jax.host import call_host
from aloha_jax.pixels import DeviceRenderer, Renderer

FEW = 16  # one world in so many may end in a step before the device draws all of them again


def render_now_and_ended(
    renderer: Renderer, poses: jax.Array, final_poses: jax.Array, ended: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pictures uint8[N, H, W, 3] of all worlds now, and the same with the ended worlds before their reset.

    Args:
        renderer: what draws: inside the jit boundary if it can, else behind one callback.
        poses: float32[N, nq] or [N, nq + 2], of all worlds now.
        final_poses: likewise, before any reset; other than `poses` only where `ended`.
        ended: bool[N].
    """
    if isinstance(renderer, DeviceRenderer):
        return _on_device(renderer, poses, final_poses, ended)
    return _on_host(renderer, poses, final_poses, ended)


def _on_device(
    renderer: DeviceRenderer, poses: jax.Array, final_poses: jax.Array, ended: jax.Array
) -> tuple[jax.Array, jax.Array]:
    now = renderer.trace(poses)
    num_worlds = len(poses)
    few = -(-num_worlds // FEW)

    def of_none() -> jax.Array:
        return now

    def of_few() -> jax.Array:
        worlds = jnp.nonzero(ended, size=few, fill_value=0)[0]  # shapes are fixed: spare places go to world 0
        frames = jnp.where(ended[worlds, None, None, None], renderer.trace(final_poses[worlds]), now[worlds])
        return now.at[worlds].set(frames)

    def of_many() -> jax.Array:
        return jnp.where(ended[:, None, None, None], renderer.trace(final_poses), now)

    count = ended.sum()
    return now, jax.lax.switch((count > 0).astype(jnp.int32) + (count > few), (of_none, of_few, of_many))


def _on_host(renderer: Renderer, poses: jax.Array, final_poses: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
    frames = jax.ShapeDtypeStruct((poses.shape[0], renderer.height, renderer.width, 3), jnp.uint8)
    draw = functools.partial(draw_now_and_ended, renderer)
    now, final = call_host(draw, (frames, frames), poses, final_poses, ended)
    return now, final


def draw_now_and_ended(renderer: Renderer, *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """`render_now_and_ended` outside of JAX, of the same three arrays."""
    poses, final_poses, ended = map(np.asarray, arrays)
    frames = renderer.render(np.concatenate([poses, final_poses[ended]]))
    now, final = frames[: len(poses)], frames[: len(poses)].copy()
    final[ended] = frames[len(poses) :]
    return now, final
