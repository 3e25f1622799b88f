"""The C engine is `mj_step`, batched: pure, the same bits for a world whatever its neighbours, and honest about explosions."""

import dataclasses

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from dm_control import mujoco as dm_mujoco
from gym_aloha.constants import START_ARM_POSE
from gym_aloha.tasks import sim
from gym_aloha.utils import sample_insertion_pose

from aloha_jax import expert, scene
from aloha_jax.config import ConfigError
from aloha_jax.engines import Physics, make_engine
from aloha_jax.engines.c import CEngine, action_to_ctrl, variants

NV, NSTATE = 28, 59  # time, 30 positions, 28 velocities


@pytest.fixture(scope="module", params=["exact", "fast"])
def engine(request: pytest.FixtureRequest) -> CEngine:
    return CEngine(scene.make_scene(physics=request.param))


@pytest.fixture(scope="module")
def exact() -> CEngine:
    return CEngine(scene.make_scene(physics="exact"))


def starts(num_worlds: int) -> np.ndarray:
    poses = [np.concatenate([START_ARM_POSE, *sample_insertion_pose(seed)]) for seed in range(num_worlds)]
    return np.stack(poses).astype(np.float32)


def at_rest(engine: CEngine, qpos: np.ndarray) -> Physics:
    return engine.reset(jnp.asarray(qpos), jnp.zeros((len(qpos), NV)))


def float64_state(physics: Physics) -> np.ndarray:
    """float64[N, 59 + 28]: MuJoCo's full state, then the solver's warm start."""
    return np.asarray(physics.internal).view(np.float64)


def wild_actions(steps: int, num_worlds: int, seed: int = 0) -> np.ndarray:
    """float32[steps, N, 14] targets all around the start pose: arms that swing, hit the table and each other's objects."""
    rng = np.random.default_rng(seed)
    home = np.delete(START_ARM_POSE, [7, 15])
    home[[6, 13]] = 0.5
    return (home + rng.uniform(-0.6, 0.6, (steps, num_worlds, 14))).astype(np.float32)


def run(engine: CEngine, physics: Physics, actions: np.ndarray) -> Physics:
    for action in actions:
        physics = engine.step(physics, jnp.asarray(action))
    return physics


def pick(physics: Physics, worlds: list[int]) -> Physics:
    return Physics(*(x[np.array(worlds)] for x in physics))


def assert_same(a: Physics, b: Physics) -> None:
    """Equal to the last bit."""
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# --- Controls --------------------------------------------------------------------------------------------------------------


def test_controls_are_gym_alohas_to_the_bit() -> None:
    physics = dm_mujoco.Physics.from_xml_path(str(scene.ASSETS / "bimanual_viperx_insertion.xml"))
    task = sim.BimanualViperXTask()
    actions = np.random.default_rng(0).normal(0, 1, (500, 14)).astype(np.float32)
    ours = action_to_ctrl(actions).astype(np.float64)
    for action, ctrl in zip(actions, ours, strict=True):
        task.before_step(action, physics)
        np.testing.assert_array_equal(physics.data.ctrl, ctrl)


# --- Against mj_step -------------------------------------------------------------------------------------------------------


def mj_step_loop(engine: CEngine, qpos: np.ndarray, actions: np.ndarray, *, rounded_warmstart: bool) -> np.ndarray:
    """float64[T, 59 + 28]: full states and warm starts after each control step of one world, one `mj_step` at a time."""
    model = engine.scene.model
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    states = []
    for action in actions:
        left, right = (x * (0.058 - 0.01844) + 0.01844 for x in (action[6], action[13]))
        data.ctrl[:] = [*action[:6], left, -left, *action[7:13], right, -right]
        for _ in range(engine.scene.substeps):
            before = data.qvel.copy()
            mujoco.mj_step(model, data)
        if rounded_warmstart:
            data.qacc_warmstart[:] = (data.qvel - before) / model.opt.timestep
        states.append(np.concatenate([[data.time], data.qpos, data.qvel, data.qacc_warmstart]))
    return np.stack(states)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_world_is_mj_step_in_a_loop(engine: CEngine, seed: int) -> None:
    """An expert's episode up to and including the lift: free fall, collisions, a grasp."""
    qpos = starts(2)[seed : seed + 1]
    actions = expert.plan_from_qpos(qpos[0])[:150]
    physics, ours = at_rest(engine, qpos), []
    for action in actions:
        physics = engine.step(physics, jnp.asarray(action[None]))
        ours.append(float64_state(physics)[0])
    # The warm start travels as a difference of velocities, which rounds it: with the same rounding, the same bits.
    rounded = mj_step_loop(engine, qpos[0], actions, rounded_warmstart=True)
    np.testing.assert_array_equal(np.stack(ours), rounded)
    # That rounding is all the difference to the plain loop, whose own warm start it keeps to 12 digits.
    plain = mj_step_loop(engine, qpos[0], actions, rounded_warmstart=False)
    time_and_qpos = slice(0, 31)
    np.testing.assert_allclose(np.stack(ours)[:, time_and_qpos], plain[:, time_and_qpos], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.stack(ours)[:, 31:NSTATE], plain[:, 31:NSTATE], rtol=0, atol=1e-11)
    scale = np.abs(plain[:, NSTATE:]).max()
    np.testing.assert_allclose(np.stack(ours)[:, NSTATE:], plain[:, NSTATE:], rtol=0, atol=1e-11 * scale)
    assert np.abs(plain[-1, 1:31] - qpos[0]).max() > 0.1  # something happened


def test_physics_shows_its_state_in_float32(engine: CEngine) -> None:
    physics = run(engine, at_rest(engine, starts(3)), wild_actions(5, 3))
    state = float64_state(physics)
    np.testing.assert_array_equal(physics.qpos, state[:, 1:31].astype(np.float32))
    np.testing.assert_array_equal(physics.qvel, state[:, 31:NSTATE].astype(np.float32))


def test_exact_sensors_belong_to_the_new_positions(exact: CEngine) -> None:
    model = exact.scene.model
    physics = run(exact, at_rest(exact, starts(2)), wild_actions(20, 2))
    for world, state in enumerate(float64_state(physics)):
        data = mujoco.MjData(model)
        mujoco.mj_setState(model, data, state[:NSTATE], mujoco.mjtState.mjSTATE_FULLPHYSICS)
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(physics.sensordata[world], data.sensordata, atol=1e-6)


def test_a_reset_world_senses_where_it_is(engine: CEngine) -> None:
    model, qpos = engine.scene.model, starts(2)
    qpos[1, scene.PEG_QPOS][2] = 0.009  # in the table's top
    physics = at_rest(engine, qpos)
    np.testing.assert_array_equal(physics.qpos, qpos)
    assert not np.any(physics.qvel)
    for world in range(2):
        data = mujoco.MjData(model)
        data.qpos[:] = qpos[world]
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(physics.sensordata[world], data.sensordata, atol=1e-6)
    peg_table = physics.sensordata[:, engine.scene.touches["peg_table"]].any(axis=1)
    np.testing.assert_array_equal(peg_table, [False, True])


# --- Purity ----------------------------------------------------------------------------------------------------------------


def test_same_input_same_output_whatever_happens_between(engine: CEngine) -> None:
    physics = run(engine, at_rest(engine, starts(3)), wild_actions(10, 3))
    kept = Physics(*(np.array(x) for x in physics))
    action = jnp.asarray(wild_actions(1, 3, seed=1)[0])
    once = engine.step(physics, action)
    run(engine, at_rest(engine, starts(5)[2:]), wild_actions(3, 3, seed=2))  # other worlds on the same threads
    assert_same(engine.step(physics, action), once)
    assert_same(physics, kept)  # not written to


def test_jit_changes_nothing(engine: CEngine) -> None:
    physics, actions = at_rest(engine, starts(3)), wild_actions(5, 3)
    eager = run(engine, physics, actions)
    scanned = jax.jit(lambda p, a: jax.lax.scan(lambda p, a: (engine.step(p, a), None), p, a)[0])(physics, jnp.asarray(actions))
    assert_same(scanned, eager)
    qpos, mask = jnp.asarray(starts(6)[3:]), jnp.array([True, False, True])
    arguments = mask, eager, qpos, jnp.zeros((3, NV))
    assert_same(jax.jit(engine.reset_where)(*arguments), engine.reset_where(*arguments))


def test_a_world_does_not_know_its_neighbours(engine: CEngine) -> None:
    qpos, actions = starts(7), wild_actions(15, 7)
    together = run(engine, at_rest(engine, qpos), actions)
    order = [4, 2, 6, 0, 5, 1, 3]
    shuffled = run(engine, at_rest(engine, qpos[order]), actions[:, order])
    assert_same(shuffled, pick(together, order))
    for world in (0, 6):
        alone = run(engine, at_rest(engine, qpos[[world]]), actions[:, [world]])
        assert_same(alone, pick(together, [world]))
    actions[:, 3] = 0.0  # another life for one
    others = [0, 1, 2, 4, 5, 6]
    changed = run(engine, at_rest(engine, qpos), actions)
    assert_same(pick(changed, others), pick(together, others))
    assert not np.allclose(changed.qpos[3], together.qpos[3])


def test_any_number_of_threads_gives_the_same_bits(exact: CEngine) -> None:
    qpos, actions = starts(5), wild_actions(5, 5)
    one_thread = CEngine(exact.scene, num_threads=1)
    assert_same(run(one_thread, at_rest(one_thread, qpos), actions), run(exact, at_rest(exact, qpos), actions))


@pytest.mark.parametrize("num_worlds", [1, 257])
def test_any_number_of_worlds_is_one_call_of_rollout(num_worlds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CEngine(scene.make_scene(physics="fast"))
    physics = at_rest(engine, starts(num_worlds))
    calls, pool = [], engine._pool

    class CountingPool:
        def rollout(self, model, data, state, *args, **kwargs):
            calls.append(len(state))
            return pool.rollout(model, data, state, *args, **kwargs)

    monkeypatch.setattr(engine, "_pool", CountingPool())
    for name in ("mj_step", "mj_step1", "mj_step2", "mj_forward"):
        monkeypatch.setattr(mujoco, name, None)
    action = jnp.asarray(wild_actions(1, num_worlds)[0])
    stepped = engine.step(physics, action)
    assert calls == [num_worlds]
    last = num_worlds - 1
    assert_same(engine.step(pick(physics, [last]), action[last:]), pick(stepped, [last]))
    assert stepped.qpos.shape == (num_worlds, 30)


def test_worlds_may_differ_in_friction_and_mass() -> None:
    """World i moves under the i-th variant of the model, and after the last under the first, which is the model itself."""
    shared = scene.make_scene(physics="fast")
    engine = CEngine(shared, models=variants(shared.model, 2.0, 3.0))
    objects = [shared.model.body(name).id for name in scene.OBJECTS]
    friction = np.array([model.geom_friction[0, 0] / shared.model.geom_friction[0, 0] for model in engine._models])
    mass = np.array([model.body_mass[objects] / shared.model.body_mass[objects] for model in engine._models])
    for factors, limit in ((friction, 2.0), (mass[:, 0], 3.0)):
        where = np.log(factors) / np.log(limit)  # in -1..1
        assert where[0] == 0
        np.testing.assert_allclose(np.sort(where), np.linspace(-1, 1, len(where)), atol=1e-6)
    assert abs(np.corrcoef(np.log(friction), np.log(mass[:, 0]))[0, 1]) < 0.2
    np.testing.assert_allclose(mass[:, 1], mass[:, 0])

    count = len(engine._models) + 1
    qpos, actions = np.repeat(starts(1), count, axis=0), np.repeat(wild_actions(15, 1), count, axis=1)
    together = run(engine, at_rest(engine, qpos), actions)
    for world, model in ((0, shared.model), (3, engine._models[3]), (count - 1, shared.model)):
        alone = CEngine(dataclasses.replace(shared, model=model))
        expected = run(alone, at_rest(alone, qpos[:1]), actions[:, :1])
        assert_same(pick(together, [world])._replace(internal=together.internal[[world], :-1]), expected)
    assert len(np.unique(together.qpos, axis=0)) == count - 1
    # Whichever others it is stepped beside, and after a reset: it stays that world.
    fresh = at_rest(engine, qpos)
    begun = engine.reset_where(jnp.arange(count) == 3, run(engine, fresh, actions[:5]), fresh.qpos, fresh.qvel)
    assert_same(run(engine, pick(begun, [3]), actions[:, :1]), pick(together, [3]))
    # Unless it is told to be another.
    other = run(engine, engine.under_models(pick(fresh, [0, 1]), jnp.array([3, 1])), actions[:, :2])
    assert_same(other, pick(together, [3, 1]))


def test_mjx_says_that_its_worlds_are_alike() -> None:
    with pytest.raises(ConfigError, match="--friction-factor and --mass-factor need --engine c"):
        make_engine("mjx", friction_factor=2.0)


# --- Resets ----------------------------------------------------------------------------------------------------------------


def test_reset_where_touches_only_the_masked(engine: CEngine) -> None:
    physics = run(engine, at_rest(engine, starts(4)), wild_actions(5, 4))
    fresh_qpos, zeros = jnp.asarray(starts(8)[4:]), jnp.zeros((4, NV))
    fresh = engine.reset(fresh_qpos, zeros)
    for mask in ([True, False, False, True], [False] * 4, [True] * 4):
        merged = engine.reset_where(jnp.array(mask), physics, fresh_qpos, zeros)
        for world, is_reset in enumerate(mask):
            assert_same(pick(merged, [world]), pick(fresh if is_reset else physics, [world]))


def test_a_reset_world_remembers_nothing(engine: CEngine) -> None:
    """Neither its clock nor its warm start: what follows is what follows a fresh reset."""
    qpos, zeros, actions = jnp.asarray(starts(2)), jnp.zeros((2, NV)), wild_actions(5, 2, seed=3)
    used = run(engine, at_rest(engine, starts(4)[2:]), wild_actions(5, 2))
    again = engine.reset_where(jnp.array([True, True]), used, qpos, zeros)
    assert_same(run(engine, again, actions), run(engine, engine.reset(qpos, zeros), actions))


def test_reset_takes_velocities(engine: CEngine) -> None:
    qvel = np.zeros((1, NV), np.float32)
    qvel[0, scene.PEG_QVEL][2] = 1.0  # thrown up
    thrown = engine.reset(jnp.asarray(starts(1)), jnp.asarray(qvel))
    np.testing.assert_array_equal(thrown.qvel, qvel)
    stepped = run(engine, thrown, wild_actions(1, 1))
    # v0 t - g t^2 / 2 after 0.02 s, to the order of the integrator's step.
    np.testing.assert_allclose(stepped.qpos[0, scene.PEG_QPOS][2], 0.05 + 0.02 - 9.81 * 0.02**2 / 2, atol=6e-4)


# --- Explosions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["qpos", "qvel", "warmstart", "action"])
def test_an_explosion_shows_as_nan_and_stays_at_home(
    engine: CEngine, cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """MuJoCo would put the world into its default pose and go on as if nothing had happened."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    actions = wild_actions(2, 3)
    physics = run(engine, at_rest(engine, starts(3)), actions[:1])
    expected = run(engine, physics, actions[1:])
    state, action = float64_state(physics).copy(), actions[1].copy()
    index = {"qpos": 20, "qvel": 35, "warmstart": NSTATE + 3, "action": None}[cause]
    if index is None:
        action[1, 3] = np.nan
    else:
        state[1, index] = 1e12 if cause == "qvel" else np.nan
    stepped = engine.step(physics._replace(internal=jnp.asarray(state.view(np.uint32))), jnp.asarray(action))
    assert np.isnan(stepped.qpos[1]).all()
    assert_same(pick(stepped, [0, 2]), pick(expected, [0, 2]))
    assert_same(engine.step(physics, jnp.asarray(actions[1])), expected)  # and is forgotten at the next call


def test_refuses_unknown_engines() -> None:
    with pytest.raises(ValueError, match="engine is"):
        make_engine("bullet")
