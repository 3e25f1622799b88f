"""Our PPO against Stable-Baselines3's on Pendulum-v1: equal steps, equal episodes to be judged by, one run at a time.

uv run -m benchmarks.pendulum --sb3-python .venv-bench/bin/python    (benchmarks/README.md makes that environment)

Ours has the settings of tests/pendulum.py, Stable-Baselines3 those that RL Baselines3 Zoo tuned for it. Both are judged in
Gymnasium's own Pendulum-v1, without noise, from the starts of seeds 10,000 and up.
"""

import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from aloha_jax.policy import clip_action
from tests.pendulum import CONFIG, NETWORK, Pendulum
from tests.toy_env import judge, train


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to compare."""

    sb3_python: str | None = None
    """Python of an environment with Stable-Baselines3; without it only ours runs."""
    seeds: int = 3
    """Runs of each."""
    episodes: int = 100
    """Episodes that each run is judged by."""
    timesteps: int = 200_000
    """Environment steps that each run learns from."""


def ours(seed: int, timesteps: int, episodes: int) -> dict[str, Any]:
    """Mean return of one run of ours, and what its training took, compilation included."""
    config = dataclasses.replace(CONFIG, seed=seed, total_timesteps=timesteps).validate()
    started, cpu_started = time.perf_counter(), time.process_time()
    run, _ = train(config, Pendulum(config.n_envs), NETWORK)
    jax.block_until_ready(run)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    act = jax.jit(lambda obs: clip_action(config, judge(run, NETWORK, obs)[0].mean))
    envs = gymnasium.make_vec("Pendulum-v1", num_envs=episodes)
    obs, _ = envs.reset(seed=10_000)
    total = np.zeros(episodes)
    for _ in range(200):
        obs, reward, *_ = envs.step(np.asarray(act(jnp.asarray(obs))))
        total += reward
    return {"mean_return": float(total.mean()), "seconds": seconds, "cpu_seconds": cpu_seconds}


def stable_baselines3(python: str, seed: int, timesteps: int, episodes: int) -> dict[str, Any]:
    """The same of Stable-Baselines3."""
    command = [python, str(Path(__file__).with_name("pendulum_sb3.py")), str(seed), str(timesteps), str(episodes)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def row(name: str, runs: list[dict[str, Any]]) -> str:
    returns, seconds, cpu_seconds = (np.array([run[key] for run in runs]) for key in ("mean_return", "seconds", "cpu_seconds"))
    each = ", ".join(f"{x:.0f}" for x in returns)
    return (
        f"| {name} | {returns.mean():.1f} ± {returns.std():.1f} | {each} | {seconds.mean():.0f} s | {cpu_seconds.mean():.0f} s |"
    )


def main(flags: Flags) -> None:
    if flags.sb3_python is not None and shutil.which(flags.sb3_python) is None:
        raise SystemExit(f"error: there is no {flags.sb3_python}: benchmarks/README.md says how to make that environment")
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "Stable-Baselines3": []}
    for seed in range(flags.seeds):  # in turn, so that both meet the same weather on a shared machine
        runs["ours"].append(ours(seed, flags.timesteps, flags.episodes))
        print(f"seed {seed}, ours: {runs['ours'][-1]}", flush=True)
        if flags.sb3_python is not None:
            runs["Stable-Baselines3"].append(stable_baselines3(flags.sb3_python, seed, flags.timesteps, flags.episodes))
            print(f"seed {seed}, Stable-Baselines3: {runs['Stable-Baselines3'][-1]}", flush=True)
    print("\n| | mean return | of each seed | wall clock | CPU time |\n|---|---|---|---|---|")
    print("\n".join(row(name, some) for name, some in runs.items() if some))


if __name__ == "__main__":
    main(tyro.cli(Flags))
