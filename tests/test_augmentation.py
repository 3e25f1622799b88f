"""Pictures that are changed while learning: by how much, which of them, and that nothing else is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aloha_jax import cli, training
from aloha_jax.augmentation import augmented, color_jitter, random_shift
from aloha_jax.config import Config, ConfigError
from aloha_jax.env import Env
from aloha_jax.factory import make_from_config
from aloha_jax.policy import make_network
from aloha_jax.presets import PRESETS

CONFIG = dataclasses.replace(PRESETS["smoke"], n_envs=4, n_steps=4, batch_size=16, double_buffer=False)


@pytest.fixture(scope="module")
def env() -> Env:
    return make_from_config(CONFIG)


@pytest.fixture
def pictures() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (200, 6, 9, 3), 0, 256).astype(jnp.uint8)


def test_a_shifted_picture_is_a_window_with_the_edge_repeated(pictures: jax.Array) -> None:
    shifted = np.asarray(jax.jit(random_shift, static_argnums=2)(pictures, jax.random.key(0), 2))
    found = set()
    for before, after in zip(np.asarray(pictures), shifted, strict=True):
        rows, columns = np.arange(6)[:, None], np.arange(9)[None]
        moves = {
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if (before[np.clip(rows + down, 0, 5), np.clip(columns + right, 0, 8)] == after).all()
        }
        assert len(moves) == 1
        found |= moves
    assert len(found) == 25  # every move occurs


def test_jitter_stays_within_its_factors() -> None:
    """Half of each picture is 80, half 120: brightness b and contrast c make the mean 100 b and the difference 40 b c."""
    picture = jnp.tile(jnp.array([80, 120], jnp.uint8)[None, None, :, None], (2000, 2, 1, 3))
    changed = np.asarray(color_jitter(picture, jax.random.key(0), 0.2), float)
    dark, bright = changed[:, :, 0], changed[:, :, 1]
    assert np.ptp(dark, axis=(1, 2)).max() == np.ptp(bright, axis=(1, 2)).max() == 0  # one factor for a whole picture
    brightness = (dark + bright)[:, 0, 0] / 200
    contrast = (bright - dark)[:, 0, 0] / (40 * brightness)
    for factor in (brightness, contrast):
        assert factor.min() == pytest.approx(0.8, abs=0.03)
        assert factor.max() == pytest.approx(1.2, abs=0.03)
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.1
    assert color_jitter(jnp.full((50, 1, 1, 3), 250, jnp.uint8), jax.random.key(0), 0.5).max() == 255  # no overflow


def test_by_nothing_nothing_is_changed(pictures: jax.Array) -> None:
    inputs = {"pixels": pictures, "agent_pos": jnp.ones((200, 14))}
    unchanged = augmented(inputs, jax.random.key(0), 0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, unchanged, inputs)
    changed = augmented(inputs, jax.random.key(0), 1, 0.1)
    assert (changed["pixels"] != pictures).any()
    np.testing.assert_array_equal(changed["agent_pos"], inputs["agent_pos"])
    assert augmented({"state": inputs["agent_pos"]}, jax.random.key(0), 1, 0.1).keys() == {"state"}


def test_what_is_learnt_from_is_what_was_seen_and_the_worlds_stay_as_they_are(env: Env) -> None:
    config = Config.from_json(dataclasses.replace(CONFIG, random_shift=3, color_jitter=0.3).to_json())
    run = training.init_run(config, env)
    network = make_network(config)
    again = jax.tree.map(lambda x: x.copy(), run.env)  # keys are used up
    changing, plain = (training.make_collector(c, env, network, run) for c in (config, CONFIG))
    collected = jax.jit(changing.rollout)(run.env, jax.random.key(0))
    own = run.env.obs["pixels"]
    assert (collected.transitions.inputs["pixels"][0] != own).any()
    unchanged = jax.jit(plain.rollout)(again, jax.random.key(0))
    np.testing.assert_array_equal(unchanged.transitions.inputs["pixels"][0], own)
    inputs = jax.tree.map(lambda x: x[0], collected.transitions.inputs)
    apply: Any = network.apply
    _, value = apply(run.params, inputs)
    np.testing.assert_allclose(value, collected.transitions.value[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ("--random-shift", "-1"),
        ("--color-jitter", "1"),
        ("--obs", "state", "--random-shift", "2"),
        ("--camera-shift", "0.3"),
        ("--obs", "state", "--camera-shift", "0.01"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--(random-shift|color-jitter|camera-shift|obs) must"):
        cli.parse_config(["--preset", "smoke", *flags])
