"""The judge: counts by hand, known intervals, gym_aloha's own physics, and `eval.py` as a stranger would use it."""

import concurrent.futures
import dataclasses
import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, cast

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE, normalize_puppet_gripper_position
from gym_aloha.utils import sample_insertion_pose

import eval as eval_command
from aloha_jax import checkpoints, evaluation, expert, judge, scene, trials
from aloha_jax.actions import DELTA_SCALE
from aloha_jax.conditions import NOMINAL, Condition
from aloha_jax.config import Config
from aloha_jax.evaluation import evaluate, summarize, wilson_interval
from aloha_jax.factory import make_from_config
from aloha_jax.judge import Trajectory
from aloha_jax.pixels import RendererUnavailable, make_renderer
from aloha_jax.policy import Policy, init_params, init_stats
from aloha_jax.presets import PRESETS
from aloha_jax.tasks.insertion import Insertion
from tests.small_run import STATE, small_run

ROOT = Path(__file__).parents[1]
PRETRAINED = ROOT / "pretrained"
SMALL = dataclasses.replace(PRESETS["smoke"], obs="state", episode_length=15)

# --- Counting


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # R's prop.test(x, n, correct = FALSE)$conf.int, to four places
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (15, 50, 0.1910, 0.4375),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
    ],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


def trajectory(seed: int, levels: list[int]) -> Trajectory:
    qpos = Insertion.start_from_seed(seed)
    return Trajectory(seed, np.array(levels), np.tile(qpos, (len(levels), 1)), np.zeros((len(levels), 14)))


def test_a_report_by_hand() -> None:
    report = summarize([trajectory(7, [0, 1, 2, 4]), trajectory(8, [0, 0, 1, 0, 3]), trajectory(9, [0, 0, 0])], "c")
    assert report.simulator == "c"
    assert report.n_episodes == 3
    assert report.success_rate == pytest.approx(1 / 3)
    assert report.success_interval == wilson_interval(1, 3)
    assert report.mean_return == report.mean_reward == pytest.approx((7 + 4 + 0) / 3)
    assert report.mean_max_reward == pytest.approx((4 + 3 + 0) / 3)
    assert report.mean_length == 4.0
    assert report.level_rates == pytest.approx({"1": 2 / 3, "2": 2 / 3, "3": 2 / 3, "4": 1 / 3})
    assert report.clean_rate == 0.0  # peg and socket are where they started
    assert report.mean_jerk == 0.0
    first = report.episodes[0]
    insertion = {name: first.pop(name) for name in ("clean", "tilt", "depth", "penetration")}
    assert insertion["clean"] is False
    assert insertion["tilt"] == insertion["penetration"] == 0.0
    assert insertion["depth"] < 0
    assert report.episodes == [
        {"seed": 7, "return": 7, "max_level": 4, "levels": {"1": 2, "2": 3, "3": 4, "4": 4}, "length": 4},
        {"seed": 8, "return": 4, "max_level": 3, "levels": {"1": 3, "2": 5, "3": 5}, "length": 5},
        {"seed": 9, "return": 0, "max_level": 0, "levels": {}, "length": 3},
    ]


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    summarize([trajectory(0, [4])], "c").write(path)
    before = path.read_text()
    assert json.loads(before)["success_rate"] == 1.0
    monkeypatch.setattr(evaluation.Report, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summarize([trajectory(0, [0])], "c").write(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


# --- In our engine


@pytest.fixture(scope="module")
def policy() -> Policy:
    """One that moves: its mean action would be all but zero as it is initialised."""
    params = init_params(SMALL, jax.random.key(0))
    return Policy(SMALL, jax.tree.map(lambda x: 3.0 * x, params), init_stats(SMALL))


def rollouts_of(policy: Any, simulator: str, n: int, seed: int, **options: Any) -> list[Trajectory]:
    trajectories: list[Trajectory] = []
    report = evaluate(policy, simulator, n, seed, on_episode=trajectories.append, **options)
    assert report.episodes == summarize(trajectories, simulator).episodes
    assert [r.seed for r in trajectories] == list(range(seed, seed + n))
    return trajectories


@pytest.fixture(scope="module")
def several(policy: Policy) -> list[Trajectory]:
    return rollouts_of(policy, "c", 3, seed=5)


def test_the_same_seed_gives_the_same_episode_alone_or_among_others(policy: Policy, several: list[Trajectory]) -> None:
    alone, again = rollouts_of(policy, "c", 1, seed=6), rollouts_of(policy, "c", 3, seed=5)
    for a, b in zip(several, again, strict=True):
        np.testing.assert_array_equal(a.qpos, b.qpos)
        np.testing.assert_array_equal(a.levels, b.levels)
    # Not to the bit: a matrix product may sum in another order for another batch.
    np.testing.assert_allclose(several[1].qpos, alone[0].qpos, atol=1e-4)
    assert np.abs(several[0].qpos - several[1].qpos).max() > 1e-2


def test_many_episodes_are_run_in_batches_of_one_program(policy: Policy, several: list[Trajectory], monkeypatch: Any) -> None:
    """Two at a time, the second time with one to spare."""
    evaluators: list[Any] = []

    class Counted(trials.EngineEvaluator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            evaluators.append(self)

    monkeypatch.setattr(trials, "EngineEvaluator", Counted)
    monkeypatch.setattr(trials, "AT_ONCE", 2)
    for a, b in zip(several, rollouts_of(policy, "c", 3, seed=5), strict=True):
        np.testing.assert_allclose(a.qpos, b.qpos, atol=1e-4)
    [evaluator] = evaluators
    assert evaluator._begin._cache_size() == evaluator._run._cache_size() == 1


def test_where_one_episode_has_ended_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is what it would be by itself, under its own condition; they come in the order in which they were asked for."""
    policy = checkpoints.load_policy(str(PRETRAINED / "insertion-state"))
    traced, run = [], trials._run

    def noted(*args: Any) -> Any:
        traced.append(args[2])
        return run(*args)

    monkeypatch.setattr(trials, "_run", noted)
    monkeypatch.setattr(trials, "AT_ONCE", 2)
    ice, late = Condition(friction=0.1), Condition(delay=1)  # on ice nothing is held, and an episode takes its 300 steps
    together = list(trials.engine_episodes(policy, "c", [3, 4], True, [ice, NOMINAL, late]))
    assert len(traced) == 1
    assert [trajectory.seed for trajectory in together] == [3, 4] * 3
    assert [int(trajectory.levels.max()) == 4 for trajectory in together[:4]] == [False, False, True, True]
    assert [len(trajectory.levels) == 300 for trajectory in together[:4]] == [True, True, False, False]
    [alone] = trials.engine_episodes(policy, "c", [4], True, [late])
    np.testing.assert_allclose(together[5].qpos[:30], alone.qpos[:30], atol=1e-3)  # until it touches: then small differences grow
    np.testing.assert_allclose(together[5].targets[:30], alone.targets[:30], atol=1e-3)


def test_an_evaluation_can_be_abandoned_after_a_few_steps(policy: Policy) -> None:
    evaluator, asked = trials.EngineEvaluator(SMALL, make_from_config(SMALL, 1, autoreset=False)), 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    with pytest.raises(trials.Abandoned):
        list(evaluator(policy, [trials.Trial(5)], interrupted=interrupted))
    assert asked == 2  # not once more after it was told
    [outcome] = evaluator(policy, [trials.Trial(5)])
    assert len(outcome.trajectory.levels) == SMALL.episode_length


def test_an_evaluation_ends_with_its_last_episode() -> None:
    """Not with the time that they all had; `state` inserts in some 60 of 300 steps."""
    policy, asked = checkpoints.load_policy(str(PRETRAINED / "insertion-state")), 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return False

    config = dataclasses.replace(policy.config, episode_length=300)
    evaluator: Any = trials.EngineEvaluator(config, make_from_config(config, 2, autoreset=False))
    outcomes = evaluator(policy, [trials.Trial(3), trials.Trial(4)], interrupted=interrupted)
    trajectories = [outcome.trajectory for outcome in outcomes]
    assert [trajectory.levels[-1] for trajectory in trajectories] == [4, 4]
    longest = max(len(trajectory.levels) for trajectory in trajectories)
    assert min(len(trajectory.levels) for trajectory in trajectories) < longest < 150
    assert asked == -(-longest // 6)  # six steps at a time: the most up to 8 that divide 300
    assert evaluator._run._cache_size() == 1  # although the parameters are committed to a device, as they come from a checkpoint


@pytest.mark.parametrize(
    "obs",
    [
        {"pixels": np.zeros((2, 31, 32, 3), np.uint8), "agent_pos": np.zeros((2, 14))},
        {"pixels": np.zeros((2, 32, 32, 3), np.float32), "agent_pos": np.zeros((2, 14))},
        {"pixels": np.zeros((2, 32, 32, 3), np.uint8), "agent_pos": np.zeros((2, 7))},
        {"pixels": np.zeros((2, 32, 32, 3), np.uint8)},
        np.zeros((2, 142)),
    ],
)
def test_what_a_policy_was_not_trained_to_see_is_refused(obs: Any) -> None:
    config = PRESETS["smoke"]
    policy = Policy(config, init_params(config, jax.random.key(0)), init_stats(config))
    with pytest.raises(ValueError, match=r"sees agent_pos float\[N, 14\] and pixels uint8\[N, 32, 32, 3\], not "):
        policy.act(jax.tree.map(jnp.asarray, obs))


def test_a_report_goes_through_links_and_into_what_is_no_file(several: list[Trajectory], tmp_path: Path) -> None:
    report, link = summarize(several, "c"), tmp_path / "link"
    link.symlink_to(tmp_path / "there.json")
    report.write(link)
    assert link.is_symlink()
    assert json.loads((tmp_path / "there.json").read_text())["n_episodes"] == 3
    os.mkfifo(tmp_path / "pipe")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        text = pool.submit((tmp_path / "pipe").read_text)
        report.write(tmp_path / "pipe")
        assert json.loads(text.result())["n_episodes"] == 3


def test_sampled_actions_follow_the_seed(policy: Policy, several: list[Trajectory]) -> None:
    sample, again = (rollouts_of(policy, "c", 3, seed=5, stochastic=True) for _ in range(2))
    for a, b, mean in zip(sample, again, several, strict=True):
        np.testing.assert_array_equal(a.qpos, b.qpos)
        assert np.abs(a.qpos - mean.qpos).max() > 1e-2
    alone = rollouts_of(policy, "c", 1, seed=6, stochastic=True)
    np.testing.assert_allclose(sample[1].qpos[:20], alone[0].qpos[:20], atol=1e-4)


def assert_starts_where_gym_aloha_does(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        peg, socket = sample_insertion_pose(trajectory.seed)
        np.testing.assert_allclose(trajectory.qpos[0, scene.PEG_QPOS][:2], peg[:2], atol=1e-3)
        np.testing.assert_allclose(trajectory.qpos[0, scene.SOCKET_QPOS][:2], socket[:2], atol=1e-3)


def test_episode_i_starts_from_seed_plus_i(several: list[Trajectory]) -> None:
    assert_starts_where_gym_aloha_does(several)


# --- In gym_aloha


class Demonstrator:
    """Stands in for a policy: plays the expert's plan for one start after another, whatever it observes."""

    def __init__(self, seed: int, config: Config) -> None:
        self.config = config
        self.start(seed)

    def start(self, seed: int) -> None:
        plan = expert.plan(*sample_insertion_pose(seed))
        if self.config.action == "delta":
            arm = np.array(START_ARM_POSE)
            grippers = [normalize_puppet_gripper_position(arm[i]) for i in (6, 14)]
            home = np.concatenate([arm[:6], grippers[:1], arm[8:14], grippers[1:]])
            plan = np.diff(plan, axis=0, prepend=home[None]) / np.array(DELTA_SCALE)
        self.actions = plan.astype(np.float32)
        self._plan = iter(self.actions)

    def act(self, obs: Any, key: Any = None) -> jax.Array:
        return jnp.asarray(next(self._plan))[None]


STATE_ABSOLUTE = dataclasses.replace(PRESETS["smoke"], obs="state", action="absolute", episode_length=300)


def test_the_experts_insertions_are_counted_as_successes() -> None:
    demonstrator, trajectories = Demonstrator(20, STATE_ABSOLUTE), []

    def next_start(trajectory: Trajectory) -> None:
        trajectories.append(trajectory)
        if len(trajectories) == 1:  # the third episode gets the second's plan, and fails
            demonstrator.start(trajectory.seed + 1)
        else:
            demonstrator.start(trajectory.seed)

    report = evaluate(cast(Policy, demonstrator), "gym_aloha", 3, seed=20, on_episode=next_start)
    assert [episode["max_level"] == 4 for episode in report.episodes] == [True, True, False]
    assert report.success_rate == pytest.approx(2 / 3)
    assert set(report.episodes[0]["levels"]) == {"1", "2", "3", "4"}
    assert report.episodes[0]["length"] == report.episodes[0]["levels"]["4"] < 300
    assert report.episodes[2]["length"] == 300
    assert_starts_where_gym_aloha_does(trajectories)


class Witness(Demonstrator):
    """Remembers what it saw."""

    def __init__(self, seed: int, config: Config) -> None:
        super().__init__(seed, config)
        self.seen: list[np.ndarray] = []

    def act(self, obs: Any, key: Any = None) -> jax.Array:
        self.seen.append(np.asarray(obs[0]))
        return super().act(obs, key)


def test_delta_actions_and_observations_mean_the_same_in_gym_aloha_and_in_our_environment() -> None:
    config = dataclasses.replace(STATE_ABSOLUTE, action="delta", physics="exact", reward="sparse")
    witness = Witness(3, config)
    [judged] = judge.gym_aloha_episodes(cast(Policy, witness), [3], stochastic=False)

    env = make_from_config(config, 1, autoreset=False)
    state, step = jax.jit(env.reset_from)(env.task.start_from_seed(3)[None]), jax.jit(env.step)
    seen, qpos, levels = [], [], []
    for action in witness.actions[: len(judged.levels)]:
        seen.append(np.asarray(state.privileged[0]))
        state = step(state, action[None])
        qpos.append(np.asarray(state.qpos[0]))
        levels.append(int(state.level[0]))
    free = slice(0, 80)  # before the first grasp nothing amplifies the rounding of targets
    np.testing.assert_allclose(np.array(qpos)[free], judged.qpos[free], atol=1e-4)
    np.testing.assert_allclose(np.array(seen)[free], np.array(witness.seen)[free], atol=2e-3)
    assert np.abs(judged.qpos[79] - judged.qpos[0]).max() > 0.3
    np.testing.assert_array_equal(levels, judged.levels)
    assert max(levels) >= 2


def test_what_is_asked_of_a_grip_is_seen_in_gym_aloha_as_in_training() -> None:
    config = dataclasses.replace(STATE_ABSOLUTE, physics="exact", grip_tolerance=0.003)
    witness = Witness(3, config)
    controller = judge.Controller(cast(Policy, witness))
    env = make_from_config(config, 1, autoreset=False)
    state, step = jax.jit(env.reset_from)(env.task.start_from_seed(3)[None]), jax.jit(env.step)
    controller.reset(np.asarray(state.qpos[0]), np.asarray(state.physics.qvel[0]))
    trained_on = []
    for _ in range(160):  # to the end of the lift
        trained_on.append(np.asarray(state.privileged[0]))
        qpos, qvel = np.asarray(state.qpos[0]), np.asarray(state.physics.qvel[0])
        observation = {"agent_pos": np.asarray(env.task.agent_pos(state.physics)[0])}
        state = step(state, controller(observation, qpos, qvel, None)[None])
    np.testing.assert_allclose(np.array(witness.seen), np.array(trained_on), atol=0.05)
    grasp = np.array(trained_on)[-1, [57, 57 + 68]]
    assert ((grasp > 0.3) & (grasp < 0.99)).all()  # not in full: the expert is some millimetres off


@pytest.mark.parametrize("committed", [True, False])
def test_what_a_policy_of_the_state_sees_in_gym_aloha_is_compiled_once(committed: bool) -> None:
    """Parameters of a checkpoint are committed to a device, those in a judging process are not."""
    params = init_params(SMALL, jax.random.key(0))
    params = jax.device_put(params, jax.devices()[0]) if committed else jax.device_get(params)
    controller: Any = judge.Controller(Policy(SMALL, params, init_stats(SMALL)))
    start, rest = Insertion.start_from_seed(3), np.zeros(28)
    for _ in range(2):
        controller.reset(start, rest)
        for _ in range(3):
            controller({"agent_pos": np.zeros(14)}, start, rest, None)
    assert controller._features._cache_size() == controller._start_progress._cache_size() == 1


class Onlooker:
    """Does nothing and remembers everything it saw."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.seen: list[dict[str, np.ndarray]] = []

    def act(self, obs: Any, key: Any = None) -> jax.Array:
        self.seen.append({name: np.asarray(x[0]) for name, x in obs.items()})
        return jnp.zeros((1, 14))


@pytest.mark.parametrize("obs", ["pixels_agent_pos", "pixels"])
def test_in_gym_aloha_a_policy_looks_back_as_far_as_in_our_environment(obs: Literal["pixels_agent_pos", "pixels"]) -> None:
    config = dataclasses.replace(PRESETS["smoke"], obs=obs, observe_target=True, history=(1, 3))
    onlooker = Onlooker(config)
    controller = judge.Controller(cast(Policy, onlooker))
    start, rest = Insertion.start_from_seed(0), np.zeros(28)
    positions = np.random.default_rng(0).normal(size=(2, 5, 14)).astype(np.float32)
    for episode in positions:
        controller.reset(start, rest)
        for agent_pos in episode:
            frame = np.zeros((480, 640, 3), np.uint8)
            controller({"pixels": {"top": frame}, "agent_pos": agent_pos}, start, rest, None)
    # The measured joints are far from where they are told to be, which drags the targets along.
    targets = np.stack([seen["target"] for seen in onlooker.seen]).reshape(positions.shape)
    assert (np.abs(np.diff(targets, axis=1)) > 0.1).any(axis=(1, 2)).all()
    remembered = positions if obs == "pixels_agent_pos" else targets
    for i, seen in enumerate(onlooker.seen):
        episode, t = i // 5, i % 5
        past = [remembered[episode, max(t - lag, 0)].reshape(2, 1, 7) for lag in (1, 3)]
        np.testing.assert_array_equal(seen["history"], np.concatenate(past, axis=1).ravel())
        assert ("agent_pos" in seen) == (obs == "pixels_agent_pos")
        np.testing.assert_array_equal(seen.get("agent_pos", positions[episode, t]), positions[episode, t])


def test_side_by_side_the_episodes_are_the_same() -> None:
    """Of a policy that inserts within 50 steps, which end an episode."""
    policy, conditions = checkpoints.load_policy(str(PRETRAINED / "insertion-state-robust")), [Condition(yaw=0.5), NOMINAL]
    alone = list(judge.gym_aloha_episodes(policy, [2], conditions=conditions))
    together = list(judge.gym_aloha_episodes(policy, [1, 2], keep_frames=1, conditions=conditions, num_workers=2))
    assert [trajectory.seed for trajectory in together] == [1, 2, 1, 2]
    for one, same in zip(together[1::2], alone, strict=True):
        np.testing.assert_array_equal(one.qpos, same.qpos)
        np.testing.assert_array_equal(one.levels, same.levels)
    assert [trajectory.frames is not None for trajectory in together] == [True, False, True, False]
    turned, straight = alone
    assert np.abs(turned.qpos[0] - straight.qpos[0]).max() > 0.01


@pytest.mark.slow
def test_a_judging_process_that_dies_is_told(policy: Policy) -> None:
    episodes = judge.gym_aloha_episodes(policy, list(range(8)), num_workers=2)
    next(episodes)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(RendererUnavailable, match="--num-workers"):
        list(episodes)


# --- eval.py


def run_eval(cwd: Path, *args: str) -> dict[str, Any]:
    """The JSON that `eval.py` prints in a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    end = subprocess.run([sys.executable, str(ROOT / "eval.py"), *args], cwd=cwd, capture_output=True, text=True, env=env)
    assert end.returncode == 0, end.stderr
    return cast(dict[str, Any], json.loads(end.stdout))


KEYS = {
    *("simulator", "n_episodes", "success_rate", "success_interval", "mean_reward", "mean_return", "mean_max_reward"),
    *("mean_length", "clean_rate", "mean_jerk", "level_rates", "episodes"),
}


def test_eval_needs_the_model_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model = small_run(tmp_path_factory, STATE).directory / "checkpoints" / "128"
    args = ("--model-path", str(model), "--sim", "c", "--n-episodes", "2", "--seed", "9", "--json", "report.json")
    report = run_eval(tmp_path, *args)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert set(report) == KEYS
    assert (report["n_episodes"], report["mean_length"]) == (2, 300.0)
    assert set(report["level_rates"]) == {"1", "2", "3", "4"}
    assert [episode["seed"] for episode in report["episodes"]] == [9, 10]
    assert all(set(episode) == {"seed", "return", "max_level", "levels", "length"} for episode in report["episodes"])


def test_a_film_of_our_own_worlds_shows_the_condition_and_what_the_policy_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that are drawn afterwards have the condition's camera and light, and the policy's view has its cheap quality."""
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(evaluation, "write_mp4", lambda path, pictures: list(pictures))
    monkeypatch.setattr(evaluation, "compose", lambda frame, view, *counts: shown.append((frame, view)))
    config = dataclasses.replace(PRESETS["pixels"], renderer="egl", render_quality="fast")
    qpos = Insertion.start_from_seed(5)[None]
    trajectory = Trajectory(5, np.zeros(1, int), qpos, np.zeros((1, 14)))
    for condition in (NOMINAL, Condition(camera_shift=(0.0, 0.02), brightness=0.5)):
        evaluation.film(trajectory, config, Path("unwritten.mp4"), condition)
    (frame, view), (moved, moved_view) = shown[0], shown[-1]
    with make_renderer("egl", "insertion", 72, 120, config.crop, quality="fast") as renderer:
        np.testing.assert_array_equal(view, renderer.render(qpos)[0])
    for usual, changed in ((frame, moved), (view, moved_view)):
        assert abs(changed.mean() / (usual // 2).mean() - 1) < 0.1
        assert np.abs((usual // 2).astype(int) - changed).mean() > 1  # it is not only darker


def test_a_film_that_fails_takes_no_judging_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluation, "write_mp4", full)
    monkeypatch.chdir(tmp_path)
    model = ("--model-path", str(PRETRAINED / "insertion-state"))
    with pytest.raises(OSError, match="No space left"):
        eval_command.main([*model, "--sim", "c", "--n-episodes", "2", "--video-path", "film.mp4", "--json", "report.json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "report.json").read_text())
    assert "film.mp4" not in printed.err


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio's reader
def test_eval_films_gym_aloha(tmp_path: Path) -> None:
    """The whole way: a policy of pixels in the original environment, and its video; it inserts in 99 of 100 episodes."""
    model, film = PRETRAINED / "insertion-pixels-ppo", tmp_path / "film.mp4"
    report = run_eval(tmp_path, "--model-path", str(model), "--n-episodes", "1", "--seed", "4", "--video-path", str(film))
    assert report["simulator"] == "gym_aloha"
    assert report["success_rate"] == 1
    length = report["episodes"][0]["length"]
    assert length < 200
    properties = iio.improps(film, plugin="FFMPEG")
    assert properties.shape[1:] == (480, 880, 3)
    frames = iio.imread(film, plugin="FFMPEG")
    assert len(frames) == length + 50
    step_text = frames[:, 8:36, 10:120]
    assert np.abs(step_text[0].astype(int) - step_text[length - 1]).max() > 100
    np.testing.assert_allclose(step_text[length + 10], step_text[length + 40], atol=40)  # the last picture is held
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
