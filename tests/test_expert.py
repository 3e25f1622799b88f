"""The expert solves gym_aloha's own task, in gym_aloha's own simulation, judged by gym_aloha's own reward."""

import dataclasses

import numpy as np
import pytest
from dm_control import mujoco
from dm_control.rl import control
from gym_aloha.constants import DT, START_ARM_POSE, unnormalize_puppet_gripper_position
from gym_aloha.tasks import sim
from gym_aloha.utils import sample_insertion_pose

from aloha_jax import expert, scene
from benchmarks.fidelity import BlindInsertion

SEEDS = range(40)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a replay came to; `tilt` and `offset` are those of its last step."""

    level: int  # highest official reward
    tilt: float  # degrees between the axes of peg and socket
    offset: float  # metres from the peg's tip to the socket's axis


@pytest.fixture(scope="module")
def simulation() -> control.Environment:
    physics = mujoco.Physics.from_xml_path(str(scene.ASSETS / "bimanual_viperx_insertion.xml"))
    return control.Environment(physics, BlindInsertion(), time_limit=float("inf"), control_timestep=DT)


def start_qpos(seed: int) -> np.ndarray:
    return np.concatenate([START_ARM_POSE, *sample_insertion_pose(seed)])


def with_yaw(qpos: np.ndarray, yaw: float) -> np.ndarray:
    """The same positions with peg and socket turned about the vertical, in opposite directions."""
    turned = qpos.copy()
    turned[scene.PEG_QPOS][3:] = np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
    turned[scene.SOCKET_QPOS][3:] = np.cos(yaw / 2), 0, 0, -np.sin(yaw / 2)
    return turned


def replay(simulation: control.Environment, qpos: np.ndarray, actions: np.ndarray) -> Outcome:
    """Play actions [T, 14] from joint positions [30] until level 4, as gym_aloha does."""
    sim.BOX_POSE[0] = qpos[scene.PEG_QPOS.start :]
    simulation.reset()
    with simulation.physics.reset_context():
        simulation.physics.data.qpos[:] = qpos
        simulation.physics.data.ctrl[:] = qpos[: simulation.physics.model.nu]
    levels = []
    for action in actions:
        levels.append(simulation.step(action).reward)
        if levels[-1] == 4:
            break
    named = simulation.physics.named.data
    peg, socket = (named.xmat[name].reshape(3, 3)[:, 0] for name in ("peg", "socket"))
    tip = named.xpos["peg"] - scene.HALF_LENGTH * peg - named.xpos["socket"]
    tilt = np.degrees(np.arctan2(np.linalg.norm(np.cross(peg, socket)), peg @ socket))
    return Outcome(max(levels), float(tilt), float(np.linalg.norm(tip - (tip @ socket) * socket)))


def test_inserts_cleanly_from_gym_alohas_starts(simulation: control.Environment) -> None:
    outcomes = {seed: replay(simulation, start_qpos(seed), expert.plan(*sample_insertion_pose(seed))) for seed in SEEDS}
    unclean = {seed: o for seed, o in outcomes.items() if not (o.level == 4 and o.tilt < 3 and o.offset < 0.005)}
    assert not unclean


def test_plan_of_another_start_fails(simulation: control.Environment) -> None:
    assert replay(simulation, start_qpos(1), expert.plan(*sample_insertion_pose(0))).level < 4


@pytest.mark.parametrize(
    "variation",
    [
        expert.Variation(pitch=np.radians(75)),
        expert.Variation(grip_offset=0.015, grip_height=0.008),
        expert.Variation(grip_offset=0.045),
        expert.Variation(meeting=(-0.05, 0.45, 0.2)),
        expert.Variation(speed=0.8),
        expert.Variation(speed=2.0),
    ],
)
def test_variations_succeed(simulation: control.Environment, variation: expert.Variation) -> None:
    for seed in (100, 101):
        actions = expert.plan(*sample_insertion_pose(seed), variation=variation)
        assert not np.array_equal(actions, expert.plan(*sample_insertion_pose(seed)))
        assert replay(simulation, start_qpos(seed), actions).level == 4


@pytest.mark.parametrize("miss", [(0.015, 0.0), (0.0, 0.015), (0.0, -0.015)])
def test_a_miss_ends_beside_the_mouth(simulation: control.Environment, miss: tuple[float, float]) -> None:
    """The peg meets the socket (level 3) but not the pin, as far off its axis as was asked, give or take what the grip yields."""
    outcome = replay(simulation, start_qpos(100), expert.plan(*sample_insertion_pose(100), variation=expert.Variation(miss=miss)))
    assert outcome.level == 3
    assert 0.008 < outcome.offset < 0.022


@pytest.mark.parametrize("yaw", [-0.4, 0.4])
def test_follows_the_yaw_of_the_objects(simulation: control.Environment, yaw: float) -> None:
    qpos = with_yaw(start_qpos(0), yaw)
    assert replay(simulation, qpos, expert.plan_from_qpos(qpos)).level == 4


def test_plan_from_qpos_starts_from_the_given_joints(simulation: control.Environment) -> None:
    qpos = start_qpos(2)
    assert np.array_equal(expert.plan_from_qpos(qpos), expert.plan(*sample_insertion_pose(2)))
    qpos[[0, 1, 9, 13]] += 0.3
    actions = expert.plan_from_qpos(qpos)
    np.testing.assert_allclose(actions[0, :6], qpos[scene.ARM_QPOS["left"]], atol=0.01)
    np.testing.assert_allclose(actions[0, 7:13], qpos[scene.ARM_QPOS["right"]], atol=0.01)
    assert replay(simulation, qpos, actions).level == 4


def test_actions_are_smooth_and_within_the_control_range() -> None:
    model = scene.make_scene(physics="exact").model
    for seed in range(5):
        actions = expert.plan(*sample_insertion_pose(seed))
        assert actions.shape == (expert.EPISODE_STEPS, 14)
        assert actions.dtype == np.float32
        left, right = unnormalize_puppet_gripper_position(actions[:, [6, 13]]).T
        arms = actions[:, :6], actions[:, 7:13]
        controls = np.column_stack([arms[0], left, -left, arms[1], right, -right])
        assert (controls >= model.actuator_ctrlrange[:, 0]).all()
        assert (controls <= model.actuator_ctrlrange[:, 1]).all()
        start = np.delete(START_ARM_POSE, [6, 7, 14, 15])
        jumps = np.diff(np.concatenate([start[None], np.hstack(arms)]), axis=0)
        assert np.abs(jumps).max() < 0.06  # radians per step; 3 rad/s


def test_is_deterministic_and_depends_on_both_objects() -> None:
    peg, socket = sample_insertion_pose(0)
    other_peg, other_socket = sample_insertion_pose(1)
    actions = expert.plan(peg, socket)
    assert np.array_equal(actions, expert.plan(peg, socket))
    moved_peg, moved_socket = expert.plan(other_peg, socket), expert.plan(peg, other_socket)
    assert np.array_equal(moved_peg[:, :7], actions[:, :7])
    assert not np.allclose(moved_peg[:, 7:], actions[:, 7:])
    assert not np.allclose(moved_socket[:, :7], actions[:, :7])
    assert np.array_equal(moved_socket[:, 7:], actions[:, 7:])


def test_inverse_kinematics_inverts_forward_kinematics() -> None:
    rng = np.random.default_rng(0)
    for arm in scene.ARMS:
        kinematics = expert.ArmKinematics(arm)
        for _ in range(20):
            joints = np.array([0.0, -0.5, 0.8, 0.0, 0.7, 0.0]) + rng.uniform(-0.3, 0.3, 6)
            position, rotation = kinematics.forward(joints)
            solution = kinematics.inverse(position, rotation, joints + rng.uniform(-0.2, 0.2, 6))
            for reached, wanted in zip(kinematics.forward(solution), (position, rotation), strict=True):
                np.testing.assert_allclose(reached, wanted, atol=1e-4)


def test_inverse_kinematics_stays_within_the_control_range() -> None:
    kinematics = expert.ArmKinematics("left")
    allowed = np.array([0.0, -0.5, 0.8, 0.0, 2.2, 0.0])  # the wrist's range ends at 2.234
    kinematics.inverse(*kinematics.forward(allowed), guess=allowed - 0.1)
    beyond = allowed + np.array([0, 0, 0, 0, 0.2, 0])
    with pytest.raises(ValueError, match="cannot hold its fingertips at"):
        kinematics.inverse(*kinematics.forward(beyond), guess=allowed)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="cannot hold its fingertips at"):
        expert.plan(*sample_insertion_pose(0), variation=expert.Variation(meeting=(0.0, 0.5, 1.5)))
    for speed in (-1.0, 0.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="speed is within"):
            expert.Variation(speed=speed)


def test_dimensions_are_those_of_the_mjcf() -> None:
    model = scene.make_scene(physics="exact").model
    peg, pin, floor = (model.geom(name) for name in ("red_peg", "pin", "socket-1"))
    assert scene.HALF_WIDTH[1] == pytest.approx(peg.size[2])
    assert scene.HALF_WIDTH[0] == pytest.approx(floor.size[2] - floor.pos[2])
    assert scene.HALF_LENGTH == pytest.approx(peg.size[0]) == pytest.approx(floor.size[0])
    assert pytest.approx(peg.size[0] + pin.size[0]) == expert.CONTACT_DISTANCE
