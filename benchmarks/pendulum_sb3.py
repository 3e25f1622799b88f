"""One run of Stable-Baselines3's PPO on Pendulum-v1, for benchmarks/pendulum.py: prints mean return and seconds as JSON.

Runs in an environment of its own (benchmarks/README.md): python benchmarks/pendulum_sb3.py SEED TIMESTEPS EPISODES
"""

import json
import sys
import time

import gymnasium
import numpy as np
import torch  # type: ignore[import-not-found]
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

# rl_zoo3/hyperparams/ppo.yml, Pendulum-v1 (its n_timesteps is 1e5).
SETTINGS = {
    "n_steps": 1024,
    "gae_lambda": 0.95,
    "gamma": 0.9,
    "n_epochs": 10,
    "ent_coef": 0.0,
    "learning_rate": 1e-3,
    "clip_range": 0.2,
    "use_sde": True,
    "sde_sample_freq": 4,
}


def main(seed: int, timesteps: int, episodes: int) -> None:
    torch.set_num_threads(1)  # networks this small are slower on several
    started, cpu_started = time.perf_counter(), time.process_time()
    model = PPO("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=4, seed=seed), seed=seed, device="cpu", **SETTINGS)
    model.learn(timesteps)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    envs = gymnasium.make_vec("Pendulum-v1", num_envs=episodes)
    obs, _ = envs.reset(seed=10_000)
    total = np.zeros(episodes)
    for _ in range(200):
        action, _ = model.predict(obs, deterministic=True)
        obs, reward, *_ = envs.step(action)
        total += reward
    print(json.dumps({"mean_return": total.mean(), "seconds": seconds, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:]))
