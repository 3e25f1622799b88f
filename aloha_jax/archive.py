"""States from which training episodes may start besides the task's own, in bins by how far along they are.

Two sources: the scripted expert (`expert_archive`; Nair et al. 2018 reset to demonstrated states), or the learner itself, whose
states are recorded as it reaches them (`record`), so that rare progress is practised more often than it happens (Ecoffet et al.
2021, Go-Explore). Starting from an archive changes where the data comes from, not the task.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aloha_jax import expert
from aloha_jax.engines import Engine, Physics

NUM_BINS = 14  # of the arms' mean potential, or of the expert's time; the last one for the very end, where nobody starts
SLOTS = 512  # states per bin; newer ones replace older ones
RECORD_PROBABILITY = 0.02  # per world and step: some two states per episode, so that a bin holds many episodes

EXPERT_EPISODES = 96
EXPERT_MISSES, MAX_MISS = 0.33, 0.02  # share of them that miss the socket's mouth, and by how much at most, metres
EXPERT_STRIDE = 3  # control steps between the states that are kept of an expert's episode


class Archive(NamedTuple):
    """B bins of S slots.

    Attributes:
        qpos: float32[B, S, 30].
        qvel: float32[B, S, 28].
        target: float32[B, S, 14], control targets of that moment.
        recorded: int32[B], states ever put into each bin.
    """

    qpos: jax.Array
    qvel: jax.Array
    target: jax.Array
    recorded: jax.Array


def empty_archive(nq: int, nv: int) -> Archive:
    """An archive without states."""
    shape = (NUM_BINS, SLOTS)
    return Archive(jnp.zeros((*shape, nq)), jnp.zeros((*shape, nv)), jnp.zeros((*shape, 14)), jnp.zeros(NUM_BINS, jnp.int32))


def record(archive: Archive, keep: jax.Array, progress: jax.Array, physics: Physics, target: jax.Array) -> Archive:
    """Record N worlds where bool[N] `keep` holds, by their progress float32[N] in 0..1; a full bin forgets its oldest."""
    num_bins, slots = archive.qpos.shape[:2]
    bins = jnp.clip((progress * (num_bins - 1)).astype(jnp.int32), 0, num_bins - 1)
    into = jax.nn.one_hot(bins, num_bins, dtype=jnp.int32) * keep[:, None]
    # Worlds that share a bin take one slot after the other.
    rank = jnp.take_along_axis(jnp.cumsum(into, axis=0), bins[:, None], axis=1)[:, 0] - 1
    # Where more share it than it has slots, only the last ones stay: which of two that share a slot wins is left open on a GPU.
    stays = keep & (rank >= into.sum(axis=0)[bins] - slots)
    slot = jnp.where(stays, (archive.recorded[bins] + rank) % slots, slots)  # out of bounds: dropped

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[bins, slot].set(new, mode="drop")

    return Archive(
        put(archive.qpos, physics.qpos),
        put(archive.qvel, physics.qvel),
        put(archive.target, target),
        archive.recorded + into.sum(axis=0),
    )


def draw(archive: Archive, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One state's qpos [30], qvel [28] and target [14]: a bin that is not empty, then one of its states, both uniformly.

    An empty archive gives zeros: check `archive.recorded` first.
    """
    bin_key, slot_key = jax.random.split(key)
    index = jax.random.categorical(bin_key, jnp.where(archive.recorded > 0, 0.0, -jnp.inf))
    filled = jnp.clip(archive.recorded[index], 1, archive.qpos.shape[1])
    slot = jax.random.randint(slot_key, (), 0, filled)
    return archive.qpos[index, slot], archive.qvel[index, slot], archive.target[index, slot]


def expert_archive(engine: Engine, task: Any, seed: int) -> Archive:
    """States along episodes of the scripted expert, each from a fresh start pose and of another `expert.Variation`.

    Deterministic in `seed`. Of each episode the states before success are kept; those that do not succeed are left out, unless
    they were to miss: a policy must know what to do with a peg that is stuck beside the socket's mouth.
    """
    rng = np.random.default_rng(seed)
    misses = np.arange(EXPERT_EPISODES) < EXPERT_MISSES * EXPERT_EPISODES
    starts, plans = zip(*(_varied_plan(task, rng, miss) for miss in misses), strict=True)
    qpos = jnp.asarray(np.stack(starts), jnp.float32)
    actions = jnp.asarray(np.stack(plans, axis=1))  # [T, N, 14]
    model = engine.scene.model

    def step(physics: Physics, action: jax.Array) -> Any:
        physics = engine.step(physics, action)
        return physics, (physics.qpos, physics.qvel, action, task.level(physics))

    @jax.jit
    def play(qpos: jax.Array, actions: jax.Array) -> Any:
        physics = engine.reset(qpos, jnp.zeros((qpos.shape[0], model.nv)))
        return jax.lax.scan(step, physics, actions)[1]

    positions, velocities, targets, level = play(qpos, actions)
    solved = level == task.num_levels
    before = jnp.cumsum(solved, axis=0) == 0
    keep = before & (solved.any(axis=0) | misses)[None] & (jnp.arange(len(actions)) % EXPERT_STRIDE == 0)[:, None]

    # Bins of equal time: by potential most would hold what comes last, and hardly an episode would start beside an object.
    share = jnp.arange(len(actions))[:, None] / before.sum(axis=0)[None]

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    physics = Physics(None, flat(positions), flat(velocities), None)
    # In random order: a bin that overflows should hold states of all episodes, not of the last ones.
    order = rng.permutation(keep.size)
    shuffled = jax.tree.map(lambda x: x[order], (flat(keep), flat(share), physics, flat(targets)))
    return jax.jit(record)(empty_archive(model.nq, model.nv), *shuffled)


def _varied_plan(task: Any, rng: np.random.Generator, miss: bool) -> tuple[np.ndarray, np.ndarray]:
    """A start pose [30] and an expert's actions [300, 14] from there, of a random way to do the task."""
    while True:
        start = task.start_from_seed(int(rng.integers(2**31)))
        way = expert.Variation(
            pitch=np.radians(rng.uniform(45, 70)),
            grip_offset=rng.uniform(0.015, 0.035),
            meeting=(rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05), rng.uniform(0.11, 0.2)),
            speed=rng.uniform(*expert.SPEEDS),
            miss=tuple(rng.uniform(-MAX_MISS, MAX_MISS, 2)) if miss else (0.0, 0.0),
        )
        try:
            return start, expert.plan_from_qpos(start, variation=way)
        except ValueError:  # out of reach that way
            continue
