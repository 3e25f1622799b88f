"""The insertion task: gym_aloha's own reward and starts, and a dense reward that cannot be milked."""

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from dm_control import mujoco as dm_mujoco
from gym_aloha.constants import START_ARM_POSE
from gym_aloha.tasks import sim
from gym_aloha.utils import sample_insertion_pose
from scipy import stats  # type: ignore[import-untyped]

from aloha_jax import expert, scene
from aloha_jax.engines import Physics, make_engine
from aloha_jax.scene import FINGER_QPOS, PEG_QPOS, SOCKET_QPOS
from aloha_jax.tasks import make_task, potentials
from aloha_jax.tasks.insertion import Insertion, Progress, StartRange
from aloha_jax.tasks.potentials import MEETING_X, Geometry, Shaping

SEEDS = (0, 1, 2, 3)
SEED_STARTS = np.stack([np.concatenate([START_ARM_POSE, *sample_insertion_pose(seed)]) for seed in SEEDS]).astype(np.float32)
PLANS = np.stack([expert.plan_from_qpos(qpos) for qpos in SEED_STARTS], axis=1)  # [300, 4, 14]
STAGE_ENDS = dict(zip(expert.STAGES, itertools.accumulate(expert.STAGES.values()), strict=True))  # name -> control step


@pytest.fixture(scope="module")
def task() -> Insertion:
    """Compiled: one operation at a time takes ten times as long."""
    task = make_task("insertion", scene.make_scene(physics="exact"), shaping=Shaping(action_change_cost=0.01))
    for name in ("level", "touches", "lost", "geometry", "start_progress", "dense", "agent_pos", "features"):
        setattr(task, name, jax.jit(getattr(task, name)))
    return task


class Replay(NamedTuple):
    """Worlds along an expert's episodes; axes [step, world, ...]. Step 0 is the start."""

    physics: Physics
    progress: Progress
    reward: jax.Array  # [300, N, 2]
    level: jax.Array


def replay(physics_name: str, qpos: np.ndarray, actions: np.ndarray) -> Replay:
    """Play actions [T, N, 14], with the dense reward computed as the environment does."""
    engine = make_engine("c", physics=physics_name)
    task = make_task("insertion", engine.scene, shaping=Shaping(action_change_cost=0.01))

    def step(carry, action):
        physics, progress = carry
        physics = engine.step(physics, action)
        level = task.level(physics)
        reward, progress = task.dense(physics, progress, level, jnp.zeros(len(qpos), bool), action)
        return (physics, progress), (physics, progress, reward, level)

    @jax.jit
    def run(qpos, actions):
        physics = engine.reset(qpos, jnp.zeros((len(qpos), engine.scene.model.nv)))
        start = physics, task.start_progress(physics)
        _, (physics_after, progress_after, reward, level) = jax.lax.scan(step, start, actions)
        prepend = lambda first, rest: jnp.concatenate([first[None], rest])  # noqa: E731
        physics, progress = jax.tree.map(prepend, start, (physics_after, progress_after))
        return Replay(physics, progress, reward, prepend(task.level(start[0]), level))

    return jax.device_get(run(qpos, actions))


@pytest.fixture(scope="module")
def expert_replay() -> Replay:
    return replay("exact", SEED_STARTS, PLANS)


@pytest.fixture(scope="module")
def clumsy_replay() -> Replay:
    """Unsteady experts: pegs that scrape along the socket, objects pushed about and dropped."""
    noise = np.random.default_rng(0).normal(0, 1, (60, len(SEEDS), 14)).repeat(5, axis=0)
    noise[:150, :2] = 0  # two of them once they hold the objects
    return replay("exact", SEED_STARTS, (PLANS + noise * np.array([0.02, 0.04, 0.03, 0.1])[:, None]).astype(np.float32))


def at_step(replay: Replay, step: int) -> tuple[Physics, Progress]:
    return jax.tree.map(lambda x: jnp.asarray(x[step]), (replay.physics, replay.progress))


def flat(replay: Replay) -> tuple[Physics, Progress]:
    """All steps of all worlds as one batch."""
    return jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:])), (replay.physics, replay.progress))


def per_step(values: jax.Array) -> np.ndarray:
    """[301 * N, ...] back to [301, N, ...]."""
    return np.asarray(values).reshape(-1, len(SEEDS), *values.shape[1:])


# --- Starts ------------------------------------------------------------------------------------------------------------------


def test_start_from_seed_is_gym_alohas(task: Insertion) -> None:
    for seed in (0, 1, 12345):
        peg, socket = sample_insertion_pose(seed)
        start = task.start_from_seed(seed)
        np.testing.assert_array_equal(start, np.concatenate([START_ARM_POSE, peg, socket]))
        assert start.dtype == np.float64
    np.testing.assert_allclose(task.start_from_seed(0)[[16, 17, 18]], [0.15488135, 0.54303787, 0.05], atol=1e-8)


def test_starts_are_distributed_as_gym_alohas(task: Insertion) -> None:
    keys = jax.random.split(jax.random.key(0), 2000)
    samples = np.asarray(jax.jit(jax.vmap(task.sample_start))(keys), np.float64)
    ours, constant = samples[:, [16, 17, 23, 24]], np.delete(samples, [16, 17, 23, 24], axis=1)
    theirs = np.stack([task.start_from_seed(seed) for seed in range(500)])
    np.testing.assert_allclose(constant, np.delete(theirs, [16, 17, 23, 24], axis=1)[:1].repeat(2000, axis=0), atol=1e-8)
    bounds = ((0.1, 0.2), (0.4, 0.6), (-0.2, -0.1), (0.4, 0.6))  # of peg x, y and socket x, y in gym_aloha
    for column, (low, high) in zip(ours.T, bounds, strict=True):
        assert low - 1e-7 <= column.min()
        assert column.max() <= high + 1e-7
        assert stats.kstest(column, "uniform", (low, high - low)).pvalue > 0.001
    for column, reference in zip(ours.T, theirs[:, [16, 17, 23, 24]].T, strict=True):
        assert stats.ks_2samp(column, reference).pvalue > 0.001
    correlations = np.corrcoef(ours.T) - np.eye(4)
    assert np.abs(correlations).max() < 0.08  # 3.5 standard deviations of independent samples


def test_starts_may_exceed_gym_alohas() -> None:
    yaw, shift = np.deg2rad(30), 0.03
    task = make_task("insertion", scene.make_scene(physics="exact"), start_range=StartRange(yaw, shift))
    samples = np.asarray(jax.jit(jax.vmap(task.sample_start))(jax.random.split(jax.random.key(0), 2000)), np.float64)
    for part, (x, y) in ((PEG_QPOS, ((0.1, 0.2), (0.4, 0.6))), (SOCKET_QPOS, ((-0.2, -0.1), (0.4, 0.6)))):
        pose = samples[:, part]
        for column, (low, high) in zip(pose[:, :2].T, (x, y), strict=True):
            assert stats.kstest(column, "uniform", (low - shift, high - low + 2 * shift)).pvalue > 0.001
        np.testing.assert_allclose(pose[:, 2], 0.05, atol=1e-8)
        np.testing.assert_array_equal(pose[:, 4:6], 0.0)  # turned about the vertical and no other axis
        turned = 2 * np.arctan2(pose[:, 6], pose[:, 3])
        assert stats.kstest(turned, "uniform", (-yaw, 2 * yaw)).pvalue > 0.001
    assert abs(np.corrcoef(samples[:, PEG_QPOS][:, 6], samples[:, SOCKET_QPOS][:, 6])[0, 1]) < 0.08
    assert abs(np.corrcoef(samples[:, PEG_QPOS][:, 6], samples[:, PEG_QPOS][:, 0])[0, 1]) < 0.08


# --- Official reward -----------------------------------------------------------------------------------------------------------

TOUCHES = tuple(scene.INSERTION_TOUCHES)


def unremarkable(grasp: jax.Array) -> Progress:
    """Progress of worlds in which nothing else has happened; grasp float32[N, 2]."""
    worlds = len(grasp)
    nothing = jnp.zeros((worlds, 2))
    return Progress(grasp, nothing, jnp.zeros(worlds, jnp.int32), jnp.zeros((worlds, 14)), nothing)


def touching(task: Insertion, *rows: set[str]) -> Physics:
    """One fabricated world per row, in which just these touches are felt."""
    sensordata = np.zeros((len(rows), task.scene.model.nsensordata), np.float32)
    for world, names in enumerate(rows):
        for name in names:
            # Any one of a predicate's sensors will do; they count contacts.
            sensordata[world, task.scene.touches[name][world % len(task.scene.touches[name])]] = 1 + world % 3
    for arm in scene.ARMS:
        sensordata[:, task.scene.sensors[f"{arm}/gripper/quat"]] = 1, 0, 0, 0
    qpos = SEED_STARTS[:1].repeat(len(rows), axis=0)
    return Physics(None, jnp.asarray(qpos), jnp.zeros((len(rows), 28)), jnp.asarray(sensordata))


HELD = {"peg_finger_right", "socket_finger_left"}


@pytest.mark.parametrize(
    ("touches", "level"),
    [
        (set(), 0),
        ({"peg_table", "socket_table"}, 0),
        ({"peg_finger_right"}, 0),
        ({"socket_finger_left"}, 0),
        ({"peg_finger_left", "socket_finger_right"}, 0),  # the fingers that do not count
        ({"peg_finger_left", "peg_finger_right", "socket_finger_right"}, 0),
        (HELD | {"peg_table", "socket_table"}, 1),
        (HELD | {"peg_table"}, 1),
        (HELD | {"socket_table"}, 1),
        (HELD | {"socket_table", "peg_socket"}, 1),  # touching each other counts in the air
        (HELD, 2),
        ({"peg_socket", "peg_table"}, 0),
        ({"peg_socket", "socket_table"}, 0),
        ({"peg_socket"}, 3),  # whoever holds them
        (HELD | {"peg_socket"}, 3),
        ({"peg_pin"}, 4),  # even on the table
        ({"peg_pin", "peg_table", "socket_table"}, 4),
        (set(TOUCHES), 4),
    ],
)
def test_levels_by_hand(task: Insertion, touches: set[str], level: int) -> None:
    levels = task.level(touching(task, touches))
    assert levels.tolist() == [level]
    assert levels.dtype == jnp.int32


def gym_aloha_reward(model: dm_mujoco.Physics, pairs: list[tuple[int, int]], *, both_orders: bool) -> int:
    """gym_aloha's own reward for pairs of touching geoms, which it looks up in one order only."""
    contacts = [SimpleNamespace(geom1=a, geom2=b) for a, b in pairs]
    if both_orders:
        contacts += [SimpleNamespace(geom1=b, geom2=a) for a, b in pairs]
    data = SimpleNamespace(ncon=len(contacts), contact=contacts)
    return sim.InsertionTask().get_reward(SimpleNamespace(data=data, model=model))


@pytest.fixture(scope="module")
def gym_aloha_physics() -> dm_mujoco.Physics:
    return dm_mujoco.Physics.from_xml_path(str(scene.ASSETS / "bimanual_viperx_insertion.xml"))


def test_levels_of_all_combinations_of_touches_are_gym_alohas(task: Insertion, gym_aloha_physics: dm_mujoco.Physics) -> None:
    model = gym_aloha_physics.model
    rng = np.random.default_rng(0)
    rows, wanted = [], []
    for flags in itertools.product((False, True), repeat=len(TOUCHES)):
        names = {name for name, flag in zip(TOUCHES, flags, strict=True) if flag}
        pairs = []
        for name in names:
            side_a, side_b = scene.INSERTION_TOUCHES[name]
            pairs.append((model.name2id(rng.choice(side_a), "geom"), model.name2id(rng.choice(side_b), "geom")))
        rows.append(names)
        wanted.append(gym_aloha_reward(model, pairs, both_orders=True))
    assert set(wanted) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(task.level(touching(task, *rows)), wanted)


@pytest.mark.parametrize("which", ["expert_replay", "clumsy_replay"])
def test_levels_of_real_contacts_are_gym_alohas(
    which: str, request: pytest.FixtureRequest, gym_aloha_physics: dm_mujoco.Physics
) -> None:
    """Our state, put into gym_aloha's simulation and judged by gym_aloha's reward."""
    recorded: Replay = request.getfixturevalue(which)
    physics, levels = gym_aloha_physics, recorded.level
    data = physics.data.ptr
    for step, world in itertools.product(range(0, 301, 2), range(len(SEEDS))):
        state = recorded.physics.internal[step, world].view(np.float64)
        data.qpos[:], data.qvel[:] = state[1:31], state[31:59]
        mujoco.mj_forward(physics.model.ptr, data)
        assert sim.InsertionTask().get_reward(physics) == levels[step, world], f"step {step}, world {world}"
        pairs = [(contact.geom1, contact.geom2) for contact in data.contact]
        assert gym_aloha_reward(physics.model, pairs, both_orders=True) == levels[step, world], f"step {step}, world {world}"
    assert set(levels[::2].ravel()) >= ({0, 1, 2, 4} if which == "expert_replay" else {0, 1, 2, 3})


def test_objects_outside_the_workspace_are_lost(task: Insertion) -> None:
    qpos = SEED_STARTS.repeat(2, axis=0)
    qpos[1, 16] = 0.5  # peg beyond the right arm's base
    qpos[2, 24] = 0.1  # socket off the table's near edge
    qpos[3, 18] = -0.1  # peg below the table
    qpos[4, 25] = 0.2  # socket carried high
    physics = Physics(None, jnp.asarray(qpos), None, None)
    np.testing.assert_array_equal(task.lost(physics), [False, True, True, True, False, False, False, False])


# --- Dense reward --------------------------------------------------------------------------------------------------------------


def effort_of(actions: np.ndarray) -> np.ndarray:
    """[N, 2]: what actions [T, N, 14] cost each arm, before the factor of a half."""
    actions = actions.astype(np.float64)
    changes = np.diff(actions, axis=0, prepend=np.zeros_like(actions[:1]))
    return (0.0005 * np.square(actions) + 0.01 * np.square(changes)).sum(axis=0).reshape(-1, 2, 7).sum(axis=2)


def test_dense_reward_of_an_episode_telescopes(task: Insertion, expert_replay: Replay) -> None:
    potential = expert_replay.progress.potential
    # Levels 1 and 4, each paid once.
    physics, progress = flat(expert_replay)
    inserting = per_step(potentials.success_bonus(task.geometry(physics), progress.potential))
    first = (expert_replay.level == 4).argmax(axis=0)
    bonus = 0.5 + inserting[first, np.arange(len(SEEDS))]
    assert (bonus > 30).all()  # of 35: the expert's peg is straight to a degree
    expected = 0.5 * (potential[-1] - potential[0] + bonus - effort_of(PLANS))
    np.testing.assert_allclose(expert_replay.reward.sum(axis=0), expected, atol=1e-3)
    assert (expert_replay.level.max(axis=0) == 4).all()
    np.testing.assert_array_equal(expert_replay.progress.best_level, np.maximum.accumulate(expert_replay.level))


def test_a_grip_counts_the_less_the_farther_it_is_from_the_nominal_one(expert_replay: Replay) -> None:
    """The expert grips 30 mm outward and 4 mm up, which is nominal; elsewhere 0.3 + 0.7 exp(-(d / t)^2) of the hold is left."""
    plain = make_task("insertion", scene.make_scene(physics="exact"))
    strict = make_task("insertion", scene.make_scene(physics="exact"), Shaping(grip_tolerance=0.01))
    physics, _ = at_step(expert_replay, STAGE_ENDS["lift"])
    geometry, touch = plain.geometry(physics), plain.touches(physics)
    held = plain._holds(geometry, touch)
    assert (held == 1).any()
    at_nominal = strict._holds(geometry, touch)
    assert (at_nominal <= held).all()
    assert (at_nominal[held == 1] > 0.9).all()  # within 3 mm
    # Both fingertips moved outward along the object's axis by exactly as much as makes the distance 10 mm.
    middle = geometry.fingertips.mean(axis=2) - geometry.position
    local = np.einsum("nai,naij->naj", middle, geometry.rotation)
    height = local[..., 2] - 0.004
    along = -0.03 - np.sqrt(0.01**2 - height**2)
    moved = np.einsum("nai,na->nai", geometry.rotation[..., 0], along - local[..., 0])
    displaced = geometry._replace(fingertips=geometry.fingertips + moved[:, :, None])
    expected = np.asarray(held) * (0.3 + 0.7 * np.exp(-1.0))
    np.testing.assert_allclose(strict._holds(displaced, touch), expected, atol=1e-3)
    np.testing.assert_array_equal(plain._holds(displaced, touch), held)


@pytest.mark.parametrize(("higher", "counted"), [(0.0, 1.0), (0.01, 0.5), (-0.01, 0.5), (0.02, 0.2)])
def test_a_grip_counts_half_a_tolerance_over_where_the_table_would_make_it(
    task: Insertion, expert_replay: Replay, higher: float, counted: float
) -> None:
    """Fingertips 11 mm over the table, the centres of socket and peg at 22 and 10; then all of it lifted and turned."""
    physics, progress = at_step(expert_replay, STAGE_ENDS["carry"])
    geometry, grasp = task.geometry(physics), progress.grasp
    offset = jnp.array([[-0.03, 0.0, -0.011], [-0.03, 0.0, 0.001]]) + jnp.array([0.0, 0.0, higher])[None]
    middle = geometry.position + jnp.einsum("naij,aj->nai", geometry.rotation, offset)
    apart = geometry.fingertips - geometry.fingertips.mean(axis=2, keepdims=True)
    held = geometry._replace(fingertips=middle[:, :, None] + apart)
    np.testing.assert_allclose(potentials.likeness(held, 0.01), counted, rtol=1e-4)

    def paid(tolerance: float | None) -> jax.Array:
        return potentials.total(Shaping(grip_height_tolerance=tolerance), held, grasp, jnp.ones_like(grasp))

    nothing = potentials.total(Shaping(), held, jnp.zeros_like(grasp), jnp.ones_like(grasp))
    held_itself = 0.5 * (potentials.hold(held, grasp) + grasp)
    # All but reaching and grasping is in proportion to it.
    np.testing.assert_allclose(
        paid(0.01) - nothing - held_itself, counted * (paid(None) - nothing - held_itself), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(("degrees", "level"), [(0.0, 1.0), (17.4576, 0.5), (-17.4576, 0.5), (90.0, 0.0826)])
def test_an_object_tilted_by_17_degrees_is_half_lifted(
    task: Insertion, expert_replay: Replay, degrees: float, level: float
) -> None:
    physics, _ = at_step(expert_replay, STAGE_ENDS["carry"])
    pitch = np.radians(degrees)
    pitched = jnp.array([[np.cos(pitch), 0.0, -np.sin(pitch)], [0.0, 1.0, 0.0], [np.sin(pitch), 0.0, np.cos(pitch)]])
    geometry = task.geometry(physics)
    # A quarter turn about the vertical, from either side, makes a roll of a pitch; its direction does not matter.
    yaw = jnp.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for rotation in (pitched, yaw @ pitched, pitched @ yaw, yaw @ pitched @ yaw.T):
        turned = geometry._replace(rotation=jnp.broadcast_to(rotation, geometry.rotation.shape))
        np.testing.assert_allclose(potentials.levelness(turned), level, atol=1e-4)


def test_hands_reach_from_above(task: Insertion, expert_replay: Replay) -> None:
    physics, _ = at_step(expert_replay, STAGE_ENDS["close"])
    geometry = task.geometry(physics)
    # Fingertips where they should be; the hand 45 degrees down along the object, then turned up to be level.
    side = np.array([[0.025, -0.025], [0.013, -0.013]])  # half of an object and 3 mm, [arm, finger]
    local = np.stack([np.full_like(side, -0.03), side, np.full_like(side, 0.004)], axis=-1)
    tips = geometry.position[:, :, None] + np.einsum("naij,afj->nafi", geometry.rotation, local)
    half = np.sqrt(0.5)
    down = jnp.array([[half, 0.0, half], [0.0, 1.0, 0.0], [-half, 0.0, half]])
    squeezing = jnp.zeros_like(geometry.off_centre)
    there = geometry._replace(fingertips=tips, gripper=geometry.rotation @ down, off_centre=squeezing)
    np.testing.assert_allclose(potentials.reach(there), 1.0, atol=1e-3)
    level = there._replace(gripper=geometry.rotation)
    distance = 0.2 * 2 * np.sin(np.radians(22.5)) / 3  # one of three points is off, by a chord of 45 degrees
    expected = 1 - 0.5 * np.tanh(4 * distance) - 0.5 * np.tanh(20 * distance)
    np.testing.assert_allclose(potentials.reach(level), expected, atol=1e-3)


@pytest.mark.parametrize("arm", ["left", "right"])
def test_fingers_that_are_pushed_aside_reach_nothing_that_the_hand_does_not(
    task: Insertion, expert_replay: Replay, arm: str
) -> None:
    physics, _ = at_step(expert_replay, STAGE_ENDS["close"])
    model = task.scene.model
    data = mujoco.MjData(model)
    readings = []
    for aside in (0.0, 0.02):
        data.qpos[:] = np.asarray(physics.qpos)[0]
        data.qpos[FINGER_QPOS[arm] : FINGER_QPOS[arm] + 2] += aside
        mujoco.mj_forward(model, data)
        moved = physics._replace(qpos=jnp.asarray(data.qpos)[None], sensordata=jnp.asarray(data.sensordata)[None])
        readings.append(task.geometry(moved))
    here, pushed = readings
    side = ("left", "right").index(arm)
    assert abs(float((pushed.fingertips - here.fingertips)[0, side, 0, 1])) > 0.019
    np.testing.assert_allclose(potentials.reach(pushed), potentials.reach(here), atol=1e-4)


@pytest.mark.parametrize("arm", ["left", "right"])
def test_a_hand_that_is_open_wide_reaches_as_one_that_just_fits(task: Insertion, expert_replay: Replay, arm: str) -> None:
    physics, _ = at_step(expert_replay, STAGE_ENDS["close"])
    geometry = task.geometry(physics)
    side = ("left", "right").index(arm)
    fits = 2 * ((0.022, 0.010)[side] + 0.003)
    middle, towards = geometry.fingertips.mean(axis=2, keepdims=True), geometry.gripper[..., 1][:, :, None]

    def reached(apart: float) -> np.ndarray:
        fingertips = middle + 0.5 * apart * jnp.concatenate([towards, -towards], axis=2)
        return np.asarray(potentials.reach(geometry._replace(fingertips=fingertips))[:, side])

    for apart in (fits + 0.002, 0.069):  # at most
        np.testing.assert_allclose(reached(apart), reached(fits), atol=1e-5)
    assert (reached(0.7 * fits) < reached(fits)).all()


@pytest.mark.parametrize(
    ("apart", "opening"), [(0.0, (0.0, 0.0)), (0.009, (9 / 42, 0.5)), (0.021, (0.5, 1.0)), (0.07, (1.0, 1.0))]
)
def test_fingers_are_open_as_far_as_they_are_around_the_object(
    task: Insertion, expert_replay: Replay, apart: float, opening: tuple[float, float]
) -> None:
    physics, _ = at_step(expert_replay, STAGE_ENDS["approach"])
    geometry = task.geometry(physics)
    middle, towards = geometry.fingertips.mean(axis=2, keepdims=True), geometry.gripper[..., 1][:, :, None]
    geometry = geometry._replace(fingertips=middle + 0.5 * apart * jnp.concatenate([towards, -towards], axis=2))
    np.testing.assert_allclose(potentials.opening(geometry), np.broadcast_to(opening, (middle.shape[0], 2)), atol=1e-5)


@pytest.mark.parametrize(("arm", "off"), [("left", 0.012), ("left", -0.012), ("right", 0.012), ("right", -0.012)])
def test_who_squeezes_an_object_holds_it_and_who_leans_against_it_does_not(
    task: Insertion, expert_replay: Replay, arm: str, off: float
) -> None:
    for stage in ("close", "carry", "insert"):
        physics, progress = at_step(expert_replay, STAGE_ENDS[stage])
        held = potentials.hold(task.geometry(physics), progress.grasp)
        assert (held > 0.6).all()
        if stage == "close":
            assert (held > 0.7 * progress.grasp).all()
            assert (held < progress.grasp).all()
        else:  # up, where the whole grasp counts
            np.testing.assert_array_equal(held, progress.grasp)
    # One finger is pushed back, the other one follows: as far apart as before. The object lies on the table, at first.
    physics, progress = at_step(expert_replay, STAGE_ENDS["close"])
    held = potentials.hold(task.geometry(physics), progress.grasp)
    fingers, side = slice(FINGER_QPOS[arm], FINGER_QPOS[arm] + 2), ("left", "right").index(arm)
    leaning = physics._replace(qpos=physics.qpos.at[:, fingers].add(off))
    held_so = potentials.hold(task.geometry(leaning), progress.grasp)
    middle = np.asarray(physics.qpos)[:, fingers].mean(axis=1)
    expected = progress.grasp[:, side] / (1.0 + np.square((middle + off) / 0.008))
    np.testing.assert_allclose(held_so[:, side], expected, rtol=1e-4)
    assert (held_so[:, side] < 0.5).all()
    np.testing.assert_array_equal(held_so[:, 1 - side], held[:, 1 - side])
    # Higher up nothing is that nobody holds.
    geometry, rest = task.geometry(leaning), jnp.array([[0.022, 0.010]])
    for raised, share in ((0.02, 0.0), (0.045, 0.625), (0.06, 1.0), (0.13, 1.0)):
        up = potentials.hold(geometry._replace(position=geometry.position.at[..., 2].set(rest + raised)), progress.grasp)
        np.testing.assert_allclose(up, jnp.maximum(held_so, share * progress.grasp), rtol=1e-3)


@pytest.mark.parametrize("arm", ["left", "right"])
def test_who_leans_is_paid_for_beginning_to_close(expert_replay: Replay, arm: str) -> None:
    """A leaning hand holds little, and closing does not change that at once; half of what it touches counts all the same."""
    free = make_task("insertion", scene.make_scene(physics="exact"), Shaping(action_cost=0.0))
    physics, progress = at_step(expert_replay, STAGE_ENDS["close"])
    side = ("left", "right").index(arm)
    fingers = slice(FINGER_QPOS[arm], FINGER_QPOS[arm] + 2)
    leaning = physics._replace(qpos=physics.qpos.at[:, fingers].add(0.012))
    progress = progress._replace(squeeze=jnp.zeros((len(SEEDS), 2)))
    earned, squeezes = [], []
    for told in (1.0, 0.0, -0.15, -0.3, -1.0):
        action = jnp.zeros((len(SEEDS), 2, 7)).at[:, side, -1].set(told).reshape(-1, 14)
        reward, after = free.dense(leaning, progress, jnp.zeros(len(SEEDS), jnp.int32), jnp.zeros(len(SEEDS), bool), action)
        earned.append(np.asarray(reward))
        squeezes.append(np.asarray(after.squeeze))
    squeeze, grasp = np.stack(squeezes), np.asarray(after.grasp)
    np.testing.assert_allclose(squeeze[:, 0, side], [0.0, 0.0, 0.1, 0.2, 0.2], atol=1e-6)
    np.testing.assert_array_equal(squeeze[..., 1 - side], 0.0)
    more = np.stack(earned) - earned[0]
    np.testing.assert_allclose(more, 0.5 * 0.5 * grasp * squeeze, atol=1e-5)
    assert (more[-1, :, side] > 0.02).all()


def test_who_starts_in_the_middle_keeps_what_it_holds_by_closing(expert_replay: Replay) -> None:
    """It is taken to squeeze what it holds, which is not paid, and letting go of that costs."""
    free = make_task("insertion", scene.make_scene(physics="exact"), Shaping(action_cost=0.0))
    physics, _ = at_step(expert_replay, STAGE_ENDS["carry"])
    start = free.start_progress(physics)
    assert (start.grasp == 1).all()
    worlds = len(SEEDS)
    for told, fined in ((-1.0, 0.0), (-0.3, 0.0), (0.0, 0.2 * 0.5 * 0.5), (1.0, 0.2 * 0.5 * 0.5)):
        action = jnp.zeros((worlds, 2, 7)).at[..., -1].set(told).reshape(-1, 14)
        level = free.level(physics)
        reward, after = free.dense(physics, start, level, jnp.zeros(worlds, bool), action)
        np.testing.assert_allclose(reward, jnp.full((worlds, 2), -fined), atol=1e-5)
        np.testing.assert_allclose(after.squeeze, 1.0 - 4 * fined, atol=1e-6)


@pytest.mark.parametrize(
    ("raised", "degrees", "lifted"),
    [
        (0.06, 45.0, 1.0),
        (0.03, 45.0, 0.4167),
        (0.06, 90.0, 1.0),
        (0.06, 30.0, 0.7699),
        (0.12, 30.0, 1.0),
        (0.06, 0.0, 0.2143),
        (0.06, -45.0, 0.0),
    ],
)
def test_the_wrist_is_to_be_lifted_as_well(
    task: Insertion, expert_replay: Replay, raised: float, degrees: float, lifted: float
) -> None:
    """The hand, `degrees` down, holds an object that is `raised` metres over its rest.

    At 3 cm and 45 degrees half of the object's way, and of the wrist's five sixths: 15 cm of those 18 that begin 12 cm under
    where it is in a nominal grip. At 30 degrees the wrist is 20 cm * (sin 45 - sin 30) = 4.1 cm lower.
    """
    physics, _ = at_step(expert_replay, STAGE_ENDS["close"])
    geometry = task.geometry(physics)
    rest = jnp.array([[0.022, 0.010]])
    tips = geometry.fingertips.at[..., 2].set((rest + raised + 0.004)[..., None])
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    down = jnp.array([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]])
    held = geometry._replace(
        fingertips=tips,
        gripper=jnp.broadcast_to(down, geometry.gripper.shape),
        position=geometry.position.at[..., 2].set(rest + raised),
    )
    grasp = jnp.broadcast_to(jnp.array([1.0, 0.5]), tips.shape[:2])
    np.testing.assert_allclose(potentials.lift(held, grasp), lifted * grasp, atol=1e-3)
    np.testing.assert_allclose(potentials.raised(held), min(raised / 0.06, 1.0), atol=1e-3)


def test_carrying_pays_for_an_object_that_is_level_and_where_the_arms_meet(task: Insertion, expert_replay: Replay) -> None:
    physics, progress = at_step(expert_replay, STAGE_ENDS["carry"])
    geometry = task.geometry(physics)
    held = potentials.hold(geometry, progress.grasp)
    lift = potentials.lift(geometry, held) * potentials.levelness(geometry)
    near = 0.7 * potentials.reach(geometry) + 0.3 * potentials.opening(geometry)
    squeeze = jnp.array([[0.0, 0.7]])
    grasp = 0.5 * held + 0.5 * squeeze * progress.grasp
    expected = near + grasp + 3.0 * lift + potentials.join(geometry, lift)[:, None]
    paid = potentials.total(Shaping(), geometry, progress.grasp, squeeze)
    np.testing.assert_allclose(paid, expected + 4.0 * lift * potentials.carry(geometry), atol=1e-4)
    # Moved to the end of the line on which they meet, then turned about the vertical by a quarter: both ends 6 cm * sqrt(2) away.
    there = geometry._replace(
        position=jnp.broadcast_to(jnp.array([MEETING_X[1], 0.0, 0.13]), geometry.position.shape),
        rotation=jnp.broadcast_to(jnp.eye(3), geometry.rotation.shape),
    )
    np.testing.assert_allclose(potentials.carry(there), 1.5, atol=1e-6)
    quarter = jnp.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    turned = there._replace(rotation=jnp.broadcast_to(quarter, geometry.rotation.shape))
    distance = 0.06 * np.sqrt(2)
    place = np.mean(1 - np.tanh(np.array([3, 15]) * distance))
    pointing = np.mean(1 - np.tanh(np.array([1.5, 6]) * np.sqrt(2)))  # apart: the ends of two unit vectors at right angles
    np.testing.assert_allclose(potentials.carry(turned), place + 0.5 * pointing, rtol=1e-5)
    assert (potentials.carry(turned) < potentials.carry(geometry)).all()  # the expert's are 2 cm higher
    # Anywhere along the line is as good, and beyond it, either way, what lies beyond counts.
    for x, off in ((-0.055, 0.0), (MEETING_X[0], 0.0), (MEETING_X[0] - 0.02, 0.02), (MEETING_X[1] + 0.03, 0.03)):
        paid = 0.5 + np.mean(1 - np.tanh(np.array([3, 15]) * off))
        np.testing.assert_allclose(potentials.carry(there._replace(position=there.position.at[..., 0].set(x))), paid, rtol=1e-5)
    # There peg and socket are straight, and from 4 cm before the mouth to as deep in each other as the pin allows.
    lateral, tilt, depth = potentials.mating_error(there)
    np.testing.assert_allclose(np.stack([lateral, tilt]), 0.0, atol=1e-6)
    np.testing.assert_allclose(depth, 0.038, atol=1e-6)
    before = there._replace(position=there.position.at[..., 0].set(MEETING_X[0]))
    np.testing.assert_allclose(potentials.mating_error(before)[2], 0.1, atol=1e-6)


def joined_by(geometry: Geometry, depth: float, lateral: float) -> Geometry:
    """Both level and facing each other, the peg's tip at `depth` along the socket's axis and `lateral` off it, in millimetres."""
    apart = depth / 1000 + 0.06  # of the centres, along the axis
    position = jnp.array([[-apart / 2, 0.0, 0.13], [-apart / 2, lateral / 1000, 0.13]])
    return geometry._replace(
        position=jnp.broadcast_to(position, geometry.position.shape),
        rotation=jnp.broadcast_to(jnp.eye(3), geometry.rotation.shape),
    )


# Depth and lateral error of a straight peg in millimetres, what its way in pays of 8, and the error whose tanh alignment is.
JOINED = [
    (75, 0, 0.0, 0),  # aligned, 15 mm short of the mouth
    (60, 0, 8 * 15 / 35, 0),  # at the mouth
    (40, 0, 8.0, 0),  # at the pin
    (100, 0, 0.0, 25),
    (75, 36, 0.0, 36),
    (53, 36, 0.0, 36 + 2 * 22),  # beside the socket
    (60, 18, 8 * 15 / 35 / 2, 18 + 15),  # half aligned
]


@pytest.mark.parametrize(("depth", "lateral", "insert", "error"), JOINED)
def test_joining_pays_for_a_peg_before_the_mouth_and_then_in_it(
    task: Insertion, expert_replay: Replay, depth: float, lateral: float, insert: float, error: float
) -> None:
    physics, _ = at_step(expert_replay, STAGE_ENDS["carry"])
    geometry = task.geometry(physics)
    joined = joined_by(geometry, depth, lateral)
    lifted = jnp.broadcast_to(jnp.array([0.5, 1.0]), geometry.position.shape[:2])
    align = np.mean(1 - np.tanh(np.array([3, 15, 40]) * error / 1000))
    np.testing.assert_allclose(potentials.join(joined, lifted), 0.5 * (6 * align + insert), atol=1e-4)


WAYS = {  # (depth, lateral error) from one to the other, in millimetres
    "aligning before the mouth": ((75, 40), (75, 0)),
    "going in": ((75, 0), (40, 0)),
    "going to the mouth, a centimetre off": ((75, 12), (60, 12)),
    "drawing back from beside the socket": ((45, 36), (75, 36)),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_step_of_joining_costs_anything(task: Insertion, expert_replay: Replay, way: str) -> None:
    physics, _ = at_step(expert_replay, STAGE_ENDS["carry"])
    geometry = jax.tree.map(lambda x: x[:1], task.geometry(physics))
    paid = [
        float(potentials.join(joined_by(geometry, depth, lateral), jnp.ones((1, 2)))[0])
        for depth, lateral in np.linspace(*WAYS[way], 36)
    ]
    assert (np.diff(paid) > 0).all()


def test_actions_cost_what_they_are_said_to_cost(expert_replay: Replay) -> None:
    physics, progress = at_step(expert_replay, STAGE_ENDS["lift"])
    level, failed = jnp.zeros(len(SEEDS), jnp.int32), jnp.zeros(len(SEEDS), bool)
    action = jnp.full((len(SEEDS), 14), 2.0)
    model = scene.make_scene(physics="exact")
    rewards = [
        make_task("insertion", model, Shaping(action_cost=cost, action_change_cost=change)).dense(
            physics, progress._replace(action=action - 1.0), level, failed, action
        )[0]
        for cost, change in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1))
    ]
    np.testing.assert_allclose(rewards[0] - rewards[1], 0.5 * 0.1 * 7 * 4.0, rtol=1e-4)
    np.testing.assert_allclose(rewards[0] - rewards[2], 0.5 * 0.1 * 7 * 1.0, rtol=1e-4)


def test_each_term_rises_in_its_phase(task: Insertion, expert_replay: Replay) -> None:
    physics, progress = flat(expert_replay)
    geometry = task.geometry(physics)
    lift = potentials.lift(geometry, potentials.hold(geometry, progress.grasp)) * potentials.levelness(geometry)
    lateral, tilt, depth = (per_step(x) for x in potentials.mating_error(geometry))
    reach, height, join = per_step(potentials.reach(geometry)), per_step(lift), per_step(potentials.join(geometry, lift))
    grasp = expert_replay.progress.grasp
    start, end = 12, STAGE_ENDS  # the objects have dropped onto the table after 12 steps
    # Reach: while the arms approach and descend, from far away to all but there.
    assert (reach[start] < 0.4).all()
    assert (reach[end["approach"]] > reach[start] + 0.1).all()
    assert (reach[end["descend"]] > reach[end["approach"]] + 0.1).all()
    assert (reach[end["close"] :] > 0.75).all()
    # Grasp: not before the fingers close, and to stay.
    assert (grasp[: end["descend"]] == 0).all()
    assert (grasp[end["close"] + 10] > 0.6).all()
    assert (grasp[end["lift"] : end["insert"]].min(axis=0) > 0.5).all()  # contacts flicker
    # Lift: nothing before the grasp although the objects fall from above, full once lifted.
    assert (height[: end["descend"]] == 0).all()
    assert (height[end["close"]] < 0.1).all()
    assert (height[end["lift"] + 5] > 0.9).all()
    # Join: nothing on the table, alignment (6) from the carry on, insertion (8) only in its stage.
    assert (join[: end["descend"]] == 0).all()
    assert (join[end["carry"]] > join[end["lift"]] + 0.8).all()
    assert (join[end["insert"]] > join[end["carry"]] + 8).all()
    assert (join[end["insert"]] > 11).all()
    assert (join <= 14).all()
    # What it is made of: the tip 40 mm in front of the mouth after the carry, at the pin in the end.
    np.testing.assert_allclose(depth[end["carry"]], 0.06 + expert.GAP, atol=0.005)
    np.testing.assert_allclose(depth[-1], 0.04, atol=0.001)
    assert (lateral[end["insert"]] < 0.004).all()
    assert (tilt[end["insert"]] < 0.008).all()


def test_standing_still_earns_nothing(task: Insertion, expert_replay: Replay) -> None:
    physics, progress = at_step(expert_replay, STAGE_ENDS["carry"])
    level, failed, action = task.level(physics), jnp.zeros(len(SEEDS), bool), jnp.zeros((len(SEEDS), 14))
    for _ in range(80):  # until the slow average of the grasp has settled
        reward, progress = task.dense(physics, progress, level, failed, action)
    np.testing.assert_allclose(reward, 0, atol=1e-6)


def test_there_and_back_earns_nothing(task: Insertion, expert_replay: Replay) -> None:
    """The same states forward and backward: what was earned is given back, levels are paid once."""
    start, stop = 150, 190  # carrying
    steps = [*range(start, stop), *range(stop, start - 1, -1), *[start] * 80]
    _, progress = at_step(expert_replay, start)
    progress = progress._replace(action=jnp.zeros((len(SEEDS), 14)))
    first, total = progress, np.zeros((len(SEEDS), 2))
    failed, action = jnp.zeros(len(SEEDS), bool), jnp.zeros((len(SEEDS), 14))
    for step in steps:
        physics, _ = at_step(expert_replay, step)
        level = jnp.minimum(expert_replay.level[step], progress.best_level)
        reward, progress = task.dense(physics, progress, level, failed, action)
        total += reward
    np.testing.assert_allclose(total, 0.5 * (progress.potential - first.potential), atol=1e-4)
    assert (jnp.abs(total) < 0.1).all()  # the grasp's average may have settled


def test_failure_takes_back_all_potential(task: Insertion, expert_replay: Replay) -> None:
    physics, progress = at_step(expert_replay, STAGE_ENDS["carry"])
    progress = progress._replace(action=jnp.zeros((len(SEEDS), 14)))
    failed = jnp.array([True, False, True, False])
    level, action = jnp.zeros(len(SEEDS), jnp.int32), jnp.zeros((len(SEEDS), 14))
    reward, after = task.dense(physics, progress, level, failed, action)
    np.testing.assert_allclose(reward[failed], 0.5 * (-progress.potential[failed] - 1), rtol=1e-6)
    assert (after.potential[failed] == 0).all()
    assert (progress.potential > 4).all()  # there was something to lose
    assert (reward[~failed] > -0.5).all()
    # From the start to the failure: nothing but minus what the start was worth, and the fine.
    earned = expert_replay.reward[: STAGE_ENDS["carry"]].sum(axis=0)
    bonus = 0.5  # level 1
    effort = effort_of(PLANS[: STAGE_ENDS["carry"]])
    expected = 0.5 * (bonus - effort - expert_replay.progress.potential[0] - 1)
    assert (expert_replay.progress.best_level[STAGE_ENDS["carry"]] == 2).all()
    np.testing.assert_allclose((earned + reward)[failed], expected[failed], atol=1e-3)


def test_levels_pay_once_and_lifting_and_meeting_by_the_potential_alone(task: Insertion) -> None:
    """Level 1 pays 0.5, to each arm, halved; 2 and 3, which a bent wrist and a push reach too, nothing; 4 little from afar."""
    physics, no_action = touching(task, set()), jnp.zeros((1, 14))
    start = task.start_progress(physics)._replace(best_level=jnp.zeros(1, jnp.int32))
    part = start.potential / potentials.HIGHEST
    assert 0.0 < part.min() <= part.max() < 0.05
    best, progress = 0, start
    for level, bonus in ((0, 0.0), (1, 0.5), (0, 0.0), (1, 0.0), (3, 0.0), (2, 0.0), (4, 35.0 * part), (4, 0.0)):
        reward, progress = task.dense(physics, progress, jnp.array([level]), jnp.zeros(1, bool), no_action)
        np.testing.assert_allclose(reward, np.broadcast_to(0.5 * bonus, (1, 2)), atol=1e-5)
        best = max(best, level)
        assert progress.best_level.tolist() == [best]
    # A level that is skipped is paid, too.
    reward, _ = task.dense(physics, start, jnp.array([4]), jnp.zeros(1, bool), no_action)
    np.testing.assert_allclose(reward, 0.5 * (0.5 + 35.0 * part), atol=1e-5)


@pytest.mark.parametrize(("degrees", "straight"), [(0.0, 1.0), (5.0, 1 - 3 * np.sin(np.radians(5))), (21.0, 0.0), (90.0, 0.0)])
def test_a_straight_insertion_pays_more(task: Insertion, degrees: float, straight: float) -> None:
    physics = objects_at(task, [0.05, 0.5, 0.2], [-0.05, 0.5, 0.2], peg_yaw=np.radians(degrees))
    paid, part = what_inserting_pays(task, physics)
    np.testing.assert_allclose(paid, 0.5 * part * (15 + 20 * straight), rtol=1e-3)


def test_an_insertion_pays_as_it_was_brought_about(task: Insertion, expert_replay: Replay) -> None:
    """Of 15 to 35 each arm gets as large a part as its potential is of the highest: little for pushing objects on the table."""
    physics, progress = at_step(expert_replay, -1)
    _, tilt, _ = potentials.mating_error(task.geometry(physics))
    straight = jnp.clip(1 - tilt / 0.04, 0, 1)[:, None]
    paid, part = what_inserting_pays(task, physics, progress)
    np.testing.assert_allclose(paid, 0.5 * part * (15 + 20 * straight), rtol=1e-4)
    assert paid.min() > 0.5 * 15  # the expert lifts, carries and holds straight
    lying = objects_at(task, [-0.045, 0.5, 0.022], [0.045, 0.5, 0.022])
    assert what_inserting_pays(task, lying)[0].max() < 0.5 * 2


def what_inserting_pays(task: Insertion, physics: Physics, progress: Progress | None = None) -> tuple[jax.Array, jax.Array]:
    """float32[N, 2] each: what level 4 pays more than level 3, and which part of the highest potential there is then."""
    worlds = len(physics.qpos)
    failed, no_action = jnp.zeros(worlds, bool), jnp.zeros((worlds, 14))
    progress = (progress or task.start_progress(physics))._replace(best_level=jnp.full(worlds, 3))
    nothing, _ = task.dense(physics, progress, jnp.full(worlds, 3), failed, no_action)
    inserted, after = task.dense(physics, progress, jnp.full(worlds, 4), failed, no_action)
    return inserted - nothing, after.potential / potentials.HIGHEST


def test_actions_cost_their_square_and_that_of_their_change(task: Insertion, expert_replay: Replay) -> None:
    physics, progress = at_step(expert_replay, 100)
    level, failed = task.level(physics), jnp.zeros(len(SEEDS), bool)
    progress = progress._replace(action=jnp.zeros((len(SEEDS), 14)).at[1, 7:].set(2.0))
    free, _ = task.dense(
        physics, progress._replace(action=jnp.zeros((len(SEEDS), 14))), level, failed, jnp.zeros((len(SEEDS), 14))
    )
    action = np.zeros((len(SEEDS), 14), np.float32)
    action[0, :7], action[1, 7:], action[2, 12] = 1.0, 2.0, -3.0
    paid, _ = task.dense(physics, progress, level, failed, jnp.asarray(action))
    expected = -0.5 * (0.0005 * np.array([[7, 0], [0, 28], [0, 9], [0, 0]]) + 0.01 * np.array([[7, 0], [0, 0], [0, 9], [0, 0]]))
    np.testing.assert_allclose(paid - free, expected, atol=1e-6)


# --- Geometry ------------------------------------------------------------------------------------------------------------------


def objects_at(task: Insertion, peg: list[float], socket: list[float], peg_yaw: float = 0.0) -> Physics:
    """The peg's and the socket's centre, the peg turned about the vertical; the arms do not matter."""
    qpos = np.zeros((1, 30), np.float32)
    qpos[0, 16:19], qpos[0, 23:26] = peg, socket
    qpos[0, 19:23] = np.cos(peg_yaw / 2), 0, 0, np.sin(peg_yaw / 2)
    qpos[0, 26:30] = 1, 0, 0, 0
    sensordata = np.ones((1, task.scene.model.nsensordata), np.float32)
    return Physics(None, jnp.asarray(qpos), jnp.zeros((1, 28)), jnp.asarray(sensordata))


@pytest.mark.parametrize(
    ("peg", "peg_yaw", "lateral", "tilt", "depth"),
    [
        ((0.1, 0.5, 0.15), 0.0, 0.0, 0.0, 0.04),  # at the pin's face
        ((0.12, 0.5, 0.15), 0.0, 0.0, 0.0, 0.06),  # at the mouth
        ((0.16, 0.503, 0.146), 0.0, 0.005, 0.0, 0.1),  # 3 mm and 4 mm aside
        ((0.12, 0.5, 0.15), np.pi / 6, 0.03, 0.06, 0.12 - 0.06 * np.cos(np.pi / 6)),
        ((0.12, 0.5, 0.15), np.pi, 0.0, 0.0, 0.18),  # the wrong end first
    ],
)
def test_mating_error_by_hand(task: Insertion, peg: list[float], peg_yaw: float, lateral: float, tilt: float, depth: float):
    geometry = task.geometry(objects_at(task, peg, [0.0, 0.5, 0.15], peg_yaw))
    np.testing.assert_allclose(jnp.stack(potentials.mating_error(geometry)), [[lateral], [tilt], [depth]], atol=1e-6)


def test_mating_error_moves_with_the_pair(task: Insertion) -> None:
    """Only how they stand to each other counts: both turned by 90 degrees about the vertical and moved."""
    physics = objects_at(task, [0.16, 0.503, 0.146], [0.0, 0.5, 0.15], 0.1)
    qpos = np.array(physics.qpos)
    turned = qpos.copy()
    for start in (16, 23):
        x, y, z = qpos[0, start : start + 3]
        turned[0, start : start + 3] = -y + 0.4, x + 0.6, z + 0.02
        quat = np.empty(4)
        mujoco.mju_mulQuat(quat, np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)]), qpos[0, start + 3 : start + 7].astype(float))
        turned[0, start + 3 : start + 7] = quat
    wanted = potentials.mating_error(task.geometry(physics))
    found = potentials.mating_error(task.geometry(physics._replace(qpos=jnp.asarray(turned))))
    np.testing.assert_allclose(jnp.stack(found), jnp.stack(wanted), atol=1e-6)


def turned_about_the_centre(qpos: np.ndarray, qvel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scene after a half turn about the vertical through (0, 0.5): the arms change places, and so do peg and socket."""

    def turned_pose(pose: np.ndarray) -> np.ndarray:
        """Rotation R becomes T R T, with T the half turn: peg and socket mate with opposite ends of their frames."""
        x, y, z, qw, qx, qy, qz = pose.T
        return np.stack([-x, 1 - y, z, qw, -qx, -qy, qz], axis=1)

    def turned_velocity(velocity: np.ndarray) -> np.ndarray:
        return velocity * np.array([-1, -1, 1, -1, -1, 1], np.float32)

    positions = [qpos[:, 8:16], qpos[:, :8], turned_pose(qpos[:, 23:30]), turned_pose(qpos[:, 16:23])]
    velocities = [qvel[:, 8:16], qvel[:, :8], turned_velocity(qvel[:, 22:28]), turned_velocity(qvel[:, 16:22])]
    return np.concatenate(positions, axis=1), np.concatenate(velocities, axis=1)


def swap_arms(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:, 7:], x[:, :7]], axis=1)


def test_both_arms_see_the_same_in_their_own_frames(task: Insertion) -> None:
    num_worlds, rng = 16, np.random.default_rng(0)
    engine = make_engine("c", physics="exact")
    qpos = task.start_from_seed(0)[None].repeat(num_worlds, axis=0)
    qpos[:, :16] += rng.uniform(-1, 1, (num_worlds, 16)) * np.tile([0.3] * 6 + [0.01] * 2, 2)
    for start in (16, 23):
        qpos[:, start : start + 3] += rng.uniform(-0.05, 0.05, (num_worlds, 3)) + [0, 0, 0.7]  # high above, out of touch
        quat = rng.normal(size=(num_worlds, 4))
        qpos[:, start + 3 : start + 7] = quat / np.linalg.norm(quat, axis=1, keepdims=True)
    qvel = rng.normal(size=(num_worlds, 28))
    target = rng.normal(size=(num_worlds, 14)).astype(np.float32)
    grasp = np.zeros((num_worlds, 2), np.float32)
    found = []
    for pose, velocity, aim in ((qpos, qvel, target), (*turned_about_the_centre(qpos, qvel), swap_arms(target))):
        physics = engine.reset(jnp.asarray(pose, jnp.float32), jnp.asarray(velocity, jnp.float32))
        progress = unremarkable(jnp.asarray(grasp))
        features = np.asarray(task.features(physics, jnp.asarray(aim), progress))
        touches = np.stack(list(task.touches(physics).values()))
        found.append((task.geometry(physics), features[:, :136].reshape(num_worlds, 2, 68), touches))
    (geometry, blocks, touches), (turned_geometry, turned_blocks, turned_touches) = found
    assert not touches.any()
    assert not turned_touches.any()
    for x, y in zip(geometry, turned_geometry, strict=True):
        np.testing.assert_allclose(y, x[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(turned_blocks, blocks[:, ::-1], atol=1e-5)
    differs = np.abs(blocks[:, 0] - blocks[:, 1]).max(axis=0) > 1e-3
    # All but three contacts, grasp, lift, x and y of the mating ends' distance and the cosine of the objects' axes.
    assert differs.sum() == 68 - 8


def test_rotations_are_rotations_and_point_to_the_mating_ends(task: Insertion) -> None:
    geometry = task.geometry(objects_at(task, [0.15, 0.5, 0.15], [-0.1, 0.6, 0.02]))
    np.testing.assert_allclose(geometry.rotation, np.broadcast_to(np.eye(3), (1, 2, 3, 3)), atol=1e-6)
    # Socket (left arm): the world's axes, from (0, 0.5). Peg (right arm): the same after a half turn.
    np.testing.assert_allclose(geometry.position, [[[-0.1, 0.1, 0.02], [-0.15, 0.0, 0.15]]], atol=1e-6)


# --- Observations --------------------------------------------------------------------------------------------------------------


def test_agent_pos_is_gym_alohas(task: Insertion, expert_replay: Replay, gym_aloha_physics: dm_mujoco.Physics) -> None:
    physics, _ = at_step(expert_replay, 130)
    ours = task.agent_pos(physics)
    assert ours.shape == (len(SEEDS), 14)
    for world in range(len(SEEDS)):
        gym_aloha_physics.data.qpos[:] = physics.qpos[world]
        np.testing.assert_allclose(ours[world], sim.BimanualViperXTask.get_qpos(gym_aloha_physics), atol=1e-6)


def test_features_are_142_finite_numbers_of_about_one(task: Insertion, expert_replay: Replay, clumsy_replay: Replay) -> None:
    for recorded in (expert_replay, clumsy_replay):
        physics, progress = flat(recorded)
        num_worlds = len(physics.qpos)
        features = task.features(physics, jnp.zeros((num_worlds, 14)), progress)
        assert features.shape == (num_worlds, 142)
        assert features.dtype == jnp.float32
        assert np.isfinite(features).all()
        on_table = ~np.asarray(task.lost(physics))
        assert np.abs(features[on_table]).max() < 10
        np.testing.assert_allclose(features[:, -1], progress.best_level / 4)
        np.testing.assert_allclose(
            features[:, -6:-3], jnp.stack(potentials.mating_error(task.geometry(physics)), axis=1), atol=1e-6
        )


def test_features_by_hand(task: Insertion) -> None:
    """Joints, objects and their velocities, per arm in its own frame; MuJoCo gives a body's spin in the body's frame."""
    physics = objects_at(task, [0.15, 0.45, 0.2], [-0.1, 0.6, 0.02], peg_yaw=np.pi / 2)
    qpos, qvel = np.array(physics.qpos), np.zeros((1, 28), np.float32)
    qpos[0, 26:30] = np.sqrt(0.5), 0, 0, np.sqrt(0.5)  # the socket is turned by 90 degrees as well
    qpos[0, [0, 8, 14]] = 0.1, 0.2, 0.058
    qvel[0, [1, 8, 14]] = 1.0, -2.0, 0.5
    qvel[0, scene.PEG_QVEL], qvel[0, scene.SOCKET_QVEL] = (1, 2, 3, 10, 0, 5), (4, 5, 6, 0, 20, 0)
    progress = unremarkable(jnp.array([[0.25, 0.75]]))
    physics = physics._replace(qpos=jnp.asarray(qpos), qvel=jnp.asarray(qvel))
    features = np.asarray(task.features(physics, jnp.full((1, 14), 0.5), progress))
    left, right = both = features[0, :136].reshape(2, 68)
    shut = -0.01844 / (0.058 - 0.01844)  # of a finger at 0 m
    np.testing.assert_allclose(left[:7], [0.1, 0, 0, 0, 0, 0, shut], atol=1e-6)
    np.testing.assert_allclose(right[:7], [0.2, 0, 0, 0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(left[7:14], [0, 0.2, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(right[7:14], [-0.4, 0, 0, 0, 0, 0, 0.1], atol=1e-6)
    np.testing.assert_allclose(left[14:21], 0.5 - left[:7], atol=1e-6)
    np.testing.assert_allclose(right[14:21], 0.5 - right[:7], atol=1e-6)
    position, linear, spin = slice(33, 36), slice(48, 51), slice(51, 54)
    np.testing.assert_allclose(both[:, position], [[-0.1, 0.1, 0.02], [-0.15, 0.05, 0.2]], atol=1e-6)
    np.testing.assert_allclose(both[:, linear], [[4, 5, 6], [-1, -2, 3]], atol=1e-6)
    # A tenth of: the socket's (0, 20, 0) is (-20, 0, 0) in the world; the peg's (10, 0, 5) is (0, 10, 5), to its arm (0, -10, 5).
    np.testing.assert_allclose(both[:, spin], [[-2.0, 0, 0], [0, -1, 0.5]], atol=1e-6)
    np.testing.assert_allclose(both[:, 57], [0.25, 0.75])  # the grasp


def test_features_tell_what_the_fingers_feel(task: Insertion) -> None:
    physics = touching(task, {"peg_finger_left"}, {"socket_table"}, {"peg_socket"}, {"peg_pin"}, set())
    progress = unremarkable(jnp.zeros((5, 2)))
    features = np.asarray(task.features(physics, jnp.zeros((5, 14)), progress))
    changed = [set(np.flatnonzero(row != features[-1])) for row in features[:-1]]
    contacts = 21 + 33  # behind an arm's own joints and its object
    assert changed == [{68 + contacts}, {contacts + 2}, {139}, {140}]
