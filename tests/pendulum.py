"""Gymnasium's `Pendulum-v1` as a jittable batched environment; `test_pendulum.py` holds it to the original."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aloha_jax.config import Config
from aloha_jax.networks import ActorCritic
from tests.toy_env import ToyEnv

MAX_TORQUE, MAX_SPEED = 2.0, 8.0
TIME_STEP, GRAVITY = 0.05, 10.0  # mass and length are 1
START_ANGLE, START_SPEED = jnp.pi, 1.0


class Rod(NamedTuple):
    """Angle from upright in rad, and its speed in rad/s."""

    angle: jax.Array
    speed: jax.Array


class Pendulum(ToyEnv):
    """Swing a rod up and hold it there, with a torque too weak to lift it."""

    episode_length = 200

    def start(self, key):
        angle_key, speed_key = jax.random.split(key)
        angle = jax.random.uniform(angle_key, minval=-START_ANGLE, maxval=START_ANGLE)
        return Rod(angle, jax.random.uniform(speed_key, minval=-START_SPEED, maxval=START_SPEED))

    def observe(self, world):
        return jnp.stack([jnp.cos(world.angle), jnp.sin(world.angle), world.speed])

    def move(self, world, action):
        torque = jnp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
        from_upright = (world.angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = from_upright**2 + 0.1 * world.speed**2 + 0.001 * torque**2
        acceleration = 1.5 * GRAVITY * jnp.sin(world.angle) + 3.0 * torque
        speed = jnp.clip(world.speed + acceleration * TIME_STEP, -MAX_SPEED, MAX_SPEED)
        return Rod(world.angle + speed * TIME_STEP, speed), -cost, jnp.bool_(False)


# What the learner gets for the 200,000 steps of `test_pendulum.py` and `benchmarks/pendulum.py`.
NETWORK = ActorCritic(hidden_sizes=(64, 64), action_size=1)
CONFIG = Config(
    obs="state",
    action_clip=MAX_TORQUE,
    total_timesteps=200_000,
    n_envs=16,
    n_steps=125,
    batch_size=125,
    n_epochs=10,
    learning_rate=1e-3,
    lr_schedule="linear",
    gamma=0.9,
    gae_lambda=0.95,
)
