"""Pictures changed at random while learning, so that a policy does not rely on one camera pose or one light.

They are changed before the policy decides and learnt from as they were seen (domain randomisation, Tobin et al. 2017). To change
them in the update alone, as off-policy methods do (random shifts, Kostrikov et al. 2020), would be to compare an action's
probabilities under two observations (Raileanu et al. 2021).
"""

import jax
import jax.numpy as jnp


def random_shift(pixels: jax.Array, key: jax.Array, most: int) -> jax.Array:
    """Pictures uint8[N, H, W, 3], each moved by up to `most` pixels along either axis; what enters repeats the edge."""
    padded = jnp.pad(pixels, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(pixels), 2), 0, 2 * most + 1)

    def window(picture: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(picture, (corner[0], corner[1], 0), pixels.shape[1:])

    return jax.vmap(window)(padded, corners)


def color_jitter(pixels: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Pictures uint8[N, H, W, 3], brightness and then contrast of each times a factor in 1 +- `strength`."""
    brightness, contrast = 1 + strength * jax.random.uniform(key, (2, len(pixels), 1, 1, 1), minval=-1.0)
    x = brightness * pixels.astype(jnp.float32)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return jnp.clip(jnp.round(mean + contrast * (x - mean)), 0, 255).astype(jnp.uint8)


def augmented(inputs: dict[str, jax.Array], key: jax.Array, shift: int, jitter: float) -> dict[str, jax.Array]:
    """Network inputs with their pictures, if there are any, changed by both; by 0 not at all."""
    if "pixels" not in inputs:
        return inputs
    shift_key, jitter_key = jax.random.split(key)
    pixels = inputs["pixels"]
    if shift:
        pixels = random_shift(pixels, shift_key, shift)
    if jitter:
        pixels = color_jitter(pixels, jitter_key, jitter)
    return {**inputs, "pixels": pixels}
