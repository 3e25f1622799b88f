"""Gymnasium's view of the environment."""

from collections.abc import Iterator
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.vector import VectorEnv

import aloha_jax


@pytest.fixture(scope="module")
def env() -> Iterator[VectorEnv]:
    env = gymnasium.make_vec(aloha_jax.gym.ENV_ID, num_envs=3, obs="state", action="delta", reward="dense", episode_length=5)
    yield env
    env.close()


def test_observations_and_actions_live_in_their_spaces(env: VectorEnv) -> None:
    assert env.single_observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (142,), np.float32)
    obs, _ = env.reset(seed=1)
    assert env.observation_space.contains(obs)
    obs, reward, terminated, truncated, infos = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs)
    assert reward.shape == terminated.shape == truncated.shape == infos["level"].shape == (3,)


def test_wrappers_may_write_into_what_they_are_given(env: VectorEnv) -> None:
    clipped = gymnasium.wrappers.vector.ClipReward(env, -1e-3, 1e-3)
    obs, infos = clipped.reset(seed=1)
    for _ in range(5):
        obs, reward, *_, infos = clipped.step(clipped.action_space.sample())
        assert np.abs(reward).max() <= 1e-3
        obs += 1
    infos["final_obs"][0] += 1


def test_a_seed_decides_everything(env: VectorEnv) -> None:
    actions = np.random.default_rng(0).normal(size=(7, 3, 14)).astype(np.float32)

    def episode(seed: int) -> list[np.ndarray]:
        first, _ = env.reset(seed=seed)
        return [first, *(env.step(a)[0] for a in actions)]

    np.testing.assert_array_equal(episode(3), episode(3))
    assert not np.array_equal(episode(3)[0], episode(4)[0])


def test_worlds_that_stop_are_not_gymnasiums() -> None:
    with pytest.raises(ValueError, match="autoreset is"):
        gymnasium.make_vec(aloha_jax.gym.ENV_ID, num_envs=2, autoreset=False)


def test_without_a_seed_the_next_reset_differs(env: VectorEnv) -> None:
    first, _ = env.reset(seed=1)
    second, _ = env.reset()
    assert not np.array_equal(first, second)


def test_ended_episodes_restart_in_the_same_step_and_hand_over_their_last_observation(env: VectorEnv) -> None:
    env.reset(seed=1)
    for _ in range(4):
        *_, truncated, infos = env.step(np.zeros((3, 14), np.float32))
        assert not truncated.any()
        assert "final_obs" not in infos
    obs, _, _, truncated, infos = env.step(np.zeros((3, 14), np.float32))
    assert truncated.all()
    assert infos["_final_obs"].all()
    height = [35, 68 + 35]  # of socket and peg: released at 0.05 m, they have fallen for a tenth of a second
    np.testing.assert_allclose(obs[:, height], 0.05, atol=1e-6)
    assert (np.stack(infos["final_obs"])[:, height] < 0.03).all()
    np.testing.assert_array_equal(infos["final_info"]["level"], infos["level"])


def test_infos_have_the_form_of_gymnasiums_own_environments() -> None:
    """One world of two ends: a dictionary of observations for that one, None for the other, and masks beside everything."""
    env = gymnasium.make_vec(
        aloha_jax.gym.ENV_ID, num_envs=2, obs="pixels_agent_pos", image_height=8, image_width=8, action="delta", reward="dense"
    )
    starts = np.stack([aloha_jax.make("insertion").task.start_from_seed(0)] * 2)
    starts[1, 16:19] = (0.0, 0.5, 2.0)  # the peg is far above the table: lost
    env.reset(seed=0, options={"qpos": starts})
    _, _, terminated, _, infos = env.step(np.zeros((2, 14), np.float32))
    assert list(terminated) == [False, True]
    assert infos["final_obs"][0] is None
    final = infos["final_obs"][1]
    assert env.single_observation_space.contains(final)
    np.testing.assert_array_equal(infos["_final_obs"], [False, True])
    for infos_of, present in ((infos, [True, True]), (infos["final_info"], [False, True])):
        for name in ("level", "is_success"):
            assert infos_of[name].shape == (2,)
            np.testing.assert_array_equal(infos_of[f"_{name}"], present)
    np.testing.assert_array_equal(infos["_final_info"], [False, True])
    env.close()


def test_worlds_have_one_seed(env: VectorEnv) -> None:
    with pytest.raises(TypeError, match="one seed for all worlds"):
        env.reset(seed=[1, 2, 3])  # type: ignore[arg-type]
    for seed in (-1, 2**32, 2**40 + 5):  # JAX would take the lower 32 bits
        with pytest.raises(ValueError, match=rf"seed lies in 0..{2**32 - 1}, not {seed}"):
            env.reset(seed=seed)
    with pytest.raises(ValueError, match="no option reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False, False])})


def test_episode_statistics_are_gymnasiums() -> None:
    """Its wrapper, which reads masks and infos, counts the five steps of each episode."""
    made = gymnasium.make_vec(aloha_jax.gym.ENV_ID, num_envs=2, action="delta", episode_length=5)
    env = gymnasium.wrappers.vector.DictInfoToList(gymnasium.wrappers.vector.RecordEpisodeStatistics(made))
    env.reset(seed=0)
    for _ in range(5):
        *_, infos = env.step(np.zeros((2, 14), np.float32))
    assert [info["episode"]["l"] for info in infos] == [5, 5]
    assert [info["final_info"]["level"] for info in infos] == [0, 0]
    env.close()


def test_it_is_the_same_environment_as_make(env: VectorEnv) -> None:
    ours = aloha_jax.make("insertion", num_envs=3, obs="state", action="delta", reward="dense", episode_length=5)
    starts = np.stack([ours.task.start_from_seed(i) for i in range(3)])
    action = np.full((3, 14), 0.5, np.float32)
    first, _ = env.reset(options={"qpos": starts})
    state = jax.jit(ours.reset_from)(starts)
    np.testing.assert_array_equal(first, state.obs)
    obs, reward, *_ = env.step(action)
    state = jax.jit(ours.step)(state, action)
    np.testing.assert_array_equal(obs, state.obs)
    np.testing.assert_array_equal(reward, state.reward)


@pytest.mark.parametrize("more", [{}, {"observe_target": True, "history": (2, 5)}])
@pytest.mark.parametrize("obs_type", ["pixels_agent_pos", "pixels"])
def test_pixels_come_with_what_else_was_asked_for(obs_type: str, more: dict[str, Any]) -> None:
    env = gymnasium.make_vec(aloha_jax.gym.ENV_ID, num_envs=2, obs=obs_type, image_height=12, image_width=16, **more)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    joints = {"agent_pos"} if obs_type == "pixels_agent_pos" else set()
    vectors = joints | ({"target", "history"} if more else set())
    sizes = {"agent_pos": 14, "target": 14, "history": 2 * 14}
    spaces: dict[str, gymnasium.Space] = {"pixels": gymnasium.spaces.Box(0, 255, (12, 16, 3), np.uint8)}
    spaces |= {name: gymnasium.spaces.Box(-np.inf, np.inf, (sizes[name],), np.float32) for name in vectors}
    if vectors:
        assert set(obs) == {"pixels"} | vectors
    assert env.single_observation_space == (gymnasium.spaces.Dict(spaces) if vectors else spaces["pixels"])
    pixels = obs["pixels"] if vectors else obs
    assert pixels.shape == (2, 12, 16, 3)
    assert pixels.std() > 0
    env.close()


def test_stepping_before_reset_is_refused() -> None:
    env = gymnasium.make_vec(aloha_jax.gym.ENV_ID, num_envs=1)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros((1, 14), np.float32))
