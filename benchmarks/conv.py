"""Forward and gradient rates of the guide's encoder: XLA's convolution against `networks.conv_by_slices`, side by side.

uv run benchmarks/conv.py --size 64
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tyro

from aloha_jax import networks
from aloha_jax.config import NATURE_CNN


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to measure."""

    size: int = 64
    """Height and width of the pictures."""
    batch_size: int = 256
    """Pictures per call."""
    repeats: int = 7
    """Calls of each; the fastest counts."""


def xla_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)


def rate(function: Callable[..., jax.Array], *args: jax.Array, repeats: int, samples: int) -> float:
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return samples / min(times)


def main(flags: Flags) -> None:
    pixels = jax.random.randint(jax.random.key(0), (flags.batch_size, flags.size, flags.size, 3), 0, 256).astype(jnp.uint8)
    params = networks.PixelEncoder().init(jax.random.key(1), pixels[:1])["params"]

    def encode(params: dict, pixels: jax.Array, conv: Callable) -> jax.Array:
        x = pixels.astype(jnp.float32) / 255.0
        for i, (_, _, stride) in enumerate(NATURE_CNN):
            layer = params[f"Conv_{i}"]
            x = jax.nn.relu(conv(x, layer["kernel"], stride) + layer["bias"][None, None, None])
        return jnp.square(x).mean()

    print("| convolution | forward, pictures/s | gradient, pictures/s |\n|---|---|---|")
    for name, conv in (("XLA", xla_conv), ("slices", networks.conv_by_slices)):
        forward = jax.jit(lambda p, x, conv=conv: encode(p, x, conv))
        gradient = jax.jit(jax.grad(lambda p, x, conv=conv: encode(p, x, conv)))
        rates = [rate(f, params, pixels, repeats=flags.repeats, samples=flags.batch_size) for f in (forward, gradient)]
        print(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
