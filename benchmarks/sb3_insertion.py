"""Stable-Baselines3's PPO on the original gym_aloha insertion from pixels: the reference of `end_to_end.py`.

Runs in an environment of its own (benchmarks/README.md), knows nothing of aloha_jax, and prints one JSON object.
"""

import argparse
import json
import os
import time

os.environ.setdefault("MUJOCO_GL", "egl")

import gym_aloha  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
import torch  # type: ignore[import-not-found]
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv


class TopCamera(gymnasium.ObservationWrapper):
    """The top camera's frame, resized with an area filter to uint8[size, size, 3]."""

    def __init__(self, env: gymnasium.Env, size: int):
        super().__init__(env)
        self._size = size
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def observation(self, observation: dict) -> np.ndarray:
        return np.asarray(Image.fromarray(observation["top"]).resize((self._size, self._size), Image.Resampling.BOX))


class Encoder(BaseFeaturesExtractor):
    """Convolutions (features, kernel, stride) and a dense layer, as NatureCNN is built."""

    def __init__(self, space: gymnasium.spaces.Box, conv: list[list[int]], features_dim: int):
        super().__init__(space, features_dim)
        layers, channels = [], space.shape[0]  # Stable-Baselines3 has moved the channels to the front
        for features, kernel, stride in conv:
            layers += [torch.nn.Conv2d(channels, features, kernel, stride), torch.nn.ReLU()]
            channels = features
        layers.append(torch.nn.Flatten())
        size = torch.nn.Sequential(*layers)(torch.zeros(1, *space.shape)).shape[1]
        self._layers = torch.nn.Sequential(*layers, torch.nn.Linear(size, features_dim), torch.nn.ReLU())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._layers(pixels)


def make_env(size: int) -> gymnasium.Env:
    return TopCamera(gymnasium.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels", disable_env_checker=True), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--conv", type=json.loads, required=True)
    parser.add_argument("--features-dim", type=int, required=True)
    parser.add_argument("--n-envs", type=int, required=True)
    parser.add_argument("--n-steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--n-epochs", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    flags = parser.parse_args()
    envs = SubprocVecEnv([lambda: make_env(flags.size)] * flags.n_envs)
    # Heads and everything else as in the guide.
    model = PPO(
        "CnnPolicy",
        envs,
        n_steps=flags.n_steps,
        batch_size=flags.batch_size,
        n_epochs=flags.n_epochs,
        policy_kwargs={
            "net_arch": {"pi": [256, 256], "vf": [256, 256]},
            "features_extractor_class": Encoder,
            "features_extractor_kwargs": {"conv": flags.conv, "features_dim": flags.features_dim},
        },
        device="cpu",
    )
    rollout = flags.n_envs * flags.n_steps
    model.learn(rollout)  # the first update also starts processes and GL contexts
    start = time.perf_counter()
    model.learn(rollout * flags.updates, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"env_steps_per_second": rollout * flags.updates / seconds, "env_steps": rollout * flags.updates}))


if __name__ == "__main__":
    main()
