"""Learning from a teacher: who acts, what is imitated, and which teachers are refused."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aloha_jax import checkpoints, launch, origins, run, training
from aloha_jax.config import Config, ConfigError
from aloha_jax.env import Env
from aloha_jax.factory import make_from_config
from aloha_jax.policy import Policy, init_params, init_stats, make_network
from aloha_jax.presets import PRESETS
from aloha_jax.training import RunState

TEACHER = dataclasses.replace(PRESETS["smoke"], obs="state", network="mirrored", hidden_sizes=(16,), normalize_obs=False)
STUDENT = dataclasses.replace(
    PRESETS["smoke"],
    obs="state",
    hidden_sizes=(64,),
    teacher="somewhere",
    distill_coef=1.0,
    ppo_coef=0.0,
    learning_rate=3e-3,
    log_std_init=-2.0,
    n_envs=16,
    n_steps=8,
    total_timesteps=16 * 8 * 40,
)


@pytest.fixture(scope="module")
def teacher() -> Policy:
    """One that moves: its mean action would be all but zero as it is initialised."""
    params = jax.tree.map(lambda x: 2.0 * x, init_params(TEACHER, jax.random.key(3)))
    return Policy(TEACHER, params, init_stats(TEACHER))


@pytest.fixture(scope="module")
def env() -> Env:
    return make_from_config(STUDENT)


def test_dagger_brings_the_student_to_its_teacher(teacher: Policy, env: Env) -> None:
    state = training.init_run(STUDENT, env)
    train_step = training.make_train_step(STUDENT, env, teacher=teacher)
    losses = []
    for _ in range(40):
        state, metrics = train_step(state)
        losses.append(float(metrics["distill_loss"]))
    assert np.mean(losses[-5:]) < 0.1 * losses[0]


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_the_teacher_acts_in_its_share_of_the_steps(teacher: Policy, env: Env, mix: float) -> None:
    """All of them or none: the worlds then go where the teacher, or the student's sampled actions, take them."""
    config = dataclasses.replace(STUDENT, teacher_mix=mix)
    state = training.init_run(config, env)
    start, key = jax.tree.map(lambda x: x.copy(), state.env), jax.random.key(0)
    collect = jax.jit(lambda run: training.make_collector(config, env, make_network(config), run, teacher).rollout(run.env, key))
    collected = collect(state)
    transitions = collected.transitions
    assert transitions.own is not None
    assert transitions.teacher_action is not None
    assert (np.asarray(transitions.own) == (mix == 0.0)).all()
    step = jax.jit(env.step)
    world = start
    for t in range(config.n_steps):
        theirs = teacher.act(world.privileged)
        np.testing.assert_allclose(transitions.teacher_action[t], theirs, atol=1e-4)
        world = step(world, theirs if mix else transitions.action[t])
    np.testing.assert_allclose(collected.env.qpos, world.qpos, atol=1e-3)


def test_a_share_in_between_is_that_share(teacher: Policy, env: Env) -> None:
    config = dataclasses.replace(STUDENT, teacher_mix=0.5, teacher_mix_final=0.1, n_steps=64, total_timesteps=16 * 64 * 4)
    network = make_network(config)

    def own(state: RunState) -> jax.Array:
        collector = training.make_collector(config, env, network, state, teacher)
        chosen = collector.rollout(state.env, jax.random.key(0)).transitions.own
        assert chosen is not None
        return chosen

    own_jitted = jax.jit(own)
    for update, share in ((0, 0.5), (2, 0.3), (4, 0.1)):
        assert 1 - own_jitted(training.init_run(config, env)._replace(update=jnp.array(update))).mean() == pytest.approx(
            share, abs=0.06
        )


def test_exploration_ends_under_its_cap(env: Env) -> None:
    config = dataclasses.replace(STUDENT, teacher=None, distill_coef=0.0, ppo_coef=1.0, log_std_init=0.0, log_std_final=-1.0)
    config = dataclasses.replace(config, total_timesteps=config.rollout_size * 4)
    state = training.init_run(config, env)
    train_step = training.make_train_step(config, env)
    for cap in (-0.25, -0.5, -0.75, -1.0):
        state, _ = train_step(state)
        log_std = state.params["params"]["log_std"]
        assert log_std.max() <= cap + 1e-6
        assert log_std.min() > cap - 0.2


def test_the_running_average_follows_the_parameters(env: Env) -> None:
    config = dataclasses.replace(STUDENT, teacher=None, distill_coef=0.0, ppo_coef=1.0, average_decay=0.25)
    state = training.init_run(config, env)
    train_step = training.make_train_step(config, env)
    expected = jax.tree.map(np.array, state.params)
    for update in range(4):
        state, _ = train_step(state)
        decay = min(0.25, (1 + update) / (10 + update))  # 0.1, 0.18, 0.25, 0.25
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * np.array(new), expected, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.average, expected)
    assert state.judged is state.average
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.average, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-5


@pytest.fixture(scope="module")
def saved(teacher: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "teacher"
    checkpoints.save_model(path, teacher)
    return path


def test_a_saved_teacher_is_the_teacher(teacher: Policy, saved: Path) -> None:
    loaded = origins.load_teacher(dataclasses.replace(STUDENT, teacher=str(saved)))
    assert loaded is not None
    obs = jax.random.normal(jax.random.key(0), (3, 142))
    np.testing.assert_array_equal(loaded.act(obs), teacher.act(obs))


@pytest.fixture(scope="module")
def strict(teacher: Policy) -> Policy:
    return Policy(dataclasses.replace(teacher.config, grip_tolerance=0.006), teacher.params, teacher.stats)


@pytest.fixture(scope="module")
def taught(strict: Policy, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a finished run under a teacher that lies beside it."""
    home = tmp_path_factory.mktemp("taught")
    checkpoints.save_model(home / "teacher", strict)
    config = dataclasses.replace(
        STUDENT, teacher=str(home / "teacher"), log_dir=str(home / "run"), total_timesteps=128, final_eval_episodes=0
    )
    launch.execute(config)
    return config


def test_a_run_measures_the_grip_as_its_teachers_did_unless_told_otherwise(taught: Config) -> None:
    assert taught.grip_tolerance is None
    assert Config.load(Path(taught.log_dir) / "config.json").grip_tolerance == 0.006
    own = dataclasses.replace(taught, grip_tolerance=0.02)
    assert origins.with_teachers_grip(own) == own
    alone = dataclasses.replace(STUDENT, teacher=None, distill_coef=0.0, ppo_coef=1.0)
    assert origins.with_teachers_grip(alone) == alone


def test_a_run_is_not_resumed_under_another_teacher(taught: Config, strict: Policy) -> None:
    """Its path says nothing: a run that is trained further has another best model under the same name."""
    directory, home = Path(taught.log_dir), Path(str(taught.teacher))
    longer = dataclasses.replace(Config.load(directory / "config.json"), total_timesteps=256)
    checkpoints.save_model(home, Policy(strict.config, jax.tree.map(lambda x: -x, strict.params), strict.stats))
    with pytest.raises(checkpoints.CheckpointError, match=r"--teacher .*teacher is no longer the model"):
        launch.execute(longer, resume=True)
    checkpoints.save_model(home, strict)
    launch.execute(longer, resume=True)
    assert checkpoints.latest_checkpoint(directory) == directory / "checkpoints" / "256"


def test_teachers_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    blind = dataclasses.replace(PRESETS["smoke"], obs="pixels", privileged_critic=False)
    checkpoints.save_model(tmp_path / "blind", Policy(blind, init_params(blind, jax.random.key(0)), init_stats(blind)))
    with pytest.raises(ConfigError, match=r"--teacher .* sees pixels"):
        origins.load_teacher(dataclasses.replace(STUDENT, teacher=str(tmp_path / "blind")))
    with pytest.raises(ConfigError, match=r"--teacher .* --action delta"):
        origins.load_teacher(dataclasses.replace(STUDENT, teacher=str(saved), action="absolute"))
    with pytest.raises(checkpoints.CheckpointError, match=r"--teacher .*nowhere"):
        origins.load_teacher(dataclasses.replace(STUDENT, teacher=str(tmp_path / "nowhere")))


def test_a_run_starts_from_another_models_parameters(teacher: Policy, saved: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TEACHER, init_from=str(saved))
    begun = run.Run(config, tmp_path, quiet=True)
    begun.close()
    for ours, theirs in zip(jax.tree.leaves(begun.state.params), jax.tree.leaves(teacher.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_from_another_models_parameters_begins_its_average_there_and_compiles_once(saved: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TEACHER, init_from=str(saved), average_decay=0.9)
    begun = run.Run(config, tmp_path, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, begun.state.average, begun.state.params)
    begun.train()
    begun.close()
    assert begun.train_step.compilations == 1


def test_the_host_is_called_by_the_rollout_alone(teacher: Policy, env: Env) -> None:
    """So the update can be kept from one start to the next: before 0.11 JAX forgets programs that call the host."""
    step = training.make_train_step(STUDENT, env, teacher=teacher)
    state = jax.eval_shape(lambda: training.init_run(STUDENT, env))
    learner = state._replace(env=None)
    _, _, collected = jax.eval_shape(step._collect, state.env, learner)
    assert "callback" in step._collect.lower(state.env, learner).as_text()
    assert "callback" not in step._learn.lower(learner, *collected).as_text()


def test_an_update_is_timed_to_its_end(tmp_path: Path) -> None:
    """Not to where it was asked for."""
    begun = run.Run(TEACHER, tmp_path, quiet=True)

    def sleep(x: np.ndarray) -> np.ndarray:
        time.sleep(0.5)
        return x

    slow = jax.jit(lambda x: jax.pure_callback(sleep, x, x) + 1.0)
    begun.train_step = lambda state: (state, {"skipped_minibatches": slow(jnp.zeros(()))})  # type: ignore[assignment]
    before = time.monotonic()
    begun._train_step(64)
    begun.close()
    assert begun._pending is not None
    assert begun._pending[2] - before >= 0.5


def test_a_shipped_teacher_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = origins.load_teacher(PRESETS["cpu"])
    assert teacher is not None
    assert teacher.config.obs == "state"


def test_a_start_that_saw_other_numbers_is_refused(tmp_path: Path) -> None:
    """What was commanded and what was measured are 14 numbers both."""
    commands = dataclasses.replace(STUDENT, obs="pixels", observe_target=True, normalize_obs=False)
    joints = dataclasses.replace(commands, obs="pixels_agent_pos", observe_target=False, init_from=str(tmp_path / "model"))
    params = init_params(commands, jax.random.key(0))
    checkpoints.save_model(tmp_path / "model", Policy(commands, params, init_stats(commands)))
    with pytest.raises(ConfigError, match=r"than this run: --obs pixels_agent_pos here, pixels there$"):
        origins.load_initial(joints)


@pytest.mark.parametrize(("here", "there", "fits"), [(0.0, 1.0, False), (1.0, 0.0, False), (0.5, 1.0, True)])
def test_a_start_that_acts_on_what_it_predicts_is_no_start_for_one_that_does_not(
    here: float, there: float, fits: bool, tmp_path: Path
) -> None:
    plain = dataclasses.replace(PRESETS["smoke"], privileged_critic=True)
    saved, wanted = (dataclasses.replace(plain, state_coef=coef) for coef in (there, here))
    params = init_params(saved, jax.random.key(1))
    checkpoints.save_model(tmp_path / "model", Policy(saved, params, init_stats(saved)))
    config = dataclasses.replace(wanted, init_from=str(tmp_path / "model"))
    if not fits:
        with pytest.raises(ConfigError, match=f"--init-from .*: --state-coef {here} here, {there} there"):
            origins.load_initial(config)
        return
    initial = origins.load_initial(config)
    assert initial is not None
    jax.tree.map(np.testing.assert_array_equal, initial.params, params)


def test_the_state_is_learned_from_pictures(tmp_path: Path) -> None:
    """By a policy that is paid for nothing else: all of the rest of its loss has weight 0 or no part in the encoder."""
    config = dataclasses.replace(
        PRESETS["smoke"], privileged_critic=True, state_coef=1.0, ppo_coef=1e-6, learning_rate=3e-3, total_timesteps=64 * 30
    )
    begun = run.Run(config, tmp_path, quiet=True)
    losses = []
    for _ in range(30):
        begun.state, metrics = begun.train_step(begun.state)
        losses.append(float(metrics["state_loss"]))
    begun.close()
    # The first update still sees the state in its own units.
    assert np.mean(losses[25:]) < 0.6 * np.mean(losses[1:4])


@pytest.mark.parametrize(("name", "value"), [("activation", "relu"), ("action", "absolute")])
def test_a_start_whose_parameters_mean_something_else_is_refused(saved: Path, name: str, value: str) -> None:
    assert getattr(TEACHER, name) != value
    changes: dict[str, Any] = {"init_from": str(saved), name: value}
    config = dataclasses.replace(TEACHER, **changes)
    with pytest.raises(ConfigError, match=f"--init-from .*--{name} {value} here, {getattr(TEACHER, name)} there"):
        origins.load_initial(config)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("crop", (80, 0, 400, 640), r"--crop \(80, 0, 400, 640\) here, .* there"),
        ("image_height", 33, "--image-height 33 here, 32 there"),
    ],
)
def test_a_start_that_saw_other_pictures_is_refused_though_its_parameters_fit(
    flag: str, value: Any, said: str, tmp_path: Path
) -> None:
    saved = dataclasses.replace(PRESETS["smoke"], image_height=32)
    params = init_params(saved, jax.random.key(1))
    checkpoints.save_model(tmp_path / "model", Policy(saved, params, init_stats(saved)))
    changes: dict[str, Any] = {"init_from": str(tmp_path / "model"), flag: value}
    config = dataclasses.replace(saved, **changes)
    shapes = [
        jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda c=c: init_params(c, jax.random.key(0)))) for c in (saved, config)
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(ConfigError, match=f"--init-from .*: {said}"):
        origins.load_initial(config)


def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(saved: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(STUDENT, teacher=str(saved), init_from=str(saved), log_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"--init-from .*--network joint here, mirrored there"):
        launch.execute(config)
    with pytest.raises(checkpoints.CheckpointError, match=r"--teacher .*nowhere"):
        launch.execute(dataclasses.replace(config, teacher=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_a_teachers_grip_that_the_run_cannot_have_is_refused_before_anything_is_written(strict: Policy, tmp_path: Path) -> None:
    checkpoints.save_model(tmp_path / "teacher", strict)
    config = dataclasses.replace(
        STUDENT, teacher=str(tmp_path / "teacher"), log_dir=str(tmp_path / "run"), grip_height_tolerance=0.01
    )
    with pytest.raises(
        ConfigError, match=r"--teacher .* brings its --grip-tolerance 0\.006, .* give --grip-height-tolerance None"
    ):
        launch.execute(config)
    assert not (tmp_path / "run").exists()
