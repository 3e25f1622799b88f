"""The whole learner on a known task: swing-up of Gymnasium's pendulum, and the proof that it is Gymnasium's."""

import dataclasses

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from tests.pendulum import CONFIG, NETWORK, Pendulum, Rod
from tests.toy_env import returns, train


def test_steps_are_gymnasiums() -> None:
    """From every state of 5 episodes under random torques, too large ones among them."""
    original = PendulumEnv()
    rng = np.random.default_rng(0)
    steps = []
    for seed in range(5):
        obs, _ = original.reset(seed=seed)
        for _ in range(200):
            angle, speed = original.state
            torque = rng.uniform(-3, 3, size=1).astype(np.float32)
            next_obs, reward, *_ = original.step(torque)
            steps.append((angle, speed, obs, torque, next_obs, reward))
            obs = next_obs
    angle, speed, obs, torque, next_obs, reward = map(np.array, zip(*steps, strict=True))
    assert np.abs(speed).max() == 8, "the speed limit is met"

    pendulum = Pendulum(len(steps))
    rods = Rod(jnp.asarray(angle, jnp.float32), jnp.asarray(speed, jnp.float32))
    np.testing.assert_allclose(jax.vmap(pendulum.observe)(rods), obs, atol=1e-4)
    rods, our_reward, terminated = jax.vmap(pendulum.move)(rods, jnp.asarray(torque))
    np.testing.assert_allclose(jax.vmap(pendulum.observe)(rods), next_obs, atol=1e-4)
    np.testing.assert_allclose(our_reward, reward, atol=1e-4)
    assert not terminated.any()


def test_an_episode_is_gymnasiums() -> None:
    """Same start, same torques: 200 steps, cut by the time limit, and the final observation is not that of the next start."""
    original = gymnasium.make("Pendulum-v1")
    obs, _ = original.reset(seed=0)
    torque = np.random.default_rng(0).uniform(-2, 2, size=(200, 1)).astype(np.float32)
    env = Pendulum(1)
    start = Rod(jnp.arctan2(obs[1:2], obs[0:1]), jnp.asarray(obs[2:3]))
    state = env.reset(jax.random.key(0))._replace(world=start)
    step = jax.jit(env.step)
    total = 0.0
    for t in range(200):
        obs, reward, terminated, truncated, _ = original.step(torque[t])
        total += float(reward)
        state = step(state, jnp.asarray(torque[None, t]))
        assert (bool(state.terminated[0]), bool(state.truncated[0])) == (terminated, truncated) == (False, t == 199)
    np.testing.assert_allclose(state.final_obs[0], obs, atol=1e-2)
    assert (jnp.abs(state.obs - state.final_obs) > 0.1).any()
    np.testing.assert_allclose(state.episode.total_reward[0], total, rtol=1e-4)
    assert state.episode.length[0] == 200


def test_starts_are_drawn_like_gymnasiums() -> None:
    """Angle uniform in +-pi, speed in +-1."""
    world = Pendulum(2000).reset(jax.random.key(0)).world
    original = gymnasium.make_vec("Pendulum-v1", num_envs=1)
    original.reset(seed=0)
    for value, limit in ((world.angle, np.pi), (world.speed, 1.0)):
        assert np.abs(value).max() <= limit
        np.testing.assert_allclose(
            np.quantile(value, [0.0, 0.25, 0.5, 0.75, 1.0]), np.array([-1, -0.5, 0, 0.5, 1]) * limit, atol=0.2
        )


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_learned_within_200_000_steps(seed: int) -> None:
    """A mean return of -250 over 256 episodes without noise; docs/benchmarks.md has what Stable-Baselines3 reaches."""
    config = dataclasses.replace(CONFIG, seed=seed)
    run, history = train(config, Pendulum(config.n_envs), NETWORK)
    assert len(history) * config.rollout_size == 200_000
    assert returns(config, Pendulum(256), NETWORK, run, jax.random.key(seed + 1000)).mean() >= -250
