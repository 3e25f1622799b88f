"""How fast the learner is by itself: our PPO, Brax's and Stable-Baselines3's on networks, batches and epochs of the same size.

uv run -m benchmarks.learner --sb3-python .venv-bench/bin/python --brax-python .venv-brax/bin/python

benchmarks/README.md makes those environments; without a flag its library is left out. Two numbers each, higher is better:

- update, samples/s: gradients of PPO's loss and optimizer steps, counting every epoch.
- all, steps/s: acting and updating, in an environment that costs nothing (`Drift`; Brax's is the same). Stable-Baselines3's
  environments live in Python, so that what it would say of them says nothing of the learner.

The last row is the rate at which a gradient's floating-point operations, as XLA counts them, would be done at the pace of XLA's
product of two large matrices: a limit for those who compute it so, in float32.
"""

import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import tyro

from aloha_jax import ppo, training
from aloha_jax.config import Config
from aloha_jax.env import Env
from aloha_jax.networks import ActorCritic
from tests.toy_env import ToyEnv

OBS_SIZE, ACTION_SIZE, PICTURE = 142, 14, 84
STATE = Config(
    obs="state",
    hidden_sizes=(256, 128),
    activation="elu",
    n_envs=256,
    n_steps=32,
    batch_size=1024,
    n_epochs=4,
    learning_rate=3e-4,
    total_timesteps=10**9,
)
PIXELS = dataclasses.replace(STATE, obs="pixels", hidden_sizes=(256, 256), activation="tanh", n_steps=4, batch_size=256)


UPDATES = 8  # in a stretch of acting and updating, as in one of Brax's: where speeds swing, the best of short ones is faster


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to compare with."""

    sb3_python: str | None = None
    """Python of an environment with Stable-Baselines3."""
    brax_python: str | None = None
    """Python of an environment with Brax."""
    repeats: int = 5
    """Rounds in which each has its turn; the fastest counts."""


class Drift(ToyEnv):
    """A vector that actions push about; its square is the cost. There to be stepped, not to be learned."""

    episode_length = 120

    def start(self, key):
        return jax.random.normal(key, (OBS_SIZE,))

    def observe(self, world):
        return world

    def move(self, world, action):
        world = 0.99 * world.at[:ACTION_SIZE].add(0.01 * action)
        return world, -jnp.square(world).mean(), jnp.bool_(False)


def network_of(config: Config) -> ActorCritic:
    return ActorCritic(hidden_sizes=config.hidden_sizes, activation=config.activation)


def rollout_of_noise(config: Config) -> tuple[ppo.Apply, Any, ppo.Batch]:
    """The network, its parameters and something to learn from."""
    network = network_of(config)
    shape = (config.n_steps, config.n_envs)
    key = jax.random.key(0)
    if config.obs == "state":
        inputs = {"state": jax.random.normal(key, (*shape, OBS_SIZE))}
    else:
        inputs = {"pixels": jax.random.randint(key, (*shape, PICTURE, PICTURE, 3), 0, 256).astype(jnp.uint8)}
    noise = jax.random.normal(key, shape)
    action = jax.random.normal(key, (*shape, ACTION_SIZE))
    batch = ppo.Batch(inputs, action, noise - 15.0, noise, noise, noise)
    return cast(Any, network.apply), network.init(key, jax.tree.map(lambda x: x[0, :1], inputs)), batch


def our_update(config: Config) -> Callable[[], Any]:
    """One update on a rollout of noise."""
    apply, params, batch = rollout_of_noise(config)
    optimizer, hp = training.make_optimizer(config), training.hyperparameters(config)
    opt_state = optimizer.init(params)
    update = jax.jit(lambda p, o, b, k: ppo.update(p, o, b, k, apply, optimizer, hp))
    return lambda: update(params, opt_state, batch, jax.random.key(0))


def operations(config: Config) -> float:
    """Floating-point operations of the gradient of one sample, as XLA counts them."""
    apply, params, batch = rollout_of_noise(config)
    minibatch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: config.batch_size], batch)
    gradient = jax.jit(lambda p, b: ppo.minibatch_gradient(p, apply, b, training.hyperparameters(config)))
    counted: Any = gradient.lower(params, minibatch).cost_analysis()
    return counted["flops"] / config.batch_size


def fastest_product() -> float:
    """Floating-point operations per second of a product of two large matrices."""
    size = 2048
    factor = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.dot)
    return 2 * size**3 / seconds_of(lambda: product(factor, factor))


def our_training(config: Config) -> Callable[[], Any]:
    """`UPDATES` steps of the training loop."""
    env, network = cast(Env, Drift(config.n_envs)), network_of(config)
    carry = [training.init_run(config, env, network)]
    train_step = training.make_train_step(config, env, network)

    def stretch() -> Any:
        for _ in range(UPDATES):
            carry[0], metrics = train_step(carry[0])
        return metrics

    return stretch


def seconds_of(work: Callable[[], Any]) -> float:
    jax.block_until_ready(work())
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return min(taken)


def ours() -> dict[str, float]:
    """Rates by name, as the other libraries' scripts print them."""
    rollout = STATE.rollout_size
    return {
        "state_update": rollout * STATE.n_epochs / seconds_of(our_update(STATE)),
        "pixel_update": PIXELS.rollout_size * PIXELS.n_epochs / seconds_of(our_update(PIXELS)),
        "state_all": UPDATES * rollout / seconds_of(our_training(STATE)),
    }


def limits(state_operations: float, pixel_operations: float) -> dict[str, float]:
    """The updates' rates, were they nothing but large matrix products."""
    pace = fastest_product()
    return {"state_update": pace / state_operations, "pixel_update": pace / pixel_operations}


def of_script(python: str, script: str) -> dict[str, float]:
    """Another library's rates: the last line that its script prints."""
    sizes: dict[str, Any] = {"obs_size": OBS_SIZE, "action_size": ACTION_SIZE, "picture": PICTURE}
    for name, config in (("state", STATE), ("pixels", PIXELS)):
        fields = ("n_envs", "n_steps", "batch_size", "n_epochs", "hidden_sizes", "learning_rate", "gamma", "gae_lambda")
        sizes[name] = {field: getattr(config, field) for field in fields}
    command = [python, str(Path(__file__).with_name(script)), json.dumps(sizes)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main(flags: Flags) -> None:
    for python in (flags.sb3_python, flags.brax_python):
        if python is not None and shutil.which(python) is None:
            raise SystemExit(f"error: there is no {python}: benchmarks/README.md says how to make that environment")
    rates: dict[str, list[dict[str, float]]] = {"ours": []}
    counted = operations(STATE), operations(PIXELS)
    for _ in range(flags.repeats):  # in turn, so that all meet the same weather on a shared machine
        rates["ours"].append(ours())
        if flags.brax_python is not None:
            rates.setdefault("Brax", []).append(of_script(flags.brax_python, "learner_brax.py"))
        if flags.sb3_python is not None:
            rates.setdefault("Stable-Baselines3", []).append(of_script(flags.sb3_python, "learner_sb3.py"))
        rates.setdefault("at the pace of a large product", []).append(limits(*counted))
    names = ("state_update", "state_all", "pixel_update")
    print("| | state: update, samples/s | state: all, steps/s | pixels: update, samples/s |\n|---|---|---|---|")
    for library, rounds in rates.items():
        best = [max((each[name] for each in rounds if name in each), default=None) for name in names]
        print(f"| {library} | " + " | ".join("" if x is None else f"{x:,.0f}" for x in best) + " |")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
