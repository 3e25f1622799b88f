"""Collecting in two halves, one of which is drawn while the other one moves: the same data, and really at the same time."""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aloha_jax
from aloha_jax import training
from aloha_jax.config import Config
from aloha_jax.env import Env, EnvState
from aloha_jax.factory import make_from_config
from aloha_jax.pixels.egl import EglRenderer
from aloha_jax.pixels.triangles import triangulate
from aloha_jax.policy import Policy, init_params, init_stats, make_network
from aloha_jax.presets import PRESETS
from aloha_jax.rollout import Collector, PipelinedCollector, Rollout
from aloha_jax.scene import CAMERA
from aloha_jax.training import RunState
from aloha_jax.visual import make_visual_model

CONFIG = dataclasses.replace(
    PRESETS["smoke"], obs="pixels_agent_pos", observe_target=True, history=(2, 3), n_envs=4, n_steps=10, episode_length=5
)


class Watched(EglRenderer):
    """Counts its drawings, and those during which the engine took a step: it waits for one, but not for ever."""

    drawings = overlapped = 0

    def __init__(self, config: Config):
        model = make_visual_model("insertion", "fast", config.image_height, config.image_width, config.crop)
        super().__init__(model, num_workers=1, triangles=triangulate(model, CAMERA))
        self.seconds = 0.0
        self.steps, self.moved = 0, threading.Condition()
        self.asked: deque[int] = deque()  # steps when each drawing ahead was asked for

    def render(self, qpos: np.ndarray) -> np.ndarray:
        before = self.asked.popleft() if self.asked else self.steps
        pictures = super().render(qpos)
        self.drawings += 1
        with self.moved:
            self.overlapped += self.moved.wait_for(lambda: self.steps > before, self.seconds)
        return pictures

    def watch(self, env: Env) -> None:
        step, ask = env.engine._host_step, env._views._ahead._ask  # type: ignore[attr-defined, union-attr]

        def watched_step(*args):
            with self.moved:
                self.steps += 1
                self.moved.notify_all()
            return step(*args)

        def watched_ask(*args):
            self.asked.append(self.steps)
            return ask(*args)

        env.engine._host_step = watched_step  # type: ignore[attr-defined]
        env._views._ahead._ask = watched_ask  # type: ignore[union-attr, method-assign]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Watched]:
    with Watched(CONFIG) as renderer:
        yield renderer


@pytest.fixture(scope="module")
def env(renderer: Watched) -> Env:
    env = make_from_config(CONFIG, renderer=renderer)
    renderer.watch(env)
    return env


@pytest.fixture(scope="module")
def run(env: Env) -> RunState:
    return training.init_run(CONFIG, env)


def compiled(kind: type[Collector], env: Env, run: RunState, config: Config = CONFIG, **teaching: Any) -> Callable[..., Rollout]:
    @jax.jit
    def rollout(params: Any, worlds: EnvState) -> Rollout:
        return kind(config, env, make_network(config), params, run.stats, **teaching).rollout(worlds, jax.random.key(1))

    return lambda params=run.params: rollout(params, jax.tree.map(lambda x: x.copy(), run.env))  # a copy: keys are used up


@pytest.fixture(scope="module")
def plain(env: Env, run: RunState) -> Callable[..., Rollout]:
    return compiled(Collector, env, run)


@pytest.fixture(scope="module")
def pipelined(env: Env, run: RunState) -> Callable[..., Rollout]:
    return compiled(PipelinedCollector, env, run)


def same(a: jax.Array, b: jax.Array) -> None:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))
    elif a.dtype != jnp.uint32:  # the engine's float64 state as bits: half a batch rounds its actions otherwise
        tolerance = 2 if a.dtype == jnp.uint8 else 1e-3
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-3, atol=tolerance)


def test_one_half_is_drawn_while_the_other_moves(
    plain: Callable[..., Rollout], pipelined: Callable[..., Rollout], renderer: Watched
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
    jax.block_until_ready(plain())
    renderer.seconds = 0.0
    assert renderer.drawings == CONFIG.n_steps
    assert renderer.overlapped == 0


def test_the_halves_are_what_each_would_be_alone(
    plain: Callable[..., Rollout], pipelined: Callable[..., Rollout], run: RunState
) -> None:
    """Every world of the pipelined rollout does what it does in a plain one."""
    # Without noise: the two draw it in other shapes.
    params = run.params | {"params": run.params["params"] | {"log_std": jnp.full_like(run.params["params"]["log_std"], -30.0)}}
    both_the_same(plain(params), pipelined(params))


@pytest.mark.slow
def test_so_they_are_under_all_that_the_pixel_recipe_and_the_experts_states_add(renderer: Watched) -> None:
    """Two arms, a critic that sees the state, a teacher that always acts, episodes from an archive."""
    student = dataclasses.replace(CONFIG, network="mirrored", privileged_critic=True, start_states="expert", start_share=1.0)
    teacher = dataclasses.replace(
        student, obs="state", history=(), observe_target=False, start_states="task", privileged_critic=False
    )
    params = jax.tree.map(lambda x: 2.0 * x, init_params(teacher, jax.random.key(3)))
    policy = Policy(teacher, params, init_stats(teacher))
    env = make_from_config(student, renderer=renderer)
    run = training.init_run(student, env)
    plain, pipelined = (
        compiled(kind, env, run, config=student, teacher=policy, teacher_mix=1.0)() for kind in (Collector, PipelinedCollector)
    )
    assert not plain.transitions.own.any()  # type: ignore[union-attr]
    assert not plain.env.next_task_start.all()
    both_the_same(without_actions(plain), without_actions(pipelined))


def without_actions(x: Rollout) -> Rollout:
    """Without what the student sampled, which nobody heard of."""
    return x._replace(transitions=x.transitions._replace(action=jnp.zeros(1), log_prob=jnp.zeros(1)))


def both_the_same(plain: Rollout, pipelined: Rollout) -> None:
    assert plain.transitions.truncated.any()
    for a, b in zip(*(with_known_values(x) for x in (plain, pipelined)), strict=True):
        jax.tree.map(same, a, b)


def with_known_values(x: Rollout) -> Rollout:
    """Without values that mean nothing: those of the end of episodes that went on."""
    known = x.transitions.truncated.reshape(x.transitions.truncated.shape + (1,) * (x.transitions.final_value.ndim - 2))
    return x._replace(transitions=x.transitions._replace(final_value=x.transitions.final_value * known))


def test_an_episode_that_began_in_its_middle_does_not_count(plain: Callable[..., Rollout], run: RunState) -> None:
    """In worlds whose clocks start anywhere, only episodes as long as the time limit are counted."""
    rollout = plain()
    ends = int(rollout.transitions.truncated.sum() + rollout.transitions.terminated.sum())
    begun_in_the_middle = int((run.env.clock > 0).sum())
    assert begun_in_the_middle > 0
    assert rollout.episodes["episodes"] == ends - begun_in_the_middle > 0
    assert rollout.episodes["episode_length"] == CONFIG.episode_length * rollout.episodes["episodes"]


def test_worlds_explore_each_in_its_own_way(pipelined: Callable[..., Rollout]) -> None:
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
    env = make_from_config(CONFIG, renderer=renderer)
    renderer.close()
    with pytest.raises(Exception, match="the renderer is closed"):
        jax.block_until_ready(compiled(PipelinedCollector, env, run)())
