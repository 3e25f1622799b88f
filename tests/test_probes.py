"""Probe environments: each needs one piece of the learner more than the one before it (after Andy Jones, "Debugging RL").

All are learned by the real train step within seconds, and each was seen to fail when its piece was broken:

| probe | broken, for example, by |
|---|---|
| value of a constant reward | no value loss; a value bootstrapped through termination |
| value that depends on the observation | a critic that sees nothing; minibatches with the inputs of other samples |
| value is discounted | no discount; next values of the wrong step; advantages summed across episodes |
| best action | the policy gradient's sign; advantages left out |
| best action for each observation | a policy that sees nothing |
| truncated episode | truncation treated like termination; the value of the start that follows |
| each arm of a mirrored network | both arms judged by their common reward |
| first minibatch | the probability of the clipped action |
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aloha_jax.config import Config
from aloha_jax.networks import ARM_ACTION_SIZE, ARM_STATE_SIZE, ActorCritic, MirroredActorCritic
from tests.toy_env import ToyEnv, judge, train

NETWORK = ActorCritic(hidden_sizes=(16,), action_size=1)
CONFIG = Config(
    obs="state",
    n_envs=16,
    n_steps=16,
    batch_size=64,
    n_epochs=4,
    total_timesteps=40 * 16 * 16,
    learning_rate=1e-2,
    lr_schedule="linear",
    gamma=0.5,
).validate()


class OneStep(ToyEnv):
    """Episodes of one step; a world is a sign, -1 or 1, that the observation shows."""

    episode_length = 10

    def start(self, key):
        return jax.random.rademacher(key, (), float)

    def observe(self, sign):
        return sign[None]

    def reward(self, sign, action):
        raise NotImplementedError

    def move(self, sign, action):
        return sign, self.reward(sign, action[0]), jnp.bool_(True)


class ConstantReward(OneStep):
    """Reward 1, and nothing to see."""

    def observe(self, sign):
        return jnp.zeros(1)

    def reward(self, sign, action):
        return jnp.float32(1)


class VisibleReward(OneStep):
    """The reward is the observation."""

    def reward(self, sign, action):
        return sign


class BestAction(OneStep):
    """Nothing to see; 1/2 is the best action."""

    def observe(self, sign):
        return jnp.zeros(1)

    def reward(self, sign, action):
        return -((action - 0.5) ** 2)


class BestActionBySight(OneStep):
    """Half of the observation is the best action."""

    def reward(self, sign, action):
        return -((action - 0.5 * sign) ** 2)


class TwoArms(OneStep):
    """Half of what an arm sees on its own side is its best action; beside that, the left arm gets 1 and the right arm -1."""

    num_arms = 2

    def start(self, key):
        return jax.random.rademacher(key, (2,), float)

    def observe(self, signs):
        left, right = jnp.zeros((2, ARM_STATE_SIZE)).at[:, 0].set(signs)
        return jnp.concatenate([left, right, jnp.zeros(1)])

    def move(self, signs, action):
        first = jnp.stack([action[0], action[ARM_ACTION_SIZE]])
        return signs, jnp.array([1.0, -1.0]) - (first - 0.5 * signs) ** 2, jnp.bool_(True)


class Chain(ToyEnv):
    """A world is a place, 0 at first, then 1, 2, …; the observation shows it.

    Args:
        reward: of leaving each place; the last one's is that of all places beyond.
        terminates: whether the episode ends after the last place; otherwise the time limit cuts it.
        episode_length: the time limit.
    """

    def __init__(self, num_envs: int, reward: tuple[float, ...], terminates: bool, episode_length: int):
        super().__init__(num_envs)
        self.rewards, self.terminates, self.episode_length = jnp.array(reward, float), terminates, episode_length

    def start(self, key):
        return jnp.int32(0)

    def observe(self, place):
        return jnp.minimum(place, len(self.rewards) - 1)[None].astype(float)

    def move(self, place, action):
        last = len(self.rewards) - 1
        return place + 1, self.rewards[jnp.minimum(place, last)], (place >= last) & self.terminates


def test_value_of_a_constant_reward() -> None:
    """One step, reward 1: V = 1."""
    run, _ = train(CONFIG, ConstantReward(CONFIG.n_envs), NETWORK)
    _, value = judge(run, NETWORK, jnp.zeros((1, 1)))
    np.testing.assert_allclose(value, [1], atol=0.02)


def test_value_that_depends_on_the_observation() -> None:
    """One step, the reward is what is seen: V(-1) = -1, V(1) = 1."""
    run, _ = train(CONFIG, VisibleReward(CONFIG.n_envs), NETWORK)
    _, value = judge(run, NETWORK, jnp.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(value, [-1, 1], atol=0.03)


def test_value_is_discounted() -> None:
    """Three steps, reward 1 for the last: V = 1/4, 1/2, 1 at gamma = 1/2."""
    config = dataclasses.replace(CONFIG, total_timesteps=2 * CONFIG.total_timesteps)
    run, history = train(config, Chain(CONFIG.n_envs, (0, 0, 1), terminates=True, episode_length=10), NETWORK)
    _, value = judge(run, NETWORK, jnp.array([[0.0], [1.0], [2.0]]))
    np.testing.assert_allclose(value, [0.25, 0.5, 1], atol=0.03)
    assert history[-1]["episode_length"] == 3 * history[-1]["episodes"]
    assert history[-1]["episode_reward"] == history[-1]["episodes"]


def test_policy_finds_the_best_action() -> None:
    """Its mean goes to 1/2, and its noise, which costs reward, down."""
    run, _ = train(CONFIG, BestAction(CONFIG.n_envs), NETWORK)
    policy, _ = judge(run, NETWORK, jnp.zeros((1, 1)))
    np.testing.assert_allclose(policy.mean, [[0.5]], atol=0.1)
    assert jnp.exp(policy.log_std[0, 0]) < 0.5


def test_policy_finds_the_best_action_for_each_observation() -> None:
    run, _ = train(CONFIG, BestActionBySight(CONFIG.n_envs), NETWORK)
    policy, _ = judge(run, NETWORK, jnp.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(policy.mean, [[-0.5], [0.5]], atol=0.1)
    assert (jnp.exp(policy.log_std) < 0.5).all()


def test_a_truncated_episode_is_worth_what_would_have_come() -> None:
    """Reward 0 for the first step, 1 for every other, cut after four, gamma = 0.9.

    The values are those of the endless episode, 1 / (1 - 0.9) = 10 and 0.9 x 10 = 9: what counts is the value where it was cut,
    not that of the start that follows (for ever 0, 1, 1, 1, 0, … would be worth about 7.5), and not 0 (worth less than 3).
    """
    config = dataclasses.replace(CONFIG, gamma=0.9, total_timesteps=100 * CONFIG.rollout_size)
    run, _ = train(config, Chain(CONFIG.n_envs, (0, 1), terminates=False, episode_length=4), NETWORK)
    _, value = judge(run, NETWORK, jnp.array([[0.0], [1.0]]))
    np.testing.assert_allclose(value, [9, 10], rtol=0.05)


def test_each_arm_of_a_mirrored_network_answers_for_its_own_reward() -> None:
    """A shared network, but the best action of each, and values that differ by 2, the difference of what the arms get."""
    network = MirroredActorCritic(hidden_sizes=(16,))
    env = TwoArms(CONFIG.n_envs)
    run, _ = train(CONFIG, env, network)
    signs = jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    policy, value = judge(run, network, jax.vmap(env.observe)(signs))
    np.testing.assert_allclose(policy.mean[..., 0], 0.5 * signs, atol=0.15)
    np.testing.assert_allclose(value[:, 0] - value[:, 1], np.full(4, 2.0), atol=0.2)


def test_the_first_minibatch_is_on_policy() -> None:
    """Before any step the policy of the update is that of the rollout: every ratio is 1, even where actions were clipped."""
    config = dataclasses.replace(CONFIG, n_epochs=1, batch_size=CONFIG.rollout_size, action_clip=0.1, total_timesteps=3 * 16 * 16)
    _, history = train(config, BestActionBySight(config.n_envs), NETWORK)
    for metrics in history:
        assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
        assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("schedule", "target_kl", "expected"),
    [
        ("linear", None, [1.5e-3, 1.125e-3, 0.75e-3, 0.375e-3]),
        ("adaptive", 1e3, [1.5e-3, 1.8e-3, 2e-3, 2e-3]),  # too little divergence: times 1.2 after each update, up to 2e-3
    ],
)
def test_learning_rate_schedules(schedule: Any, target_kl: float | None, expected: list[float]) -> None:
    config = dataclasses.replace(
        CONFIG, learning_rate=1.5e-3, lr_schedule=schedule, target_kl=target_kl, total_timesteps=4 * CONFIG.rollout_size
    )
    _, history = train(config, BestAction(config.n_envs), NETWORK)
    np.testing.assert_allclose([metrics["learning_rate"] for metrics in history], expected, rtol=1e-5)
