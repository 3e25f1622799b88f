"""MJX is the same simulation: C MuJoCo's trajectories, its contacts, its resets, and honest about explosions and full buffers."""

import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE
from gym_aloha.utils import sample_insertion_pose
from mujoco.mjx.warp.types import GraphMode

from aloha_jax import expert, scene
from aloha_jax.config import ConfigError
from aloha_jax.engines import Physics, make_engine
from aloha_jax.engines.c import CEngine
from aloha_jax.engines.mjx import GRAPH_MODE, MjxEngine, MjxState, chosen_graph_mode, default_impl
from aloha_jax.tasks.insertion import Insertion

NUM_WORLDS = 3  # in all tests: compiling takes most of their time


class Compiled(NamedTuple):
    """An engine with its functions compiled, for three worlds."""

    engine: MjxEngine
    reset: Callable[..., Physics]
    step: Callable[..., Physics]
    reset_where: Callable[..., Physics]


@pytest.fixture(scope="module", params=["warp", pytest.param("jax", marks=pytest.mark.slow)])
def mjx(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    with jax.numpy_rank_promotion("allow"):  # MJX's `jax` relies on it
        engine = make_engine("mjx", impl=request.param)
        assert isinstance(engine, MjxEngine)
        yield Compiled(engine, jax.jit(engine.reset), jax.jit(engine.step), jax.jit(engine.reset_where))


def starts(num_worlds: int = NUM_WORLDS) -> np.ndarray:
    poses = [np.concatenate([START_ARM_POSE, *sample_insertion_pose(seed)]) for seed in range(num_worlds)]
    return np.stack(poses).astype(np.float32)


def plans() -> np.ndarray:
    """float32[300, N, 14], an insertion from each start."""
    return np.stack([expert.plan_from_qpos(start) for start in starts()], axis=1)


def at_rest(mjx: Compiled, qpos: np.ndarray) -> Physics:
    return mjx.reset(jnp.asarray(qpos), jnp.zeros((NUM_WORLDS, 28)))


def touches(engine: Any, physics: Physics) -> dict[str, list[bool]]:
    return {name: np.asarray(x).tolist() for name, x in Insertion(engine.scene).touches(physics).items()}


def pick(physics: Physics, worlds: list[int]) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[worlds], physics)


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit on a CPU; on a GPU the order of contacts, and so of sums, changes from call to call."""
    tolerance = 0.0 if jax.default_backend() == "cpu" else 1e-4
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.0, atol=tolerance), a, b)


@pytest.fixture(scope="module")
def episode(mjx: Compiled) -> list[Physics]:
    """The expert's insertions from three starts, state by state."""
    physics = at_rest(mjx, starts())
    states = [physics]
    for action in plans()[:250]:
        physics = mjx.step(physics, jnp.asarray(action))
        states.append(physics)
    return states


def test_the_expert_inserts(mjx: Compiled, episode: list[Physics]) -> None:
    levels = np.array([Insertion(mjx.engine.scene).level(physics) for physics in episode])
    assert levels.max(axis=0).tolist() == [4] * NUM_WORLDS
    assert set(levels[:, 0].tolist()) == {0, 1, 2, 3, 4} or set(levels[:, 0].tolist()) == {0, 1, 2, 4}
    assert mjx.engine.complaint(episode[-1]) is None


def test_trajectories_are_c_mujocos(mjx: Compiled, episode: list[Physics]) -> None:
    """The same model in C, in float64: until the fingers close, float32 is all the difference; the grasp then adds its own."""
    engine, physics = CEngine(mjx.engine.scene), None
    physics = engine.reset(jnp.asarray(starts()), jnp.zeros((NUM_WORLDS, 28)))
    free = expert.STAGES["approach"] + expert.STAGES["descend"]
    for i, action in enumerate(plans()[:200], start=1):
        physics = engine.step(physics, jnp.asarray(action))
        if i in (5, free):
            np.testing.assert_allclose(episode[i].qpos, physics.qpos, atol=5e-4)
            assert touches(mjx.engine, episode[i]) == touches(engine, physics)
    for where in (scene.PEG_QPOS, scene.SOCKET_QPOS):  # 200 steps: carried to the meeting point
        np.testing.assert_allclose(episode[200].qpos[:, where][:, :3], physics.qpos[:, where][:, :3], atol=2e-3)


def test_a_reset_world_senses_where_it_is(mjx: Compiled) -> None:
    qpos = starts()
    qpos[1, scene.PEG_QPOS][2] = 0.009  # in the table's top
    qpos[2, scene.PEG_QPOS] = qpos[2, scene.SOCKET_QPOS] + [0.098, 0, 0, 0, 0, 0, 0]  # pushed against the pin
    physics = at_rest(mjx, qpos)
    np.testing.assert_array_equal(physics.qpos, qpos)
    assert touches(mjx.engine, physics)["peg_table"] == [False, True, False]
    assert touches(mjx.engine, physics)["peg_pin"] == [False, False, True]
    expected = CEngine(mjx.engine.scene).reset(jnp.asarray(qpos), jnp.zeros((NUM_WORLDS, 28)))
    tip = mjx.engine.scene.sensors["left/left_fingertip/pos"]
    np.testing.assert_allclose(physics.sensordata[:, tip], expected.sensordata[:, tip], atol=1e-6)


def test_reset_where_touches_only_the_masked(mjx: Compiled, episode: list[Physics]) -> None:
    used, fresh_qpos, zeros = episode[150], jnp.asarray(starts(6)[3:]), jnp.zeros((NUM_WORLDS, 28))
    fresh = mjx.reset(fresh_qpos, zeros)
    for mask in ([True, False, True], [False] * 3):
        merged = mjx.reset_where(jnp.array(mask), used, fresh_qpos, zeros)
        for world, is_reset in enumerate(mask):
            assert_same(pick(merged, [world]), pick(fresh if is_reset else used, [world]))


@pytest.mark.parametrize("cause", ["qpos", "qvel", "warmstart", "action"])
def test_an_explosion_shows_and_stays_at_home(mjx: Compiled, episode: list[Physics], cause: str) -> None:
    """One world explodes, one is moved, the third goes on as if nothing had happened."""
    before, action = episode[120], plans()[120]
    qpos, qvel, warmstart = (np.array(x) for x in (before.qpos, before.qvel, before.internal.warmstart))
    qpos[0, scene.PEG_QPOS][2] += 0.1
    broken = {"qpos": qpos, "qvel": qvel, "warmstart": warmstart, "action": action}[cause]
    broken[1, 3] = 1e12 if cause == "qvel" else np.nan
    changed = before._replace(qpos=qpos, qvel=qvel, internal=before.internal._replace(warmstart=warmstart))
    after = mjx.step(jax.tree.map(jnp.asarray, changed), jnp.asarray(action))
    stable = np.isfinite(after.qpos).all(axis=1) & (np.abs(after.qvel) < 1e3).all(axis=1)  # as `env.step` asks
    heals = cause == "warmstart" and mjx.engine.impl == "jax"  # its solver starts elsewhere if that is no better
    assert stable.tolist() == [True, heals, True]
    assert_same(pick(after, [2]), pick(episode[121], [2]))
    again = mjx.reset_where(jnp.array([False, True, False]), after, jnp.asarray(starts()), jnp.zeros((NUM_WORLDS, 28)))
    assert np.isfinite(mjx.step(again, jnp.asarray(plans()[0])).qpos).all()


def test_the_state_is_small_and_led_by_the_world_axis(episode: list[Physics]) -> None:
    """As `env.step` and checkpoints want it."""
    assert isinstance(episode[1].internal, MjxState)
    assert all(leaf.shape[0] == NUM_WORLDS for leaf in jax.tree.leaves(episode[1]))


def test_full_buffers_are_reported_with_the_numbers_to_raise() -> None:
    engine = MjxEngine(scene.make_scene(), "warp", max_contacts=1, max_convex_pairs=1, max_constraints=20)
    qpos = starts()
    qpos[:, [18, 25]] = 0.009, 0.021  # peg and socket in the table's top
    physics = jax.jit(engine.reset)(jnp.asarray(qpos), jnp.zeros((NUM_WORLDS, 28)))
    assert engine.complaint(physics) is None
    physics = jax.jit(engine.step)(physics, jnp.asarray(plans()[0]))
    for later in (physics, jax.jit(engine.reset_where)(jnp.ones(NUM_WORLDS, bool), physics, physics.qpos, physics.qvel)):
        complaint = engine.complaint(later)
        assert complaint is not None
        assert "3 of 3 worlds: raise max_contacts above 1 and max_constraints above 20 " in complaint
        assert "\n" not in complaint


def test_graph_modes_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GRAPH_MODE, raising=False)
    assert chosen_graph_mode() is None
    monkeypatch.setenv(GRAPH_MODE, "WARP_STAGED_EX")
    assert chosen_graph_mode() == GraphMode.WARP_STAGED_EX
    monkeypatch.setenv(GRAPH_MODE, "fast")
    with pytest.raises(ConfigError, match=r"one of NONE, JAX, WARP.*not 'fast'"):
        make_engine("mjx", impl="warp")


@pytest.mark.parametrize(
    ("platform", "kind", "impl"),
    [
        ("cpu", "cpu", "warp"),
        ("cuda", "NVIDIA H200", "warp"),
        ("cuda", "Tesla T4", "warp"),  # not every NVIDIA GPU has the name in its own
        ("rocm", "AMD Instinct MI300X", "jax"),
        ("tpu", "TPU v5e", "jax"),
    ],
)
def test_warp_is_chosen_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch, platform: str, kind: str, impl: str) -> None:
    device = types.SimpleNamespace(platform="gpu" if platform in ("cuda", "rocm") else platform, device_kind=kind)

    def devices(backend: str | None = None) -> list[types.SimpleNamespace]:
        if backend not in (None, platform):
            raise RuntimeError(f"Unknown backend {backend}")  # as JAX does
        return [device]

    monkeypatch.setattr(jax, "devices", devices)
    assert default_impl() == impl


def test_the_jax_implementation_refuses_exact_physics() -> None:
    with pytest.raises(ConfigError, match="--physics exact needs"):
        make_engine("mjx", impl="jax", physics="exact")
    with pytest.raises(ValueError, match="impl is"):
        make_engine("mjx", impl="cuda")
