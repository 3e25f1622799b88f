"""How episodes begin: as the task does, or for a share of them in an archived state; and where their camera is."""

import jax
import jax.numpy as jnp

from aloha_jax.archive import RECORD_PROBABILITY, Archive, draw, empty_archive, expert_archive, record
from aloha_jax.engines import Engine
from aloha_jax.env_state import EnvState, Start
from aloha_jax.tasks.insertion import Insertion


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


def camera(most: float, keys: jax.Array) -> jax.Array | None:
    """How far the cameras of N worlds are off their place in the coming episode, float32[N, 2] metres; None if `most` is 0."""
    if most == 0.0:
        return None
    # A fourth key beside the three that `sample` makes of the same one.
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 3), (2,), minval=-most, maxval=most))(keys)


def record_some(task: Insertion, state: EnvState) -> EnvState:
    """Put some of the worlds into their archive."""
    assert state.archive is not None
    keys, record_keys = split(state.key)
    chosen = jax.vmap(jax.random.uniform)(record_keys) < RECORD_PROBABILITY
    progress = state.progress.potential.mean(axis=1) / task.highest_potential
    archive = record(state.archive, chosen & ~state.done, progress, state.physics, state.target)
    return state._replace(key=keys, archive=archive)
