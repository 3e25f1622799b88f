"""An episode is what it is in gym_aloha: the expert's actions, replayed there and here from the same starts.

`pytest -s` prints the figures.
"""

from typing import Any, cast

import mujoco
import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE
from gym_aloha.utils import sample_insertion_pose

from aloha_jax import expert, scene
from aloha_jax.engines.c import action_to_ctrl
from aloha_jax.factory import make
from aloha_jax.judge import Trajectory
from benchmarks.fidelity import Agreement, compare, judge, replay

SEEDS = range(40)


@pytest.fixture(scope="module")
def plans() -> np.ndarray:
    """float32[300, N, 14], the expert's actions for each seed."""
    return np.stack([expert.plan(*sample_insertion_pose(seed)) for seed in SEEDS], axis=1)


@pytest.fixture(scope="module")
def judged(plans: np.ndarray) -> list[Trajectory]:
    """The episodes in gym_aloha's own simulation, which ends them at level 4."""
    return judge(SEEDS, plans)


@pytest.mark.parametrize("seed", [0, 1])
def test_mj_step_on_our_model_is_gym_aloha_to_the_bit(judged: list[Trajectory], plans: np.ndarray, seed: int) -> None:
    """The scene's edits change nothing physical, and dm_control adds nothing; the rest is rounding on the way through JAX."""
    model = scene.make_scene(physics="exact").model
    data = mujoco.MjData(model)
    data.qpos[:] = np.concatenate([START_ARM_POSE, *sample_insertion_pose(seed)])
    for action, wanted in zip(plans[:, seed], judged[seed].qpos, strict=False):
        data.ctrl[:] = action_to_ctrl(action[None])[0]
        mujoco.mj_step(model, data, nstep=10)
        np.testing.assert_array_equal(data.qpos, wanted)


def successes(trajectories: list[Trajectory]) -> list[int]:
    return [trajectory.seed for trajectory in trajectories if trajectory.levels[-1] == 4]


def replayed(physics: str, judged: list[Trajectory], plans: np.ndarray) -> tuple[list[Trajectory], Agreement]:
    """The episodes in our C engine, and how like gym_aloha's they are."""
    ours = replay({"engine": "c", "physics": physics}, SEEDS, plans)
    agreement = compare(ours, judged)
    final, farthest = 1e3 * agreement.final, 1e3 * agreement.farthest.max()
    print(
        f"\n{physics}: success {agreement.success} of {len(ours)}, later by {agreement.later} steps; same level at "
        f"{100 * agreement.same_level:.2f} % of steps; objects apart in mm, at the end {final.mean():.4f} (mean), "
        f"{final.max():.4f} (max), ever {farthest:.4f} (max)"
    )
    return ours, agreement


def test_exact_physics_are_gym_alohas(judged: list[Trajectory], plans: np.ndarray) -> None:
    ours, agreement = replayed("exact", judged, plans)
    assert successes(judged) == successes(ours) == list(SEEDS)
    assert agreement.same_level >= 0.96
    assert agreement.final.max() < 0.002
    assert agreement.farthest.max() < 0.002
    # Until the objects are lifted only rounding tells the two apart: starts travel in float32, which is 1e-8 m.
    lifted = sum(expert.STAGES[stage] for stage in ("approach", "descend", "close", "lift"))
    apart = [np.abs(a.qpos[:lifted] - b.qpos[:lifted]).max() for a, b in zip(ours, judged, strict=True)]
    print(f"exact, first {lifted} steps: joint positions apart by {np.median(apart):.1e} (median), {max(apart):.1e} (max)")
    assert np.median(apart) < 1e-6


def test_fast_physics_come_to_the_same_end(judged: list[Trajectory], plans: np.ndarray) -> None:
    ours, agreement = replayed("fast", judged, plans)
    assert len(successes(ours)) >= 0.95 * len(SEEDS)
    assert agreement.same_level >= 0.92
    assert agreement.final.max() < 0.003
    assert agreement.farthest.max() < 0.005


def test_starts_are_those_of_gym_alohas_reset() -> None:
    """What gym_aloha's environment makes of a seed, with its joints at rest."""
    import gym_aloha  # noqa: F401  (registers the environment)
    import gymnasium

    env = gymnasium.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels_agent_pos", disable_env_checker=True)
    inner = cast(Any, env.unwrapped)._env
    inner.task.get_observation = lambda physics: {"qpos": inner.task.get_qpos(physics), "images": {"top": np.zeros((1, 1, 3))}}
    ours = make("insertion", 1)
    for seed in (0, 7):
        env.reset(seed=seed)
        np.testing.assert_array_equal(inner.physics.data.qpos, ours.task.start_from_seed(seed))
        assert not inner.physics.data.qvel.any()
        assert not inner.physics.data.qacc_warmstart.any()
        np.testing.assert_array_equal(inner.physics.data.ctrl, START_ARM_POSE)
    env.close()
