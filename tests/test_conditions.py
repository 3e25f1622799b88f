"""Changed worlds: what each condition changes, and that it reaches gym_aloha."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gym_aloha  # noqa: F401  (registers the environment)
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE

from aloha_jax import checkpoints, evaluation, judge, trials
from aloha_jax.conditions import NOMINAL, Condition, OurWorlds
from aloha_jax.config import ConfigError
from aloha_jax.policy import Policy, init_params, init_stats
from aloha_jax.presets import PRESETS
from aloha_jax.tasks.insertion import Insertion
from benchmarks import robustness

ROBUST = Path(__file__).parents[1] / "pretrained" / "insertion-state-robust"
STATE = dataclasses.replace(PRESETS["smoke"], obs="state", hidden_sizes=(16,))


@pytest.fixture(scope="module")
def physics() -> Any:
    return gymnasium.make("gym_aloha/AlohaInsertion-v0", disable_env_checker=True).unwrapped._env.physics  # type: ignore[attr-defined]


def test_the_default_changes_nothing(physics: Any) -> None:
    before = [np.array(x) for x in (physics.model.geom_friction, physics.model.body_mass, physics.model.cam_pos)]
    NOMINAL.change_model(physics)
    for old, new in zip(before, (physics.model.geom_friction, physics.model.body_mass, physics.model.cam_pos), strict=True):
        np.testing.assert_array_equal(new, old)
    qpos = Insertion.start_from_seed(3)
    np.testing.assert_allclose(NOMINAL.start(qpos, 3), qpos)
    frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert NOMINAL.light(frame) is frame


def test_the_model_changes_by_the_factors(physics: Any) -> None:
    model = physics.model
    friction, mass, camera = (np.array(x) for x in (model.geom_friction, model.body_mass, model.cam_pos))
    Condition(friction=2.0, mass=0.5, camera_shift=(0.01, -0.02)).change_model(physics)
    np.testing.assert_allclose(model.geom_friction, 2 * friction)
    changed = np.flatnonzero(model.body_mass != mass)
    assert {model.id2name(i, "body") for i in changed} == {"peg", "socket"}
    np.testing.assert_allclose(model.body_mass[changed], 0.5 * mass[changed])
    top = model.name2id("top", "camera")
    np.testing.assert_allclose(model.cam_pos[top] - camera[top], [0.01, -0.02, 0])


def test_starts_stay_within_their_bounds_and_follow_the_seed() -> None:
    condition, qpos = Condition(yaw=0.5, shift=0.03), Insertion.start_from_seed(0)
    starts = np.stack([condition.start(qpos, seed) for seed in range(300)])
    np.testing.assert_array_equal(starts[:, :16], np.tile(START_ARM_POSE, (300, 1)))
    for part in (slice(16, 23), slice(23, 30)):
        moved = starts[:, part][:, :2] - qpos[part][:2]
        assert np.abs(moved).max() <= 0.03
        assert np.abs(moved).max() > 0.028
        yaw = 2 * np.arctan2(starts[:, part][:, 6], starts[:, part][:, 3])
        assert np.abs(yaw).max() <= 0.5
        assert yaw.min() < -0.45 < 0.45 < yaw.max()
    np.testing.assert_array_equal(condition.start(qpos, 7), starts[7])


@pytest.mark.parametrize(("brightness", "expected"), [(0.5, [0, 50, 127]), (1.2, [0, 120, 255])])
def test_light(brightness: float, expected: list[int]) -> None:
    frame = np.array([[[0, 100, 255]]], np.uint8)
    np.testing.assert_array_equal(Condition(brightness=brightness).light(frame), [[expected]])


def test_our_worlds_are_lit_one_by_one() -> None:
    conditions = [Condition(brightness=0.8), NOMINAL, Condition(brightness=1.2)]
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    expected = np.stack([condition.light(frame) for condition, frame in zip(conditions, frames, strict=True)])
    light = OurWorlds(conditions).light(conditions)
    lit = trials.lit({"pixels": jnp.asarray(frames), "agent_pos": jnp.zeros((3, 14))}, light)
    np.testing.assert_allclose(lit["pixels"].astype(int), expected.astype(int), atol=1)  # products are cut off in float32, or 64
    np.testing.assert_array_equal(lit["pixels"][1], frames[1])
    assert OurWorlds([NOMINAL, Condition(mass=2.0)]).light([NOMINAL]) is None


def test_late_actions_and_other_starts_reach_gym_aloha() -> None:
    policy = Policy(STATE, jax.tree.map(lambda x: 3.0 * x, init_params(STATE, jax.random.key(0))), init_stats(STATE))  # it moves
    condition = Condition(shift=0.03)
    moved, late, nominal = judge.gym_aloha_episodes(policy, [5], conditions=[condition, Condition(delay=2), NOMINAL])
    np.testing.assert_allclose(late.targets[0], late.targets[1])  # the start pose is held
    np.testing.assert_allclose(late.targets[2], nominal.targets[0], atol=1e-6)  # nothing had moved when it was chosen
    assert np.abs(nominal.targets[1] - nominal.targets[0]).max() > 1e-3
    start = condition.start(Insertion.start_from_seed(5), 5)
    np.testing.assert_allclose(moved.qpos[0][:16], nominal.qpos[0][:16], atol=1e-3)
    np.testing.assert_allclose(moved.qpos[0][[16, 17, 23, 24]], start[[16, 17, 23, 24]], atol=1e-3)  # falling, not sliding


def test_our_engine_bears_the_same_conditions() -> None:
    """Turned objects, on ice, where what is held slips, late actions, and objects that seem off: in C MuJoCo as in gym_aloha."""
    policy = checkpoints.load_policy(str(ROBUST))
    policy = Policy(dataclasses.replace(policy.config, physics="exact"), policy.params, policy.stats)
    conditions = [Condition(yaw=0.5), Condition(yaw=0.5, friction=0.1), Condition(delay=1), Condition(yaw=0.5, pose_noise=0.004)]
    ours = list(trials.engine_episodes(policy, "c", [5], conditions=conditions))  # side by side
    theirs = list(judge.gym_aloha_episodes(policy, [5], conditions=conditions))
    for one, same in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.qpos[:20], same.qpos[:20], atol=1e-3)  # until it touches: then small differences grow
        assert one.levels.max() == same.levels.max()
    assert [trajectory.levels.max() == 4 for trajectory in ours[:2]] == [True, False]
    for other in ours[2:]:
        assert np.abs(other.qpos[:20] - ours[0].qpos[:20]).max() > 0.02
    np.testing.assert_allclose(ours[3].qpos[0, 16:], ours[0].qpos[0, 16:], atol=1e-5)  # they are where they were


def test_what_our_engines_cannot_differ_in_is_refused() -> None:
    policy = checkpoints.load_policy(str(ROBUST))
    for simulator, condition in (("c", Condition(delay=2)), ("mjx", Condition(yaw=0.1)), ("mjx", Condition(brightness=0.8))):
        with pytest.raises(ValueError, match=rf"{condition.yaw}.* is for --sim "):
            next(trials.engine_episodes(policy, simulator, [5], conditions=[condition]))


def test_a_simulation_that_diverges_ends_its_episode_and_no_more() -> None:
    """A policy of NaN, which dm_control's physics refuses to step on."""
    policy = Policy(STATE, jax.tree.map(lambda x: x * np.nan, init_params(STATE, jax.random.key(0))), init_stats(STATE))
    episodes = list(judge.gym_aloha_episodes(policy, [5, 6]))
    report = evaluation.summarize(episodes, "gym_aloha")
    assert [list(episode.levels) for episode in episodes] == [[0], [0]]
    assert report.success_rate == 0
    assert np.isfinite([report.mean_jerk, *episodes[0].qpos[0], *episodes[0].targets[0]]).all()


def test_a_film_shows_the_condition() -> None:
    """The last frame of a policy that sees only the state: dark under little light, and from where the camera was put."""
    policy = checkpoints.load_policy(str(ROBUST))  # inserts within 50 steps, which are as many frames

    conditions = [Condition(brightness=0.5, camera_shift=(0.02, 0.0)), NOMINAL]  # the second knows nothing of the first
    changed, usual = (
        trajectory.frames[-1].astype(int)
        for trajectory in judge.gym_aloha_episodes(policy, [5], keep_frames=1, conditions=conditions)
        if trajectory.frames is not None
    )
    dark = usual // 2
    assert abs(changed.mean() / dark.mean() - 1) < 0.05
    # The camera hangs 0.8 m high and sees 78 degrees in 480 pixels: 2 cm of the table are 7 of them, of the arms above it more.
    errors = [np.abs(np.roll(dark, -shift, axis=1) - changed).mean() for shift in range(15)]
    assert 6 <= np.argmin(errors) <= 13


@pytest.mark.slow
def test_robustness_films_what_it_tries(tmp_path: Path) -> None:
    films, figures = tmp_path / "films", tmp_path / "figures.json"
    only = ("30 degrees", "late")
    robustness.main(robustness.Flags(model_path=str(ROBUST), only=only, n_episodes=1, videos=films, json=figures))
    assert {path.name for path in films.iterdir()} == {"start-yaw-up-to-30-degrees.mp4", "actions-one-step-late.mp4"}
    assert list(json.loads(figures.read_text())["conditions"]) == ["start: yaw up to 30 degrees", "actions one step late"]


def test_robustness_tries_what_it_is_asked_to() -> None:
    def names(has_pixels: bool, *only: str) -> list[str]:
        return list(robustness.conditions(robustness.Flags(model_path="m", only=only), has_pixels))

    # Who sees no picture does not notice its changes, and who sees one not what the state would say.
    assert set(names(True)) - set(names(False)) == set(robustness.VISUAL_CONDITIONS)
    assert set(names(False)) - set(names(True)) == set(robustness.STATE_CONDITIONS)
    assert names(True, "brightness", "as it is") == ["as it is", "brightness x 0.8", "brightness x 1.2"]
    assert all("friction" in name for name in names(False, "friction"))
    assert all(condition.is_ours for condition in robustness.conditions(robustness.Flags(model_path="m"), True).values())
    with pytest.raises(ConfigError, match="--num-workers is for --sim gym_aloha; c runs its episodes as one batch"):
        robustness.main(robustness.Flags(model_path=str(ROBUST), sim="c", num_workers=2))
    with pytest.raises(ConfigError, match="--only camera: occurs in none of as it is; "):
        names(False, "camera")
    with pytest.raises(ConfigError, match=r"--n-episodes must lie in 1\.\.100000, got 0"):
        robustness.main(robustness.Flags(model_path=str(ROBUST), n_episodes=0))
