"""How episodes begin: as the task does, or for a share of them in an archived state; and what is off in them."""

import functools

import jax
import jax.numpy as jnp

from aloha_jax.archive import RECORD_PROBABILITY, Archive, draw, empty_archive, expert_archive, record
from aloha_jax.engines import Engine
from aloha_jax.env_state import Domain, EnvState, Start
from aloha_jax.tasks.insertion import Insertion, pose_error


def split(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split each of N keys in two."""
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def initial_archive(start_states: str, engine: Engine, task: Insertion, seed: int) -> Archive | None:
    """What worlds start with: states of the `expert`, an empty `archive` of their own, or, as the `task` does, none."""
    if start_states == "expert":
        return expert_archive(engine, task, seed)
    if start_states == "archive":
        return empty_archive(engine.scene.model.nq, engine.scene.model.nv)
    return None


def sample(task: Insertion, start_share: float, archive: Archive | None, key: jax.Array) -> Start:
    """How one world's next episode begins; `start_share` of them in a state of the archive, once it holds one."""
    task_key, choice_key, archive_key = jax.random.split(key, 3)
    qpos = task.sample_start(task_key)
    qvel, target = jnp.zeros(task.scene.model.nv), jnp.zeros(14)
    if archive is None:
        return Start(qpos, qvel, target, jnp.ones((), bool))
    of_task = (archive.recorded.sum() == 0) | (jax.random.uniform(choice_key) >= start_share)
    drawn = draw(archive, archive_key)
    qpos, qvel, target = jax.tree.map(lambda a, b: jnp.where(of_task, a, b), (qpos, qvel, target), drawn)
    return Start(qpos, qvel, target, of_task)


def domain(camera_shift: float, delay_share: float, pose_noise: float, keys: jax.Array) -> Domain:
    """What is off in the coming episode of N worlds.

    Args:
        camera_shift: cameras are off by up to so many metres.
        delay_share: the share of them in which actions come late.
        pose_noise: objects seem off by so many metres, the standard deviation along each axis.
        keys: [N] PRNG keys.
    """
    shift = functools.partial(jax.random.uniform, shape=(2,), minval=-camera_shift, maxval=camera_shift)
    unit_error = functools.partial(jax.random.normal, shape=(2, 6))
    # Further keys beside the three that `sample` makes of the same one.
    camera_keys, late_keys, error_keys = (jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in (3, 4, 5))
    return Domain(
        camera=jax.vmap(shift)(camera_keys) if camera_shift else None,
        late=jax.vmap(jax.random.uniform)(late_keys) < delay_share if delay_share else None,
        pose_error=pose_error(pose_noise, jax.vmap(unit_error)(error_keys)) if pose_noise else None,
    )


def record_some(task: Insertion, state: EnvState) -> EnvState:
    """Put some of the worlds into their archive."""
    assert state.archive is not None
    keys, record_keys = split(state.key)
    chosen = jax.vmap(jax.random.uniform)(record_keys) < RECORD_PROBABILITY
    progress = state.progress.potential.mean(axis=1) / task.highest_potential
    archive = record(state.archive, chosen & ~state.done, progress, state.physics, state.target)
    return state._replace(key=keys, archive=archive)
