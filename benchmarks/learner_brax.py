"""Brax's PPO at the sizes that benchmarks/learner.py asks for: prints its rate as JSON.

Runs in an environment of its own (benchmarks/README.md) and knows nothing of aloha_jax.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from brax.envs.base import Env, State  # type: ignore[import-not-found]
from brax.training.agents.ppo import networks, train  # type: ignore[import-not-found]


class Drift(Env):
    """The environment of benchmarks/learner.py."""

    def __init__(self, obs_size: int, action_size: int):
        self._obs_size, self._action_size = obs_size, action_size

    def reset(self, rng: jax.Array) -> State:
        world = jax.random.normal(rng, (self._obs_size,))
        return State(None, world, jnp.zeros(()), jnp.zeros(()))

    def step(self, state: State, action: jax.Array) -> State:
        world = 0.99 * state.obs.at[: self._action_size].add(0.01 * action)
        return state.replace(obs=world, reward=-jnp.square(world).mean())

    @property
    def observation_size(self) -> int:
        return self._obs_size

    @property
    def action_size(self) -> int:
        return self._action_size

    @property
    def backend(self) -> str:
        return "none"


def main(sizes: dict) -> None:
    wanted = sizes["state"]
    rollout, rates = wanted["n_envs"] * wanted["n_steps"], []
    envs_per_minibatch = wanted["batch_size"] // wanted["n_steps"]
    train.train(
        Drift(sizes["obs_size"], sizes["action_size"]),
        num_timesteps=rollout * 24,
        num_evals=4,  # three stretches of training, of which the first also compiles
        run_evals=False,
        episode_length=120,
        num_envs=wanted["n_envs"],
        unroll_length=wanted["n_steps"],
        batch_size=envs_per_minibatch,
        num_minibatches=wanted["n_envs"] // envs_per_minibatch,
        num_updates_per_batch=wanted["n_epochs"],
        normalize_observations=True,
        max_grad_norm=0.5,
        learning_rate=wanted["learning_rate"],
        discounting=wanted["gamma"],
        gae_lambda=wanted["gae_lambda"],
        network_factory=functools.partial(
            networks.make_ppo_networks,
            policy_hidden_layer_sizes=wanted["hidden_sizes"],
            value_hidden_layer_sizes=wanted["hidden_sizes"],
            activation=jax.nn.elu,
        ),
        progress_fn=lambda _, metrics: rates.append(float(metrics.get("training/sps", 0))),
    )
    print(json.dumps({"state_all": max(rates)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
