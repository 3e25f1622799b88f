"""States to start from: what is put in comes out, and episodes start there as often as they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aloha_jax
from aloha_jax import archive
from aloha_jax.archive import Archive, draw, empty_archive, record
from aloha_jax.engines import Physics, make_engine
from aloha_jax.env import EnvState
from aloha_jax.tasks import make_task


def worlds(*numbers: float) -> Physics:
    """Worlds that are recognised by their first coordinate."""
    qpos = jnp.tile(jnp.array(numbers)[:, None], (1, 30))
    return Physics(None, qpos, 10 * qpos[:, :28], None)


def recorded(*steps: tuple[list[float], list[bool], list[float]]) -> Archive:
    found = empty_archive(30, 28)
    for numbers, keep, potential in steps:
        physics = worlds(*numbers)
        found = jax.jit(record)(
            found, jnp.array(keep), jnp.array(potential) / (archive.NUM_BINS - 1), physics, 100 * physics.qpos[:, :14]
        )
    return found


def drawn(source: Archive, n: int = 200) -> np.ndarray:
    qpos, qvel, target = jax.jit(jax.vmap(draw, in_axes=(None, 0)))(source, jax.random.split(jax.random.key(0), n))
    np.testing.assert_allclose(qvel, 10 * qpos[:, :28])
    np.testing.assert_allclose(target, 100 * qpos[:, :14], rtol=1e-6)
    return np.asarray(qpos[:, 0])


def test_worlds_that_are_kept_come_out_again_whole() -> None:
    source = recorded(([1, 2, 3, 4], [True, False, True, True], [0.5, 0.5, 0.5, 7.2]), ([5], [True], [0.1]))
    assert source.recorded.tolist() == [3, 0, 0, 0, 0, 0, 0, 1] + [0] * (archive.NUM_BINS - 8)
    assert set(drawn(source)) == {1.0, 3.0, 4.0, 5.0}


def test_bins_are_drawn_equally_however_full_they_are() -> None:
    source = recorded(([1, 2, 3, 4], [True] * 4, [0, 0, 0, 9.9]))
    share = (drawn(source, 2000) == 4).mean()
    assert share == pytest.approx(0.5, abs=0.05)


def test_potentials_beyond_the_ends_fall_into_the_last_bins() -> None:
    source = recorded(([1, 2], [True, True], [-3.0, 99.0]))
    assert source.recorded[0] == source.recorded[-1] == 1


def test_a_full_bin_forgets_its_oldest() -> None:
    slots = archive.SLOTS
    first, second = [float(i) for i in range(1, slots + 1)], [slots + 1.0, slots + 2.0]
    source = recorded((first, [True] * slots, [0.0] * slots), (second, [True] * 2, [0.0] * 2))
    assert set(np.asarray(source.qpos[0, :, 0])) == set(range(3, slots + 3))
    assert source.recorded[0] == slots + 2


@pytest.fixture(scope="module")
def expert_states() -> Archive:
    engine = make_engine("c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "EXPERT_EPISODES", 32)
        return archive.expert_archive(engine, make_task("insertion", engine.scene), seed=0)


def test_the_experts_states_lie_all_along_the_way(expert_states: Archive) -> None:
    counts = np.asarray(expert_states.recorded)
    assert counts[:-1].min() > 0.8 * counts[:-1].max() > 130  # every part of the way as often as it is long
    assert np.isfinite(expert_states.qpos).all()
    held = np.asarray(expert_states.qpos[9, : min(int(counts[9]), archive.SLOTS)])
    assert (held[:, [18, 25]] > 0.03).all()  # both objects are in the air


def starts(env: aloha_jax.Env, steps: int) -> tuple[EnvState, list[EnvState]]:
    state = jax.jit(env.reset)(jax.random.key(0))
    step = jax.jit(env.step)
    seen = []
    for _ in range(steps):
        state = step(state, jnp.zeros((env.num_envs, 14)))
        seen.append(state)
    return state, seen


@pytest.fixture(scope="module")
def recording() -> tuple[aloha_jax.Env, EnvState, list[EnvState]]:
    env = aloha_jax.make(num_envs=64, action="delta", reward="dense", episode_length=6, start_states="archive", start_share=0.7)
    return env, *starts(env, 40)


def test_the_learners_states_are_recorded_and_started_from(recording: tuple) -> None:
    _, state, seen = recording
    assert seen[0].task_start.all()
    assert int(state.archive.recorded.sum()) == pytest.approx(64 * 40 * archive.RECORD_PROBABILITY * 5 / 6, rel=0.5)
    late = np.stack([s.next_task_start for s in seen[-12:] if s.done.any()])
    assert late.mean() == pytest.approx(0.3, abs=0.15)


def test_an_archived_start_is_the_recorded_state(recording: tuple) -> None:
    _, _, seen = recording
    known = {tuple(row) for row in np.asarray(seen[-1].archive.qpos).reshape(-1, 30)}
    step = next(s for s in reversed(seen) if (s.done & ~s.next_task_start).any())
    begun = np.flatnonzero(step.done & ~step.next_task_start)
    assert {tuple(row) for row in np.asarray(step.qpos)[begun]} <= known
    np.testing.assert_array_equal(np.asarray(step.clock)[begun], 0)


def test_an_episode_is_not_paid_for_what_was_there_when_it_began(expert_states: Archive) -> None:
    """Held objects in the air: their potential is no reward of the first step, nor their level a first one."""
    env = aloha_jax.make(num_envs=8, action="delta", reward="dense")
    count = min(int(expert_states.recorded[8]), 8)
    qpos = expert_states.qpos[8, jnp.arange(8) % count]
    state = jax.jit(env.reset_from)(qpos)
    assert (np.asarray(state.level) >= 1).sum() >= 6
    np.testing.assert_array_equal(state.progress.best_level, state.level)
    assert (np.asarray(state.progress.grasp) == 1).any()
    after = jax.jit(env.step)(state, jnp.zeros((8, 14)))
    assert np.asarray(after.reward).max() < 0.5  # their potentials are 4 and more
    assert (np.asarray(state.progress.potential).max(axis=1) > 3).sum() >= 6


def test_a_bin_that_more_share_at_once_than_it_has_slots_for_holds_the_last_of_them() -> None:
    count = archive.SLOTS + 3
    source = recorded(([float(i) for i in range(count)], [True] * count, [0.0] * count))
    assert set(np.asarray(source.qpos[0, :, 0])) == set(range(3, count))
    assert set(drawn(source)) <= set(range(3, count))
