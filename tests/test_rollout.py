"""Collecting in two halves, one of which is drawn while the other one moves: the same data, and really at the same time."""

import dataclasses
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aloha_jax
from aloha_jax import networks, training
from aloha_jax.config import Config
from aloha_jax.env import Env, make_from_config
from aloha_jax.pixels.egl import EglRenderer
from aloha_jax.policy import make_network
from aloha_jax.presets import PRESETS
from aloha_jax.rollout import Collector, PipelinedCollector, Rollout
from aloha_jax.scene import make_visual_model
from aloha_jax.training import RunState

CONFIG = dataclasses.replace(
    PRESETS["smoke"], obs="pixels_agent_pos", observe_target=True, history=(2, 3), n_envs=4, n_steps=7, episode_length=5
)


class Watched(EglRenderer):
    """Counts its drawings, and those during which the engine took a step: it waits for one, but not for ever."""

    drawings = overlapped = 0

    def __init__(self, config: Config):
        super().__init__(make_visual_model("insertion", "fast", config.image_height, config.image_width, config.crop), 1)
        self.stepped = threading.Event()
        self.seconds = 0.0

    def render(self, qpos: np.ndarray) -> np.ndarray:
        self.stepped.clear()
        pictures = super().render(qpos)
        self.drawings += 1
        self.overlapped += self.stepped.wait(self.seconds)
        return pictures


@pytest.fixture(scope="module")
def renderer() -> Iterator[Watched]:
    with Watched(CONFIG) as renderer:
        yield renderer


@pytest.fixture(scope="module")
def env(renderer: Watched) -> Env:
    env = make_from_config(CONFIG, frames=renderer)
    step = env.engine._host_step  # type: ignore[attr-defined]

    def watched_step(*args):
        renderer.stepped.set()
        return step(*args)

    env.engine._host_step = watched_step  # type: ignore[attr-defined]
    return env


@pytest.fixture(scope="module")
def run(env: Env) -> RunState:
    return training.init_run(CONFIG, env)


def compiled(kind: type[Collector], env: Env, run: RunState) -> Callable[[], Rollout]:
    collector = kind(CONFIG, env, make_network(CONFIG), run.params, run.stats)
    rollout = jax.jit(collector.rollout)
    return lambda: rollout(jax.tree.map(lambda x: x.copy(), run.env), jax.random.key(1))  # a copy: keys are used up


@pytest.fixture(scope="module")
def pipelined(env: Env, run: RunState) -> Callable[[], Rollout]:
    return compiled(PipelinedCollector, env, run)


def same(a: jax.Array, b: jax.Array) -> None:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))
    elif a.dtype != jnp.uint32:  # the engine's float64 state as bits: half a batch rounds its actions otherwise
        tolerance = 2 if a.dtype == jnp.uint8 else 1e-3
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-3, atol=tolerance)


def test_one_half_is_drawn_while_the_other_moves(
    pipelined: Callable[[], Rollout], env: Env, run: RunState, renderer: Watched
) -> None:
    renderer.drawings = renderer.overlapped = 0
    renderer.seconds = 10.0
    try:
        jax.block_until_ready(pipelined())
    finally:
        renderer.seconds = 0.05
    assert renderer.drawings == 2 * CONFIG.n_steps
    assert renderer.overlapped == renderer.drawings - 1  # nothing is left to do during the last one
    renderer.drawings = renderer.overlapped = 0
    jax.block_until_ready(compiled(Collector, env, run)())
    renderer.seconds = 0.0
    assert renderer.drawings == CONFIG.n_steps
    assert renderer.overlapped == 0


def test_the_halves_are_what_each_would_be_alone(env: Env, run: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every world of the pipelined rollout does what it does in a plain one whose sampling is the same."""
    # Without noise: the two draw it in other shapes.
    monkeypatch.setattr(networks, "sample", lambda distribution, key: distribution.mean)
    plain, pipelined = (compiled(kind, env, run)() for kind in (Collector, PipelinedCollector))
    assert plain.transitions.truncated.any()
    plain, pipelined = (
        x._replace(transitions=x.transitions._replace(final_value=x.transitions.final_value * x.transitions.truncated))
        for x in (plain, pipelined)
    )
    for name in ("episodes", "vectors", "env", "last_value", "transitions"):
        expected, got = getattr(plain, name), getattr(pipelined, name)
        jax.tree.map(same, expected, got)


def test_worlds_explore_each_in_its_own_way(pipelined: Callable[[], Rollout]) -> None:
    action = np.asarray(pipelined().transitions.action)
    assert len(np.unique(action.reshape(-1, action.shape[-1]), axis=0)) == CONFIG.n_envs * CONFIG.n_steps


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, PipelinedCollector),
        ({"double_buffer": False}, Collector),
        ({"n_envs": 3}, Collector),
        ({"start_states": "archive"}, Collector),
    ],
)
def test_who_is_pipelined(env: Env, run: RunState, change: dict, kind: type) -> None:
    config = dataclasses.replace(CONFIG, **change)
    assert type(training.make_collector(config, env, make_network(config), run)) is kind


def test_what_is_not_drawn_on_the_host_is_not_pipelined() -> None:
    assert not aloha_jax.make(num_envs=2, obs="state").draws_ahead
    assert not aloha_jax.make(num_envs=2, obs="pixels", renderer="warp", image_height=8, image_width=8).draws_ahead


def test_a_renderer_that_fails_says_so(run: RunState) -> None:
    """From the drawing thread, through the callback, to whoever asked for the rollout."""
    renderer = Watched(CONFIG)
    env = make_from_config(CONFIG, frames=renderer)
    renderer.close()
    with pytest.raises(Exception, match="the renderer is closed"):
        jax.block_until_ready(compiled(PipelinedCollector, env, run)())
