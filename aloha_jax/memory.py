"""Whether a run fits into memory, estimated before anything is allocated."""

import math
import os

import jax

from aloha_jax.config import Config, ConfigError
from aloha_jax.networks import num_parameters
from aloha_jax.policy import STATE_SIZE, example_inputs, make_network
from aloha_jax.startup import container_limit

USABLE = 0.9  # of the memory: allocators fragment, compilers need workspace
# On a CPU, Python, JAX, MuJoCo and what they compile: the peak of a small training less what is estimated below (0.75 to 0.78 GB
# from the state, 0.9 to 1.0 from pixels and another 0.09 for each render worker), rounded down.
PROGRAM, PICTURES_TOO = 0.7e9, 0.2e9
COPIES_OF_PARAMETERS = 5  # themselves, gradients, Adam's two moments, and the copy that a checkpoint is written from
PICTURES = 10  # of each world's: now and at an episode's end, in the state, the scan's carry, and the renderer
PASSES = 3  # activations, their gradients, and what the convolution's implementation unfolds


def require_memory(config: Config) -> None:
    """Refuse a run that would not fit.

    Raises:
        ConfigError: with the largest `--n-envs` that would, by estimate.
    """
    available = available_memory()
    if available is None:
        return
    fixed, per_world = estimate(config)
    program = 0.0 if jax.default_backend() != "cpu" else PROGRAM + PICTURES_TOO * config.has_pixels
    room = USABLE * available - program - fixed
    if config.n_envs * per_world <= room:
        return
    needed = f"--n-envs {config.n_envs} needs about {_gigabytes(program + fixed + config.n_envs * per_world)} of memory"
    largest = int(room / per_world)
    if largest > 0:
        remedy = f"at most {largest} fit, by estimate"
    elif program > USABLE * available:
        remedy = f"JAX and MuJoCo alone take {_gigabytes(program)}"
    else:
        remedy = "none fits: lower --n-steps, --microbatch-size or --eval-episodes"
    raise ConfigError(f"{needed}, and {_gigabytes(available)} are there: {remedy}")


def estimate(config: Config) -> tuple[int, int]:
    """Bytes that a run needs whatever the number of worlds, and bytes per world."""
    pixels = config.image_height * config.image_width * 3 if config.has_pixels else 0
    inputs = sum(x.size for name, x in example_inputs(config).items() if name != "pixels")
    # Vectors are kept as they came and as the networks saw them; beside them action, log-probability, values, advantages.
    sample = pixels + 4 * (2 * inputs + 4 * 14)
    memory = 4 * 14 * (max(config.history, default=0) + 1)
    world = PICTURES * pixels + 4 * STATE_SIZE + memory
    per_world = config.n_steps * sample + world
    batch = config.microbatch_size or config.batch_size
    copies = COPIES_OF_PARAMETERS + (config.average_decay > 0)  # the running average
    views = 2 if config.network == "mirrored" else 1  # each arm's own
    fixed = 4 * copies * _count_parameters(config) + 4 * PASSES * batch * views * _activations(config)
    fixed += config.eval_episodes * world  # one batch
    return fixed, per_world


def available_memory() -> int | None:
    """Bytes on JAX's default device, on a CPU as many as a container may have; None if it does not tell."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return min(filter(None, [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *container_limit("memory.max")]))


def _count_parameters(config: Config) -> int:
    return num_parameters(jax.eval_shape(make_network(config).init, jax.random.key(0), example_inputs(config)))


def _activations(config: Config) -> int:
    """Numbers that one sample's forward pass leaves behind."""
    count = config.features_dim + 2 * sum(config.hidden_sizes)
    if config.has_pixels:
        height, width = config.image_height, config.image_width
        count += 3 * height * width
        for features, kernel, stride in config.conv:
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            count += features * height * width
    return count


def _gigabytes(size: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(size / 1e9)))
    return f"{size / 1e9:.{min(digits, 3)}f} GB"
