"""The environment around physics and task: episodes, resets, actions, rewards, pictures.

Most of it is seen through a scripted engine, whose physics are looked up in a table, so that what must come out is known.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gym_aloha.constants import normalize_puppet_gripper_position
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

import aloha_jax
from aloha_jax import expert, scene
from aloha_jax.actions import delta_target, target_limits
from aloha_jax.config import Config, ConfigError
from aloha_jax.engines import Physics
from aloha_jax.env import Env, EnvState
from aloha_jax.env_state import Domain
from aloha_jax.factory import make, make_from_config
from aloha_jax.scene import PEG_QPOS, SOCKET_QPOS
from aloha_jax.tasks.insertion import Insertion, StartRange
from aloha_jax.tasks.potentials import Shaping

HOME = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1, 0, -0.96, 1.16, 0, -0.3, 0, 0.1], np.float32)
HOLD = HOME[None].repeat(3, axis=0)
NUM_ENVS = 3  # in all tests: compiling takes most of their time, and is shared where the shapes are


class Compiled:
    """An environment of three worlds whose `reset`, `reset_from` and `step` are compiled."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self.reset, self.reset_from, self.step = jax.jit(env.reset), jax.jit(env.reset_from), jax.jit(env.step)

    def run(self, state: EnvState, actions: np.ndarray) -> EnvState:
        """The states after each of float[T, N, 14] actions, stacked, as NumPy arrays; keys as their data."""
        state, states = rewound(state), []
        for action in actions:
            state = self.step(state, jnp.asarray(action, jnp.float32))
            states.append(without_keys(state))
        return jax.tree.map(lambda *x: np.stack(x), *states)


def rewound(state: EnvState) -> EnvState:
    """The same state, for a test that continues from it more than once: JAX's strict mode would object to its keys."""
    return state._replace(key=jax.random.clone(state.key))


def without_keys(state: EnvState) -> EnvState:
    """In NumPy, with the data of the keys."""
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@functools.cache
def compiled(action: str, reward: str, autoreset: bool = True) -> Compiled:
    """With real physics."""
    return Compiled(make("insertion", NUM_ENVS, action=action, reward=reward, autoreset=autoreset))


# --- A scripted engine -------------------------------------------------------------------------------------------------------

ROWS = 12


class ScriptedEngine:
    """Shows row t of a world's script t steps after its reset. The script is part of the state, for one compilation to serve all.

    `internal` holds per world the time, the last action, the touches by row, and joint positions by row where `posed`.
    """

    def __init__(self) -> None:
        self.scene = scene.make_scene(physics="exact")

    def reset(self, qpos: jax.Array, qvel: jax.Array) -> Physics:
        num_worlds, size = len(qpos), self.scene.model.nsensordata
        internal = {
            "time": jnp.zeros(num_worlds, jnp.int32),
            "action": jnp.zeros((num_worlds, 14)),
            "sensordata": jnp.zeros((num_worlds, ROWS, size)),
            "qpos": jnp.zeros((num_worlds, ROWS, 30)),
            "posed": jnp.zeros((num_worlds, ROWS), bool),
        }
        return self._show(internal, qpos)

    def step(self, physics: Physics, action: jax.Array) -> Physics:
        internal = {**physics.internal, "time": physics.internal["time"] + 1, "action": action}
        return self._show(internal, physics.qpos)

    def reset_where(self, mask: jax.Array, physics: Physics, qpos: jax.Array, qvel: jax.Array) -> Physics:
        internal = {**physics.internal, "time": jnp.where(mask, 0, physics.internal["time"])}
        return self._show(internal, jnp.where(mask[:, None], qpos, physics.qpos))

    def complaint(self, physics: Physics) -> str | None:
        return None

    def _show(self, internal: dict[str, jax.Array], qpos: jax.Array) -> Physics:
        worlds = jnp.arange(len(qpos))
        row = worlds, jnp.minimum(internal["time"], ROWS - 1)
        qpos = jnp.where(internal["posed"][row][:, None], internal["qpos"][row], qpos)
        sensordata = internal["sensordata"][row]
        for arm in scene.ARMS:
            quat = self.scene.sensors[f"{arm}/gripper/quat"]
            sensordata = sensordata.at[:, quat].set(jnp.array([[1.0, 0, 0, 0]]))
        return Physics(internal, qpos, jnp.zeros((len(qpos), 28)), sensordata)


@functools.cache
def scripted(reward: str, action: str = "absolute", autoreset: bool = True) -> Compiled:
    env = Env(ScriptedEngine(), "insertion", NUM_ENVS, None, obs="state", action=action, reward=reward, autoreset=autoreset)
    return Compiled(env)


HELD = {"peg_finger_right", "socket_finger_left"}
TOUCHES: list[set[str]] = [set(), HELD | {"peg_table"}, HELD, {"peg_socket"}, {"peg_pin"}]  # that make level 0 to 4


def with_script(levels: Sequence[Sequence[int]], poses: Mapping[tuple[int, int], np.ndarray] | None = None) -> EnvState:
    """Fresh worlds at gym_aloha's starts 0, 1, 2 whose steps 1, 2, ... have these levels, and from which on these positions.

    Args:
        levels: per world, of the steps after a reset; 0 for the rest.
        poses: (world, step) -> joint positions [30] from that step on.
    """
    base = scripted("sparse")
    state = base.reset_from(STARTS)
    physics_scene = base.env.engine.scene
    sensordata = np.zeros((NUM_ENVS, ROWS, physics_scene.model.nsensordata), np.float32)
    for world, script in enumerate(levels):
        for step, level in enumerate(script, start=1):
            for name in TOUCHES[level]:
                sensordata[world, step, physics_scene.touches[name][0]] = 1
    qpos, posed = np.zeros((NUM_ENVS, ROWS, 30), np.float32), np.zeros((NUM_ENVS, ROWS), bool)
    for (world, step), pose in (poses or {}).items():
        qpos[world, step:], posed[world, step:] = pose, True
    script_arrays = {"sensordata": sensordata, "qpos": qpos, "posed": posed}
    internal = {**state.physics.internal, **jax.tree.map(jnp.asarray, script_arrays)}
    return state._replace(physics=state.physics._replace(internal=internal))


STARTS = np.stack([Insertion.start_from_seed(seed) for seed in range(NUM_ENVS)]).astype(np.float32)


# --- Contract ------------------------------------------------------------------------------------------------------------------


def signature(state: EnvState) -> Any:
    """Shapes, dtypes and weak types of everything in a state."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", None)), state)


def test_shapes_and_types_are_as_documented() -> None:
    env = aloha_jax.make("insertion", num_envs=3, engine="c", obs="state", action="absolute", reward="sparse")
    assert env.num_envs == 3
    shared = compiled("absolute", "sparse")
    state = shared.reset(jax.random.key(0))
    stepped = shared.step(rewound(state), jnp.asarray(HOLD))
    assert signature(stepped) == signature(state)  # or `scan` would refuse and `jit` compile again
    assert jax.eval_shape(env.step, jax.eval_shape(env.reset, jax.random.key(0)), HOLD) == jax.eval_shape(lambda: stepped)
    expected = {
        "obs": ((3, 142), jnp.float32),
        "privileged": ((3, 142), jnp.float32),
        "final_obs": ((3, 142), jnp.float32),
        "final_privileged": ((3, 142), jnp.float32),
        "qpos": ((3, 30), jnp.float32),
        "final_qpos": ((3, 30), jnp.float32),
        "target": ((3, 14), jnp.float32),
        "reward": ((3,), jnp.float32),
        "arm_reward": ((3, 2), jnp.float32),
        "level": ((3,), jnp.int32),
        "terminated": ((3,), jnp.bool_),
        "truncated": ((3,), jnp.bool_),
        "invalid": ((3,), jnp.bool_),
        "done": ((3,), jnp.bool_),
        "clock": ((3,), jnp.int32),
    }
    for name, (shape, dtype) in expected.items():
        for array in (getattr(state, name), getattr(stepped, name)):
            assert (array.shape, array.dtype) == (shape, dtype), name
    episode = stepped.episode
    assert (episode.total_reward.dtype, episode.length.dtype, episode.best_level.dtype) == (jnp.float32, jnp.int32, jnp.int32)
    assert is_finite(stepped)


def test_a_step_is_compiled_once() -> None:
    shared = compiled("absolute", "sparse")
    state = shared.reset(jax.random.key(0))
    state = state._replace(clock=jnp.array([0, 298, 299], jnp.int32))  # two resets on the way
    for _ in range(3):
        state = shared.step(state, jnp.asarray(HOLD))
    shared.step(shared.reset_from(STARTS), jnp.asarray(HOLD))
    assert shared.step._cache_size() == 1  # type: ignore[attr-defined]


def test_geometry_is_not_rounded_on_a_gpu() -> None:
    """Its products of matrices must ask for float32; by default a GPU takes the factors' first 10 bits."""
    env = make("insertion", NUM_ENVS, reward="dense")
    state = jax.eval_shape(env.reset, jax.random.key(0))
    for program in (
        str(jax.make_jaxpr(env.reset)(jax.random.key(0))),
        str(jax.make_jaxpr(env.step)(state, jnp.zeros((NUM_ENVS, 14)))),
    ):
        assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_scan_is_a_loop_of_steps() -> None:
    shared = compiled("delta", "dense")
    start = shared.reset(jax.random.key(0))
    start = start._replace(clock=jnp.array([0, 298, 100], jnp.int32))
    actions = jax.random.normal(jax.random.key(1), (4, NUM_ENVS, 14))

    def step(state: EnvState, action: jax.Array) -> tuple[EnvState, EnvState]:
        state = shared.env.step(state, action)
        return state, state

    scanned = without_keys(jax.jit(lambda state, actions: jax.lax.scan(step, state, actions)[1])(rewound(start), actions))
    looped = shared.run(start, np.asarray(actions))
    assert_same(scanned.physics, looped.physics)
    assert_same(scanned.key, looped.key)
    assert_close(scanned, looped, atol=1e-5)
    assert looped.truncated.any(axis=1).tolist() == [False, True, False, False]


# --- Resets --------------------------------------------------------------------------------------------------------------------


def test_a_key_decides_everything() -> None:
    shared = compiled("absolute", "sparse")
    once, again, other = (shared.reset(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_same(without_keys(once), without_keys(again))
    late = [state._replace(clock=jnp.full(NUM_ENVS, 298, jnp.int32)) for state in (once, again, other)]
    futures = [shared.run(state, np.stack([HOLD] * 3)) for state in late]
    assert_same(futures[0], futures[1])
    assert (futures[0].qpos[1] != futures[2].qpos[1]).any(axis=1).all()  # step 2 ends with other starts
    starts = np.concatenate([once.qpos, other.qpos, futures[0].qpos[1], futures[2].qpos[1]])[:, [16, 17, 23, 24]]
    assert len(np.unique(starts, axis=0)) == 12  # worlds and episodes all differ
    low, high = np.array([0.1, 0.4, -0.2, 0.4]), np.array([0.2, 0.6, -0.1, 0.6])
    assert ((low <= starts) & (starts <= high)).all()


def test_reset_from_starts_where_it_is_told() -> None:
    shared = compiled("absolute", "sparse")
    state = shared.reset_from(STARTS)
    np.testing.assert_array_equal(state.qpos, STARTS)
    np.testing.assert_allclose(state.target, HOLD, atol=2e-3)
    assert not state.clock.any()
    assert not state.level.any()
    for wrong in (STARTS[:1], STARTS[:, :29], STARTS[0]):
        with pytest.raises(ValueError, match=r"reset_from wants qpos of shape \(3, 30\)"):
            shared.env.reset_from(wrong)


def test_training_may_turn_and_move_objects_and_evaluation_never_does() -> None:
    config = Config(obs="state", n_envs=32, start_yaw=30.0, start_shift=0.03, episode_length=1)

    def starts(env: Env) -> np.ndarray:
        state = jax.jit(env.reset)(jax.random.key(0))
        if env.autoreset:  # the episodes after the first, too
            state = jax.jit(env.step)(state, jnp.zeros((32, 14)))
        return np.asarray(state.qpos)

    training, evaluation = starts(make_from_config(config)), starts(make_from_config(config, autoreset=False))
    for part in (scene.PEG_QPOS, scene.SOCKET_QPOS):
        yaw = np.rad2deg(2 * np.arctan2(training[:, part][:, 6], training[:, part][:, 3]))
        assert 15 < np.abs(yaw).max() <= 30.001
        np.testing.assert_array_equal(evaluation[:, part][:, 3:], [[1, 0, 0, 0]] * 32)
    assert (training[:, scene.PEG_QPOS][:, 0] < 0.1).any()
    assert (evaluation[:, scene.PEG_QPOS][:, 0] >= 0.1).all()


def test_training_may_move_the_camera_each_episode_and_evaluation_never_does() -> None:
    size = {"image_height": 24, "image_width": 40, "conv": ((8, 8, 8),), "n_envs": 8, "batch_size": 8}
    config = Config(**size, obs="pixels", camera_shift=0.03, episode_length=2)  # type: ignore[arg-type]
    env, still = make_from_config(config), make_from_config(config, autoreset=False)
    with env.renderer, still.renderer:  # type: ignore[union-attr]
        step = jax.jit(env.step)
        states = [jax.jit(env.reset)(jax.random.key(0))]
        for _ in range(4):
            states.append(step(states[-1], jnp.zeros((8, 14))))
        cameras = np.array([state.domain.camera for state in states])
        assert 0.02 < np.abs(cameras).max() <= 0.03
        np.testing.assert_array_equal(cameras[0], cameras[1])
        np.testing.assert_array_equal(cameras[2], cameras[3])
        assert len(np.unique(cameras[[0, 2, 4]].reshape(-1, 2), axis=0)) == 24
        for before, state in itertools.pairwise(states):
            poses = np.concatenate([state.qpos, state.domain.camera], axis=1)
            np.testing.assert_array_equal(state.obs, env.renderer.render(poses))  # type: ignore[union-attr]
            # What an ended episode showed last, it showed through its own camera.
            poses = np.concatenate([state.final_qpos, before.domain.camera], axis=1)
            np.testing.assert_array_equal(state.final_obs, env.renderer.render(poses))  # type: ignore[union-attr]
        state = jax.jit(still.reset)(jax.random.key(0))
        assert state.domain.camera is None
        np.testing.assert_array_equal(state.obs, env.renderer.render(np.asarray(state.qpos)))  # type: ignore[union-attr]
        # Unless it asks for a camera off its place.
        aside = Domain(jnp.tile(jnp.array([0.02, -0.01]), (8, 1)), None)
        state = jax.jit(still.reset_from)(state.qpos, domain=aside)
        state = jax.jit(still.step)(state, jnp.zeros((8, 14)))
        poses = np.concatenate([state.qpos, np.tile(np.array([0.02, -0.01], np.float32), (8, 1))], axis=1)
        np.testing.assert_array_equal(state.obs, env.renderer.render(poses))  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="takes a domain with autoreset=False"):
            env.reset_from(state.qpos, domain=aside)


def test_in_late_episodes_the_commands_of_the_step_before_take_effect() -> None:
    """A world whose actions are late against one that is told them a step late."""
    late, prompt = (make("insertion", 2, reward="dense", delay_share=share) for share in (1.0, 0.0))
    one, other = jax.jit(late.reset_from)(STARTS[:2]), jax.jit(prompt.reset_from)(STARTS[:2])
    assert one.domain.late is not None
    assert one.domain.late.all()
    assert other.domain.late is None
    actions = np.random.default_rng(0).uniform(-0.2, 0.2, (3, 2, 14)) + HOME
    late_step, prompt_step = jax.jit(late.step), jax.jit(prompt.step)
    for action, before in zip(actions, [other.target, *actions[:-1]], strict=True):
        one, other = late_step(one, action), prompt_step(other, before)
        np.testing.assert_array_equal(one.qpos, other.qpos)
        np.testing.assert_allclose(one.target, action, atol=1e-6)  # what was commanded, not what the joints were told
    assert np.abs(one.qpos - STARTS[:2]).max() > 0.01


def into_the_next_episode(config: Config) -> tuple[Env, list[EnvState]]:
    """A training's worlds, as they begin, after a step, and after the second one, which ends the episodes."""
    env = make_from_config(dataclasses.replace(config, episode_length=2))
    step, states = jax.jit(env.step), [jax.jit(env.reset)(jax.random.key(0))]
    for _ in range(2):
        states.append(step(states[-1], jnp.zeros((config.n_envs, 14))))
    return env, states


def test_training_may_have_late_episodes_and_evaluation_never_has() -> None:
    config = Config(obs="state", n_envs=64, delay_share=0.25)
    _, states = into_the_next_episode(config)
    first, same, second = (np.asarray(state.domain.late) for state in states)
    np.testing.assert_array_equal(first, same)
    assert (first != second).any()
    assert 16 < first.sum() + second.sum() < 48
    evaluation = jax.eval_shape(make_from_config(config, autoreset=False).reset, jax.random.key(0))
    assert evaluation.domain.late is None


def test_objects_seem_off_for_an_episode_and_are_where_they_were() -> None:
    """What is seen of a misplaced object is what would be seen of one that lies there."""
    config = Config(obs="state", n_envs=64, pose_noise=0.004)
    env, states = into_the_next_episode(config)
    first, same, second = (np.asarray(state.domain.pose_error) for state in states)
    np.testing.assert_array_equal(first, same)
    assert (first != second).all()
    errors = np.concatenate([first, second])
    np.testing.assert_allclose(errors[..., :3].std(), 0.004, rtol=0.15)
    np.testing.assert_allclose(errors[..., 3:].std(), np.radians(4), rtol=0.15)

    state, features = states[0], jax.jit(env.task.features)
    true = features(state.physics, state.target, state.progress)
    placed = state.qpos
    for part, error, frame in ((SOCKET_QPOS, first[:, 0], 1.0), (PEG_QPOS, first[:, 1], np.array([-1.0, -1.0, 1.0]))):
        turn = Rotation.from_rotvec(error[:, 3:] * frame) * Rotation.from_quat(np.asarray(placed[:, part][:, [4, 5, 6, 3]]))
        pose = np.concatenate([placed[:, part][:, :3] + error[:, :3] * frame, turn.as_quat()[:, [3, 0, 1, 2]]], axis=1)
        placed = placed.at[:, part].set(pose)
    there = features(state.physics._replace(qpos=placed), state.target, state.progress)
    np.testing.assert_allclose(state.privileged, there, atol=1e-5)
    np.testing.assert_array_equal(state.obs, state.privileged)
    assert np.abs(state.privileged - true).max() > 0.01
    np.testing.assert_array_equal(states[2].final_obs, states[2].final_privileged)
    # An ended episode shows its own errors to the end, the next one others.
    position, centre = slice(33, 36), np.array([[0.0, 0.5, 0.0]])  # of the left arm's object, the socket, in its frame
    for obs, qpos, error in ((states[2].final_obs, states[2].final_qpos, first), (states[2].obs, states[2].qpos, second)):
        true_position = np.asarray(qpos[:, SOCKET_QPOS][:, :3]) - centre
        np.testing.assert_allclose(np.asarray(obs)[:, position] - true_position, error[:, 0, :3], atol=1e-5)

    evaluation = jax.eval_shape(make_from_config(config, autoreset=False).reset, jax.random.key(0))
    assert evaluation.domain.pose_error is None


def test_worlds_differ_in_training_and_never_in_evaluation() -> None:
    config = Config(obs="state", n_envs=2, friction_factor=2.0, mass_factor=2.0)
    starts, heights = np.repeat(STARTS[:1], 2, axis=0), []
    for autoreset in (True, False):
        env = make_from_config(config, autoreset=autoreset)
        state, step = jax.jit(env.reset_from)(starts), jax.jit(env.step)
        for _ in range(10):  # both objects fall 4 cm and lie
            state = step(state, jnp.zeros((2, 14)))
        heights.append(np.asarray(state.qpos[:, scene.SOCKET_QPOS][:, 2]))
    assert heights[0][0] != heights[0][1]
    assert heights[1][0] == heights[1][1] == heights[0][0]


def test_autoreset() -> None:
    """Three worlds whose clocks are staggered, against the same worlds without autoreset."""
    shared, plain = compiled("absolute", "sparse"), compiled("absolute", "sparse", autoreset=False)
    start = shared.reset(jax.random.key(0))
    start = start._replace(clock=jnp.array([296, 297, 298], jnp.int32))
    actions = np.random.default_rng(0).uniform(-0.2, 0.2, (4, NUM_ENVS, 14)) + HOME
    states, on = shared.run(start, actions), plain.run(start, actions)
    ends = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]], bool)  # when the clock reaches 300
    np.testing.assert_array_equal(states.truncated, ends)
    assert not states.terminated.any()
    np.testing.assert_array_equal(states.clock, [[297, 298, 299], [298, 299, 0], [299, 0, 1], [0, 1, 2]])
    np.testing.assert_array_equal(states.episode.length, [[1, 1, 1], [2, 2, 2], [3, 3, 1], [4, 1, 2]])
    assert len(np.unique(states.key[ends], axis=0)) == 3
    for world, t in enumerate([3, 2, 1]):
        # Up to its end a world is what it is without autoreset, and its end is in everything called `final`. The physics
        # are the same to the bit; what two programs compute from them may be rounded differently.
        assert_same(states.qpos[:t, world], on.qpos[:t, world])
        for name in ("obs", "privileged"):
            assert_close(getattr(states, name)[:t, world], getattr(on, name)[:t, world], atol=1e-6)
        for name in ("final_qpos", "reward", "level"):
            assert_same(getattr(states, name)[: t + 1, world], getattr(on, name)[: t + 1, world])
        for name in ("final_obs", "final_privileged"):
            assert_close(getattr(states, name)[: t + 1, world], getattr(on, name)[: t + 1, world], atol=1e-6)
        # The world that follows is a fresh one, as `reset_from` would make it.
        fresh = shared.reset_from(states.qpos[t])
        for name in ("physics", "target", "progress", "obs", "privileged"):
            got, wanted = (jax.tree.map(lambda x, world=world: x[world], getattr(x, name)) for x in (at(states, t), fresh))
            assert_close(got, wanted, atol=1e-6)
        everything_else = np.delete(states.qpos[t, world], [16, 17, 23, 24])
        np.testing.assert_array_equal(everything_else, np.delete(STARTS[0], [16, 17, 23, 24]))
        assert (states.privileged[t, world] != states.final_privileged[t, world]).any()
    # Where nothing has ended, `final` is the present.
    assert_same(states.final_qpos[~ends], states.qpos[~ends])
    for name in ("obs", "privileged"):
        assert_close(getattr(states, f"final_{name}")[~ends], getattr(states, name)[~ends], atol=1e-6)
    # Without autoreset an ended world goes on.
    assert on.truncated[:, 2].tolist() == [False, True, True, True]
    assert on.clock[:, 2].tolist() == [299, 300, 301, 302]
    assert on.episode.length[:, 2].tolist() == [1, 2, 3, 4]
    assert_close(on.obs, on.final_obs, atol=1e-6)
    assert_same(on.qpos, on.final_qpos)


def at(states: EnvState, t: int) -> EnvState:
    return jax.tree.map(lambda x: x[t], states)


def test_success_ends_the_episode() -> None:
    shared, start = scripted("sparse"), with_script([[1, 4, 2], [0, 0, 0], [3, 3, 4]])
    start = start._replace(clock=jnp.full(NUM_ENVS, 297, jnp.int32))
    states = shared.run(start, np.stack([HOLD] * 4))
    np.testing.assert_array_equal(states.level, [[1, 0, 3], [4, 0, 3], [1, 0, 4], [4, 0, 3]])  # the script starts over
    np.testing.assert_array_equal(states.terminated, [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(states.truncated, [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])  # not what succeeds in time
    np.testing.assert_array_equal(states.done, states.terminated | states.truncated)
    np.testing.assert_array_equal(states.episode.best_level, [[1, 0, 3], [4, 0, 3], [1, 0, 4], [4, 0, 3]])
    np.testing.assert_array_equal(states.episode.total_reward, [[1, 0, 3], [5, 0, 6], [1, 0, 10], [5, 0, 3]])
    np.testing.assert_array_equal(states.episode.length, [[1, 1, 1], [2, 2, 2], [1, 3, 3], [2, 1, 1]])
    np.testing.assert_array_equal(states.progress.best_level, [[1, 0, 3], [0, 0, 3], [1, 0, 0], [0, 0, 3]])


def test_an_expert_ends_a_real_episode() -> None:
    shared = compiled("absolute", "sparse")
    actions = np.stack([HOLD] * 250)
    actions[:, 0] = expert.plan_from_qpos(STARTS[0])[:250]
    states = shared.run(shared.reset_from(STARTS), actions)
    (end,) = np.flatnonzero(states.terminated[:, 0])
    assert 225 < end < 250
    assert states.level[end, 0] == states.reward[end, 0] == states.episode.best_level[end, 0] == 4
    assert states.episode.length[end, 0] == end + 1
    assert states.clock[end, 0] == 0
    peg_to_socket = states.final_qpos[end, 0, 16:19] - states.final_qpos[end, 0, 23:26]
    np.testing.assert_allclose(np.linalg.norm(peg_to_socket), expert.CONTACT_DISTANCE, atol=0.002)
    np.testing.assert_allclose(states.qpos[end, 0, [18, 25]], 0.05)  # the next episode's objects
    assert not states.done[:, 1:].any()


# --- Actions -------------------------------------------------------------------------------------------------------------------


def test_absolute_actions_reach_the_engine_untouched() -> None:
    shared = scripted("sparse")
    action = 3 * jax.random.normal(jax.random.key(1), (NUM_ENVS, 14))
    stepped = shared.step(with_script([]), action)
    assert_same(stepped.target, action)
    assert_same(stepped.physics.internal["action"], action)
    for wrong in (action[:1], action[:, :13], action[0]):
        with pytest.raises(ValueError, match=r"step wants actions of shape \(3, 14\)"):
            shared.env.step(stepped, wrong)


def test_a_real_step_is_the_engines() -> None:
    shared = compiled("absolute", "sparse")
    start, action = shared.reset(jax.random.key(0)), jnp.asarray(HOLD + 0.1)
    assert_same(shared.step(start, action).physics, shared.env.engine.step(start.physics, action))


def test_delta_actions_by_hand() -> None:
    low, high = target_limits(scripted("sparse").env.engine)
    home = jnp.asarray(HOME)[None]

    def moved(action: dict[int, float], target: jax.Array = home, pos: jax.Array = home) -> np.ndarray:
        actions = np.zeros((1, 14), np.float32)
        actions[0, list(action)] = list(action.values())
        return np.asarray(delta_target(target, pos, jnp.asarray(actions), low, high) - target)[0]

    np.testing.assert_allclose(moved({}), 0, atol=1e-7)
    # One unit is 0.04 rad, or 0.15 of the gripper's range; every joint on its own.
    expected = np.zeros(14)
    expected[[0, 8, 13]] = 0.04, -0.02, 0.15
    np.testing.assert_allclose(moved({0: 1.0, 8: -0.5, 13: 1.0}), expected, atol=1e-6)
    # The target may lead the measured waist by 0.25 rad, the forearm's roll by 1 rad, the wrist's angle by 0.5.
    np.testing.assert_allclose(moved({0: 100.0, 3: -100.0, 11: 100.0})[[0, 3, 11]], [0.25, -1.0, 0.5], atol=1e-6)
    # And follows when the joint is pushed away: 0.4 rad behind.
    np.testing.assert_allclose(moved({}, pos=home.at[0, 7].add(-0.4))[7], -0.15, atol=1e-6)
    # The gripper's control range is 0.021 m to 0.057 m (gym_aloha's 0 and 1 are 0.01844 m and 0.058 m).
    closed, opened = (0.021 - 0.01844) / (0.058 - 0.01844), (0.057 - 0.01844) / (0.058 - 0.01844)
    np.testing.assert_allclose(moved({6: -5.0, 13: 100.0})[[6, 13]], [closed - 0.1, opened - 0.1], atol=1e-6)
    # The waist's is +-3.14158 rad.
    far = home.at[0, 0].set(3.1)
    np.testing.assert_allclose(moved({0: 5.0}, target=far, pos=far)[0], 3.14158 - 3.1, atol=1e-6)


def test_control_limits_are_the_models() -> None:
    engine = scripted("sparse").env.engine
    low, high = target_limits(engine)
    model = engine.scene.model
    actuators = [i for i in range(16) if i not in (7, 15)]  # without the fingers that mirror the other
    for column, actuator in enumerate(actuators):
        bounds = model.actuator_ctrlrange[actuator]
        if column in (6, 13):
            bounds = normalize_puppet_gripper_position(bounds)
        np.testing.assert_allclose([low[column], high[column]], bounds, rtol=1e-5)
        joint = model.actuator_trnid[actuator, 0]
        assert model.joint(joint).qposadr[0] == actuator  # controls and joint positions come in the same order


def test_delta_actions_move_the_target_and_the_engine() -> None:
    shared, start = scripted("sparse", action="delta"), with_script([])
    np.testing.assert_allclose(start.target, HOLD, atol=2e-3)
    states = shared.run(start._replace(clock=jnp.array([0, 0, 298], jnp.int32)), np.full((2, NUM_ENVS, 14), 0.5))
    once = np.array(([0.02] * 6 + [0.075]) * 2)
    np.testing.assert_allclose(states.target[0] - start.target, np.tile(once, (NUM_ENVS, 1)), atol=1e-6)
    np.testing.assert_allclose(states.target[1] - start.target, once * np.array([[2], [2], [0]]), atol=1e-6)  # the last is fresh
    np.testing.assert_array_equal(states.physics.internal["action"][0], states.target[0])  # what the engine was given
    np.testing.assert_array_equal(states.physics.internal["action"][1, :2], states.target[1, :2])


# --- Rewards -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("sparse", [0, 1, 2, 1, 2, 3, 0, 3, 4, 0, 1]),
        # +1 % of the reward, and 0.1 where the level is higher than it ever was in this episode.
        ("shaped", [0, 1.01 + 0.1, 2.02 + 0.1, 1.01, 2.02, 3.03 + 0.1, 0, 3.03, 4.04 + 0.1, 0, 1.01 + 0.1]),
    ],
)
def test_sparse_and_shaped_rewards(reward: str, expected: list[float]) -> None:
    levels = [0, 1, 2, 1, 2, 3, 0, 3, 4]
    states = scripted(reward).run(with_script([levels]), np.stack([HOLD] * len(expected)))
    np.testing.assert_array_equal(states.level[:, 0], [*levels, 0, 1])
    np.testing.assert_allclose(states.reward[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(states.arm_reward[:, 0], np.array(expected)[:, None] / 2 * np.ones(2), atol=1e-6)
    totals = [*np.cumsum(expected[:9]), *np.cumsum(expected[9:])]
    np.testing.assert_allclose(states.episode.total_reward[:, 0], totals, rtol=1e-5)
    assert not states.reward[:, 1:].any()


@pytest.mark.parametrize("kind", ["absolute", "delta"])
def test_dense_reward_is_the_tasks(kind: str) -> None:
    """An absolute action costs what the change of target costs that it asks for."""
    shared, start = scripted("dense", kind), with_script([[0, 0, 1], [2, 3, 2], [0, 4, 0]])
    task, dense = shared.env.task, jax.jit(shared.env.task.dense)
    actions = np.random.default_rng(0).normal(size=(3, NUM_ENVS, 14)).astype(np.float32)
    states = shared.run(start, actions)
    before = np.concatenate([start.target[None], states.target[:2]])
    unit = np.array(([0.04] * 6 + [0.15]) * 2)
    changes = actions if kind == "delta" else ((actions - before) / unit).astype(np.float32)
    physics, progress = start.physics, start.progress
    for t, change in enumerate(changes[:2]):
        physics = shared.env.engine.step(physics, states.target[t])
        level = task.level(physics)
        assert level.tolist() == [[0, 2, 0], [0, 3, 4]][t]
        expected, progress = dense(physics, progress, level, jnp.zeros(NUM_ENVS, bool), jnp.asarray(change))
        np.testing.assert_allclose(states.arm_reward[t], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(states.reward[t], expected.sum(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states.terminated, [[0, 0, 0], [0, 0, 1], [0, 0, 0]])
    # Level 1 pays; what the dense reward remembers of the ended episode is gone.
    effort = 0.0005 * np.square(changes[2]).sum(axis=1)
    np.testing.assert_allclose(states.reward[2], [0.5, 0, 0] - 0.5 * effort, rtol=1e-5, atol=1e-5)


def posed(world: int, height: float) -> np.ndarray:
    """A start with the peg at another height."""
    qpos = STARTS[world].copy()
    qpos[18] = height
    return qpos


@pytest.mark.parametrize(("reward", "ends"), [("dense", True), ("sparse", False), ("shaped", False)])
def test_a_lost_object_ends_the_episode_under_the_dense_reward(reward: str, ends: bool) -> None:
    start = with_script([], {(0, 2): posed(0, -0.5)})
    states = scripted(reward).run(start, np.zeros((2, NUM_ENVS, 14)))
    np.testing.assert_array_equal(states.terminated, [[False] * 3, [ends, False, False]])
    assert not states.truncated.any()
    assert states.final_qpos[1, 0, 18] == -0.5
    if ends:  # minus all potential so far and minus one, per arm, halved
        np.testing.assert_allclose(states.arm_reward[1, 0], -0.5 * (states.progress.potential[0, 0] + 1), atol=1e-6)
        assert states.qpos[1, 0, 18] == pytest.approx(0.05)


# --- Physics that explode ------------------------------------------------------------------------------------------------------


def is_finite(state: EnvState) -> bool:
    arrays = (state.obs, state.privileged, state.final_obs, state.final_privileged, state.final_qpos, state.reward)
    more = (state.qpos, state.physics.qvel, state.target, state.progress, state.episode, state.arm_reward)
    return jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), (arrays, more)))


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_invalid_physics_end_the_episode(reward: str) -> None:
    start = with_script([[1, 4, 4], [1, 2, 3], [0, 0, 0]], {(0, 1): posed(0, 0.1), (0, 2): posed(0, np.nan)})
    states = scripted(reward).run(start, np.stack([HOLD] * 3))
    np.testing.assert_array_equal(states.invalid, [[0, 0, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(states.truncated, states.invalid)
    assert not states.terminated.any()  # an explosion is no success
    np.testing.assert_array_equal(states.level, [[1, 1, 0], [0, 2, 0], [1, 3, 0]])
    assert states.reward[1, 0] == 0
    assert states.episode.length[1, 0] == 2
    assert states.clock[1, 0] == 0
    assert is_finite(states)
    np.testing.assert_array_equal(states.final_qpos[1, 0], posed(0, 0.1))  # the last good state
    assert states.episode.length[2].tolist() == [1, 3, 3]


def test_without_autoreset_an_invalid_world_keeps_its_last_good_state() -> None:
    start = with_script([], {(0, 1): posed(0, 0.1), (0, 2): posed(0, np.nan)})
    states = scripted("sparse", autoreset=False).run(start, np.stack([HOLD] * 3))
    assert states.invalid[:, 0].tolist() == [False, True, True]
    assert is_finite(states)
    np.testing.assert_array_equal(states.qpos[:, 0], [posed(0, 0.1)] * 3)


def test_without_autoreset_an_action_that_is_no_number_leaves_no_trace() -> None:
    env = compiled("delta", "dense", autoreset=False)
    still = jnp.zeros((NUM_ENVS, 14))
    state = env.step(env.reset(jax.random.key(0)), still)
    after = env.step(state, still.at[1, 6].set(jnp.nan))
    assert after.invalid.tolist() == [False, True, False]
    assert_same(jax.tree.map(lambda x: x[1], after.progress), jax.tree.map(lambda x: x[1], state.progress))
    assert is_finite(after)
    assert is_finite(env.step(after, still))


@pytest.mark.parametrize("cause", ["velocity", "action"])
def test_an_exploding_world_of_the_real_engine_is_reset(cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    shared = compiled("delta", "dense")
    still = jnp.zeros((NUM_ENVS, 14))
    state = shared.step(shared.reset(jax.random.key(0)), still)
    healthy = shared.step(rewound(state), still)
    internal, action = np.array(state.physics.internal).view(np.float64), still
    if cause == "velocity":
        internal[1, 35] = 1e12
    else:
        action = still.at[1, 5].set(jnp.nan)
    broken = state.physics._replace(internal=jnp.asarray(internal.view(np.uint32)))
    after = shared.step(rewound(state)._replace(physics=broken), action)
    assert after.invalid.tolist() == after.truncated.tolist() == [False, True, False]
    assert is_finite(after)
    assert after.reward[1] == 0
    assert after.clock.tolist() == [2, 0, 2]
    assert_same(after.final_qpos[1], state.qpos[1])
    for name in ("qpos", "obs", "reward", "target"):
        assert_same(np.asarray(getattr(after, name))[[0, 2]], np.asarray(getattr(healthy, name))[[0, 2]])
    assert is_finite(shared.step(after, still))


# --- Pictures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obs", ["pixels", "pixels_agent_pos"])
def test_pictures_are_of_the_worlds_they_belong_to(obs: str) -> None:
    crop = (168, 208, 224, 224) if obs == "pixels" else None
    env = make("insertion", NUM_ENVS, obs=obs, image_height=12, image_width=20, crop=crop, renderer="egl")
    assert env.renderer is not None
    with env.renderer:
        shared = Compiled(env)
        start = shared.reset(jax.random.key(0))._replace(clock=jnp.array([0, 299, 0], jnp.int32))
        swing = HOLD.copy()
        swing[:, [0, 7]] += 0.5
        stepped = shared.step(start, jnp.asarray(swing))
        assert stepped.done.tolist() == [False, True, False]
        assert signature(stepped) == signature(start)
        pictures = []
        for observation, qpos in ((start.obs, start.qpos), (stepped.obs, stepped.qpos), (stepped.final_obs, stepped.final_qpos)):
            if isinstance(observation, dict):
                assert set(observation) == {"pixels", "agent_pos"}
                np.testing.assert_array_equal(observation["agent_pos"][:, :6], qpos[:, :6])
                np.testing.assert_array_equal(observation["agent_pos"][:, 7:13], qpos[:, 8:14])
            pictures.append(np.asarray(observation["pixels"] if isinstance(observation, dict) else observation))
            assert pictures[-1].shape == (NUM_ENVS, 12, 20, 3)
            assert pictures[-1].dtype == np.uint8
            np.testing.assert_array_equal(pictures[-1], env.renderer.render(np.asarray(qpos)))
    before, now, final = pictures
    assert (now != final).any(axis=(1, 2, 3)).tolist() == [False, True, False]  # one world shows its next episode
    assert (before != final).any(axis=(1, 2, 3)).all()
    assert stepped.privileged.shape == (NUM_ENVS, 142)


# --- Mistakes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"obs": "pixel"}, "obs is one of pixels, pixels_agent_pos, state; not 'pixel'"),
        ({"action": "relative"}, "action is one of delta, absolute"),
        ({"reward": "rich"}, "reward is one of dense, shaped, sparse"),
        ({"engine": "bullet"}, "engine is "),
        ({"impl": "numpy"}, "impl is one of auto, jax, warp"),
        ({"physics": "quick"}, "physics is one of fast, exact"),
        ({"physics": "reduced"}, "physics is one of fast, exact"),  # a scene's name, of mjx's `jax` only
        ({"num_envs": 0}, "num_envs lies in 1..2147483647, not 0"),
        ({"renderer": "povray"}, "renderer is one of auto, egl, warp"),
        ({"obs": "pixels", "crop": (0, 0, 481, 640)}, "crop"),
        ({"render_quality": "best"}, "render_quality is one of"),
        ({"task": "juggling"}, "task is "),
        ({"obs": "pixels", "image_height": 0}, "image_height"),
        ({"episode_length": 0}, "episode_length"),
        ({"camera_shift": float("nan")}, "camera_shift lies in 0"),
        ({"delay_share": 1.1}, "delay_share lies in 0..1, not 1.1"),
        ({"friction_factor": 0.5}, "friction_factor lies in 1..4, not 0.5"),
        ({"friction_factor": 2.0, "engine": object()}, "for an engine that is made here"),
        ({"mass_factor": 5.0}, "mass_factor lies in 1..4, not 5.0"),
        ({"start_share": 7.0}, "start_share lies in 0..1, not 7"),
        ({"obs": "pixels", "history": (4, 0)}, "history lies in 1..300, not 0"),
        ({"pose_noise": -0.001}, "pose_noise lies in 0..0.05, not -0.001"),
        ({"obs": "pixels", "pose_noise": 0.002}, "pose_noise needs state"),
        ({"obs": "state", "history": (4,)}, "history needs pixels"),
        ({"obs": "state", "observe_target": True}, "observe_target needs pixels"),
        ({"obs": "state", "camera_shift": 0.01}, "camera_shift needs pixels"),
        ({"start_range": StartRange(shift=0.3)}, "start_range.shift lies in 0..0.035, not 0.3"),
        ({"num_envs": 2.5}, "num_envs is a whole number, not 2.5"),
        ({"num_envs": "4"}, "num_envs is a whole number, not '4'"),
        ({"episode_length": 100.0}, "episode_length is a whole number"),
        ({"obs": "pixels", "image_width": 32.5}, "image_width is a whole number"),
        ({"obs": "pixels", "history": (4.5,)}, "history is a whole number"),
        ({"obs": "pixels", "crop": (0, 0, 480)}, "crop is .top, left, height, width."),
        ({"seed": -1}, "seed lies in 0..4294967295, not -1"),
        ({"reward": "dense", "shaping": Shaping(grip_tolerance=0.0)}, "shaping.grip_tolerance is finite and above 0, not 0.0"),
        ({"reward": "dense", "shaping": Shaping(action_cost=-0.1)}, "shaping.action_cost is finite and at least 0"),
        ({"reward": "dense", "shaping": {"action_cost": 0.1}}, "shaping is a Shaping"),
        ({"start_range": (0.1, 0.0)}, "start_range is a StartRange"),
        ({"obs": "pixels", "history": 4}, "history is a Sequence, not 4"),
        ({"obs": "pixels", "crop": 5}, "crop is .top, left, height, width., not 5"),
        ({"obs": None}, "obs is one of"),
        ({"engine": None}, "engine is one of"),
        ({"obs": "pixels", "renderer": None}, "renderer is one of"),
    ],
)
def test_make_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"task": "insertion", **arguments})


def test_double_precision_is_refused() -> None:
    with jax.enable_x64(True), pytest.raises(ConfigError, match="single precision: unset JAX_ENABLE_X64"):
        make("insertion")
