"""What an action means: gym_aloha's absolute joint targets, or changes of them (delta)."""

import jax
import jax.numpy as jnp
from gym_aloha.constants import normalize_puppet_gripper_position

from aloha_jax.engines import Engine

# One unit of a delta action moves a joint's target by 0.04 rad, a gripper's by 0.15 of its range.
DELTA_SCALE = ((0.04,) * 6 + (0.15,)) * 2
# How far a delta target may lead the measured joint (rad; gripper: share of the range). Without it targets wind up against an
# obstacle or a joint's friction, and take as long to unwind.
MAX_LEAD = (0.25, 0.25, 0.25, 1.0, 0.5, 1.0, 1.0) * 2


def target_limits(engine: Engine) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest control targets, float32[14] each, in gym_aloha's action meaning: the actuators' control ranges."""
    low, high = engine.scene.model.actuator_ctrlrange.T
    arms = []
    for bound in (low, high):
        left, right = bound[:8], bound[8:]
        arms.append(
            [*left[:6], normalize_puppet_gripper_position(left[6]), *right[:6], normalize_puppet_gripper_position(right[6])]
        )
    return jnp.array(arms[0], jnp.float32), jnp.array(arms[1], jnp.float32)


def delta_target(target: jax.Array, agent_pos: jax.Array, action: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Add a delta action to the current target: scaled, clipped to the control range and to a lead over the measured joints.

    Args:
        target: float32[N, 14], current control targets.
        agent_pos: float32[N, 14], measured joint positions.
        action: float32[N, 14], in units of `DELTA_SCALE`.
        low: float32[14], lowest targets.
        high: float32[14], highest targets.
    """
    scale, lead = jnp.array(DELTA_SCALE)[None], jnp.array(MAX_LEAD)[None]
    moved = jnp.clip(target + scale * action, low[None], high[None])
    return jnp.clip(moved, agent_pos - lead, agent_pos + lead)
