"""An episode is what it is in gym_aloha: the expert's actions, replayed there and here from the same starts.

`pytest -s` prints the figures.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE
from gym_aloha.utils import sample_insertion_pose

from aloha_jax import expert, scene
from aloha_jax.engines.c import action_to_ctrl
from aloha_jax.env import EnvState, make
from aloha_jax.judge import Trajectory
from benchmarks.fidelity import judge

SEEDS = range(40)
OBJECTS = (scene.PEG_QPOS, scene.SOCKET_QPOS)


@pytest.fixture(scope="module")
def plans() -> np.ndarray:
    """float32[300, N, 14], the expert's actions for each seed."""
    return np.stack([expert.plan(*sample_insertion_pose(seed)) for seed in SEEDS], axis=1)


@pytest.fixture(scope="module")
def judged(plans: np.ndarray) -> list[Trajectory]:
    """The episodes in gym_aloha's own simulation, which ends them at level 4."""
    return judge(SEEDS, plans)


def replay(physics: str, plans: np.ndarray) -> list[Trajectory]:
    """The episodes in our environment, cut at level 4 too."""
    env = make("insertion", len(SEEDS), engine="c", physics=physics, obs="state", reward="sparse", autoreset=False)
    starts = np.stack([env.task.start_from_seed(seed) for seed in SEEDS])

    def step(state: EnvState, action: jax.Array) -> tuple[EnvState, tuple[jax.Array, jax.Array]]:
        state = env.step(state, action)
        return state, (state.level, state.qpos)

    run = jax.jit(lambda starts, actions: jax.lax.scan(step, env.reset_from(starts), actions)[1])
    levels, qpos = jax.device_get(run(jnp.asarray(starts, jnp.float32), jnp.asarray(plans)))
    done = levels == 4
    ends = np.where(done.any(axis=0), done.argmax(axis=0) + 1, len(levels))
    return [
        Trajectory(seed, levels[:end, i], qpos[:end, i], np.zeros((end, 14)))
        for i, (seed, end) in enumerate(zip(SEEDS, ends, strict=True))
    ]


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


def object_distances(ours: Trajectory, theirs: Trajectory) -> np.ndarray:
    """[steps] metres between where peg or socket is, whichever is farther off, until the first of the two has ended.

    The last one compares the ends, wherever they are.
    """
    steps = min(len(ours.qpos), len(theirs.qpos))
    apart = np.concatenate([ours.qpos[: steps - 1] - theirs.qpos[: steps - 1], ours.qpos[-1:] - theirs.qpos[-1:]])
    return np.max([np.linalg.norm(apart[:, x][:, :3], axis=1) for x in OBJECTS], axis=0)


class Comparison(NamedTuple):
    """How alike two sets of episodes are."""

    agreement: float  # share of steps with the same level, until the first of the two has ended
    end: float  # metres; largest distance of an object from where it should be, at the end
    path: float  # at any time


def compare(name: str, ours: list[Trajectory], theirs: list[Trajectory]) -> Comparison:
    pairs = list(zip(ours, theirs, strict=True))
    same = np.concatenate([a.levels[: len(b.levels)] == b.levels[: len(a.levels)] for a, b in pairs])
    apart = [object_distances(a, b) for a, b in pairs]
    ends, paths = np.array([x[-1] for x in apart]), np.array([x.max() for x in apart])
    later = [len(a.levels) - len(b.levels) for a, b in pairs]
    print(
        f"\n{name}: success {len(successes(ours))} of {len(ours)} (gym_aloha {len(successes(theirs))}), later by {min(later)} to "
        f"{max(later)} steps; same level at {100 * same.mean():.2f} % of steps; objects apart in mm: at the end "
        f"{1e3 * ends.mean():.4f} (mean), {1e3 * ends.max():.4f} (max), ever {1e3 * paths.max():.4f} (max)"
    )
    return Comparison(float(same.mean()), float(ends.max()), float(paths.max()))


def test_exact_physics_are_gym_alohas(judged: list[Trajectory], plans: np.ndarray) -> None:
    ours = replay("exact", plans)
    comparison = compare("exact", ours, judged)
    assert successes(judged) == successes(ours) == list(SEEDS)
    assert comparison.agreement >= 0.96
    assert comparison.end < 0.002
    assert comparison.path < 0.002
    # Until the objects are lifted only rounding tells the two apart: starts travel in float32, which is 1e-8 m.
    lifted = sum(expert.STAGES[stage] for stage in ("approach", "descend", "close", "lift"))
    apart = [np.abs(a.qpos[:lifted] - b.qpos[:lifted]).max() for a, b in zip(ours, judged, strict=True)]
    print(f"exact, first {lifted} steps: joint positions apart by {np.median(apart):.1e} (median), {max(apart):.1e} (max)")
    assert np.median(apart) < 1e-6


def test_fast_physics_come_to_the_same_end(judged: list[Trajectory], plans: np.ndarray) -> None:
    ours = replay("fast", plans)
    comparison = compare("fast", ours, judged)
    assert len(successes(ours)) >= 0.95 * len(SEEDS)
    assert comparison.agreement >= 0.92
    assert comparison.end < 0.003
    assert comparison.path < 0.005


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
