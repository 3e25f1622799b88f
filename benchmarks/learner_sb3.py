"""Stable-Baselines3's PPO update at the sizes that benchmarks/learner.py asks for: prints its rates as JSON.

Runs in an environment of its own (benchmarks/README.md) and knows nothing of aloha_jax.
"""

import json
import os
import sys
import time

import gymnasium
import numpy as np
import torch  # type: ignore[import-not-found]
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv


class Noise(gymnasium.Env):
    """Observations of the right shape."""

    def __init__(self, obs_space: gymnasium.spaces.Box, action_size: int):
        self.observation_space = obs_space
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_size,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def update_rate(policy: str, obs_space: gymnasium.spaces.Box, action_size: int, wanted: dict, activation: type) -> float:
    """Samples per second of `PPO.train`, on as many threads as make it fastest."""
    model = PPO(
        policy,
        DummyVecEnv([lambda: Noise(obs_space, action_size)] * wanted["n_envs"]),
        n_steps=wanted["n_steps"],
        batch_size=wanted["batch_size"],
        n_epochs=wanted["n_epochs"],
        learning_rate=wanted["learning_rate"],
        policy_kwargs={
            "net_arch": {"pi": wanted["hidden_sizes"], "vf": wanted["hidden_sizes"]},
            "activation_fn": activation,
        },
        device="cpu",
    )
    rollout = wanted["n_envs"] * wanted["n_steps"]
    model.learn(rollout)  # fills the buffer that `train` learns from
    taken = []
    for threads in {1, os.cpu_count() or 1}:
        torch.set_num_threads(threads)
        for _ in range(2):
            start = time.perf_counter()
            model.train()
            taken.append(time.perf_counter() - start)
    return rollout * wanted["n_epochs"] / min(taken)


def main(sizes: dict) -> None:
    vectors = gymnasium.spaces.Box(-1, 1, (sizes["obs_size"],), np.float32)
    pictures = gymnasium.spaces.Box(0, 255, (sizes["picture"], sizes["picture"], 3), np.uint8)
    state = update_rate("MlpPolicy", vectors, sizes["action_size"], sizes["state"], torch.nn.ELU)
    pixels = update_rate("CnnPolicy", pictures, sizes["action_size"], sizes["pixels"], torch.nn.Tanh)
    print(json.dumps({"state_update": state, "pixel_update": pixels}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
