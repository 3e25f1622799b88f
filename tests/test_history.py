import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aloha_jax
from aloha_jax import archive, history
from aloha_jax.config import Config, ConfigError

LAGS = (1, 3, 5)


def test_it_recalls_what_was_pushed_that_many_steps_ago() -> None:
    """World 0's joint j is at 100 t + j in step t; world 1 is a thousand further."""
    worlds = 1000.0 * jnp.arange(2)[:, None]
    memory = history.start(worlds + jnp.arange(14.0)[None], LAGS)
    for t in range(1, 8):
        memory = history.push(memory, worlds + 100.0 * t + jnp.arange(14.0)[None])
    assert memory is not None
    left, right = np.arange(7), np.arange(7, 14)
    expected = np.concatenate([100.0 * (7 - lag) + arm for arm in (left, right) for lag in LAGS])
    np.testing.assert_array_equal(history.recall(memory, LAGS), np.stack([expected, expected + 1000]))


def test_before_it_began_nothing_moved() -> None:
    memory = history.start(jnp.arange(14.0)[None], LAGS)
    assert memory is not None
    np.testing.assert_array_equal(history.recall(memory, LAGS)[0], np.repeat(np.arange(14.0).reshape(2, 1, 7), 3, axis=1).ravel())


def test_without_lags_there_is_no_memory() -> None:
    assert history.start(jnp.zeros((2, 14)), ()) is None
    assert history.push(None, jnp.zeros((2, 14))) is None


@pytest.mark.parametrize(("obs", "remembered"), [("pixels_agent_pos", "agent_pos"), ("pixels", "target")])
def test_the_environment_remembers_and_forgets_with_the_episode(obs: str, remembered: str) -> None:
    env = aloha_jax.make(
        num_envs=2, obs=obs, action="delta", image_height=8, image_width=8, observe_target=True, history=LAGS, episode_length=6
    )
    state = jax.jit(env.reset)(jax.random.key(0))
    step = jax.jit(env.step)
    assert ("agent_pos" in state.obs) == (obs == "pixels_agent_pos")
    seen = [np.asarray(state.obs[remembered])]
    for t in range(1, 9):
        state = step(state, jnp.full((2, 14), 0.5))
        seen_last = state.final_obs if t == 6 else state.obs
        past = np.asarray(seen_last["history"]).reshape(2, 2, len(LAGS), 7)
        begin = 0 if t <= 6 else 6
        for i, lag in enumerate(LAGS):
            np.testing.assert_array_equal(past[:, :, i].reshape(2, 14), seen[max(t - lag, begin)])
        if t == 6:  # what follows belongs to the next episode
            assert state.truncated.all()
            fresh = np.asarray(state.obs["history"]).reshape(2, 2, len(LAGS), 7)
            expected = np.repeat(np.asarray(state.obs[remembered]).reshape(2, 2, 1, 7), len(LAGS), axis=2)
            np.testing.assert_array_equal(fresh, expected)
        seen.append(np.asarray(state.obs[remembered]))
    assert env.renderer is not None
    env.renderer.close()


def test_an_episode_from_an_archived_state_begins_with_the_commands_that_held_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not where the joints are: an arm on its way lags behind what it is told."""
    monkeypatch.setattr(archive, "EXPERT_EPISODES", 6)  # each takes a tenth of a second to plan
    env = aloha_jax.make(
        num_envs=8,
        obs="pixels",
        action="delta",
        image_height=8,
        image_width=8,
        observe_target=True,
        history=LAGS,
        episode_length=1,
        start_states="expert",
        start_share=1.0,
    )
    state = jax.jit(env.reset)(jax.random.key(0))
    state = jax.jit(env.step)(state, jnp.zeros((8, 14)))
    past = np.asarray(state.obs["history"]).reshape(8, 2, len(LAGS), 7)
    target = np.asarray(state.obs["target"]).reshape(8, 2, 1, 7)
    np.testing.assert_array_equal(past, np.repeat(target, len(LAGS), axis=2))
    assert np.abs(target.reshape(8, 14) - np.asarray(env.task.agent_pos(state.physics))).max() > 0.02
    assert env.renderer is not None
    env.renderer.close()


@pytest.mark.parametrize("lags", [(0,), (4, -1), (301,)])
def test_lags_that_make_no_sense(lags: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--history"):
        Config(history=lags).validate()
