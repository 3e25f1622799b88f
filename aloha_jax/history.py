"""Joint positions, or targets, of some control steps ago: a memory for policies that have none.

From above, a camera does not see how high, and under which angle, the fingers hold an object. What tells is where the joints were
when they closed: the object lay flat on the table then, and has moved with the gripper since. A policy that has nothing but the
camera remembers where it told them to be: the targets that it commanded itself.
"""

import jax
import jax.numpy as jnp


def known(obs: str, agent_pos: jax.Array, target: jax.Array) -> jax.Array:
    """What a policy that sees `obs` can remember of a step, [N, 14]: measured joints, or, with the camera alone, its command."""
    return target if obs == "pixels" else agent_pos


def start(position: jax.Array, lags: tuple[int, ...]) -> jax.Array | None:
    """The memory float32[N, max(lags) + 1, 14] of worlds that begin at positions [N, 14]; None if there are no lags."""
    return jnp.repeat(position[:, None], max(lags) + 1, axis=1) if lags else None


def push(memory: jax.Array | None, position: jax.Array) -> jax.Array | None:
    """The memory one step later: the oldest positions are forgotten, the newest come last."""
    return None if memory is None else jnp.concatenate([memory[:, 1:], position[:, None]], axis=1)


def recall(memory: jax.Array, lags: tuple[int, ...]) -> jax.Array:
    """Positions `lags` steps ago, float32[N, 2 * len(lags) * 7]: the left arm's, lag by lag, then the right arm's."""
    chosen = memory[:, -1 - jnp.array(lags)]  # [N, lags, 14]
    by_arm = chosen.reshape(*chosen.shape[:2], 2, -1).swapaxes(1, 2)
    return by_arm.reshape(memory.shape[0], -1)
