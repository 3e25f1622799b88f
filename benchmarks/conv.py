"""Forward and gradient rates of an encoder on a CPU: XLA's convolution, `networks.conv_by_slices`, and what we use of the two.

uv run benchmarks/conv.py --size 64
uv run benchmarks/conv.py --preset pixels
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

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
    """Pictures per call."""
    repeats: int = 7
    """Calls of each; the fastest counts."""


def rate(function: Callable[..., jax.Array], *args: jax.Array, repeats: int, samples: int) -> float:
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return samples / min(times)


def main(flags: Flags) -> None:
    config = dataclasses.replace(PRESETS["guide"], image_height=flags.size, image_width=flags.size)
    if flags.preset is not None:
        config = PRESETS[flags.preset]
    convs, size = config.conv, (config.image_height, config.image_width)
    pixels = jax.random.randint(jax.random.key(0), (flags.batch_size, *size, 3), 0, 256).astype(jnp.uint8)
    params = networks.PixelEncoder(conv=convs).init(jax.random.key(1), pixels[:1])["params"]

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
        forward = jax.jit(lambda p, x, conv=conv: encode(p, x, conv))
        gradient = jax.jit(jax.grad(lambda p, x, conv=conv: encode(p, x, conv)))
        rates = [rate(f, params, pixels, repeats=flags.repeats, samples=flags.batch_size) for f in (forward, gradient)]
        print(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
