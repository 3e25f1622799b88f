"""Forward and gradient rates of an encoder on a CPU: XLA's convolution, `networks.conv_by_slices`, and what we use of the two.

uv run benchmarks/conv.py --size 64
uv run benchmarks/conv.py --preset pixels
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from aloha_jax import networks
from aloha_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to measure."""

    size: int = 64
    """Height and width of the pictures, for the guide's encoder."""
    preset: Literal["pixels"] | None = None
    """A preset, for its encoder and its size of picture."""
    batch_size: int = 256
    """Pictures at a time."""
    batches: int = 4
    """So many of them per call, as in an update: memory is asked for once."""
    repeats: int = 7
    """Calls of each; the fastest counts."""


def rate(function: Callable[..., Any], *args: Any, repeats: int, samples: int) -> float:
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return samples / min(times)


def over_batches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Its sum over batches, one after the other."""

    def add(params: dict, total: Any, pixels: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(params, pixels)), None

    def total(params: dict, pixels: jax.Array) -> Any:
        first = function(params, pixels[0])
        return jax.lax.scan(functools.partial(add, params), first, pixels[1:])[0]

    return jax.jit(total)


def main(flags: Flags) -> None:
    config = dataclasses.replace(PRESETS["guide"], image_height=flags.size, image_width=flags.size)
    if flags.preset is not None:
        config = PRESETS[flags.preset]
    convs, size = config.conv, (config.image_height, config.image_width)
    shape = (flags.batches, flags.batch_size, *size, 3)
    pixels = jax.random.randint(jax.random.key(0), shape, 0, 256).astype(jnp.uint8)
    params = networks.PixelEncoder(conv=convs).init(jax.random.key(1), pixels[0, :1])["params"]

    def encode(params: dict, pixels: jax.Array, conv: Callable) -> jax.Array:
        x = pixels.astype(jnp.float32) / 255.0
        for i, (_, _, stride) in enumerate(convs):
            layer = params[f"Conv_{i}"]
            x = jax.nn.relu(conv(x, layer["kernel"], stride) + layer["bias"][None, None, None])
        return jnp.square(x).mean()

    print(f"{convs} on {size[0]}x{size[1]}, batches of {flags.batch_size}")
    print("| convolution | forward, pictures/s | gradient, pictures/s |\n|---|---|---|")
    ways = (("XLA", networks.conv_by_xla), ("slices", networks.conv_by_slices), ("ours", networks.conv_on_cpu))
    for name, conv in ways:
        forward = functools.partial(encode, conv=conv)
        rates = [
            rate(over_batches(f), params, pixels, repeats=flags.repeats, samples=flags.batches * flags.batch_size)
            for f in (forward, jax.grad(forward))
        ]
        print(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
