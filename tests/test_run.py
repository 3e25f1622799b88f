"""A whole run, as `train.py` does it: what it leaves behind, how it goes on, and what it must not lose."""

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import pytest

import train
from aloha_jax import checkpoints, cli, evaluation, hints, launch, run, run_directory, training
from aloha_jax.config import Config
from aloha_jax.metrics import MetricsLogger
from aloha_jax.presets import PRESETS
from aloha_jax.profiling import require_profile
from tests.small_run import FLAGS, PIXELS, STATE, keep_train_steps, small_run


@pytest.fixture(scope="module")
def state_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory, STATE).directory


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_run(tmp_path_factory, STATE).printed


@pytest.fixture
def resumable(state_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(state_run, tmp_path / "run"))


def test_a_run_leaves_what_is_promised_and_nothing_else(state_run: Path) -> None:
    left = {str(path.relative_to(state_run)) for path in state_run.iterdir()} | {
        str(path.relative_to(state_run)) for folder in ("eval", "checkpoints") for path in (state_run / folder).iterdir()
    }
    assert left == {
        *("config.json", "command.txt", "progress.csv", "learning_curve.png", "tensorboard"),
        *("best_model", "final_model", "checkpoints", "checkpoints/64", "checkpoints/128", "checkpoints/192"),
        *("eval", "eval/evaluations.csv"),
    }
    config = Config.load(state_run / "config.json")
    assert (config.log_dir, config.obs, config.total_timesteps) == (str(state_run), "state", 192)
    assert len((state_run / "command.txt").read_text().splitlines()) == 1


def test_a_run_of_pixels_leaves_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = small_run(tmp_path_factory, PIXELS).directory
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"64", "128"}
    config = Config.load(directory / "config.json")
    assert config.privileged_critic
    assert config.renderer in ("egl", "warp")  # what `auto` found


def test_the_console_tells_what_is_trained_how_it_goes_and_where_it_is(state_run: Path, console: str) -> None:
    parameters = sum(x.size for x in jax.tree.leaves(checkpoints.load_policy(state_run).params))
    assert f"{parameters:,} parameters" in console
    assert "192 / 192" in console
    assert console.count("evaluation: reward") == 4  # at 0, 64, 128 and 192 steps
    for name in ("best_model", "final_model", "learning_curve.png", "tensorboard"):
        assert str(state_run / name) in console
    assert f"eval.py --model-path {state_run / 'best_model'}" in console


@pytest.mark.parametrize("flags", [STATE, PIXELS])
def test_the_train_step_is_compiled_once(tmp_path_factory: pytest.TempPathFactory, flags: tuple[str, ...]) -> None:
    assert small_run(tmp_path_factory, flags).compilations == 1


def test_a_run_that_lost_its_last_checkpoint_goes_on_from_the_one_before(
    resumable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(resumable / "checkpoints" / "192")
    (resumable / "checkpoints" / "999.orbax-checkpoint-tmp-1").mkdir()  # what a killed process leaves
    assert checkpoints.latest_checkpoint(resumable) == resumable / "checkpoints" / "128"
    begun_at = []
    monkeypatch.setattr(run.Run, "_print_start", lambda self: begun_at.append((self.env_steps, self.best_score)))
    steps = keep_train_steps(monkeypatch)
    args = ["--resume", str(resumable), "--device", "cpu", "--total-timesteps", "256"]
    train.main(args)

    [(env_steps, best_score)] = begun_at
    assert env_steps == 128
    assert best_score == max(scores(resumable, up_to=128))
    assert steps[0].compilations == 1
    assert {path.name for path in (resumable / "checkpoints").iterdir() if path.name.isdigit()} >= {"128", "192", "256"}
    for model in ("", "final_model"):
        assert Config.load(resumable / model / "config.json").total_timesteps == 256
    assert len((resumable / "command.txt").read_text().splitlines()) == 2
    for file, first in (("progress.csv", 64), ("eval/evaluations.csv", 0)):
        lines = (resumable / file).read_text().splitlines()[1:]
        assert [int(line.split(",")[0]) for line in lines] == list(range(first, 257, 64)), file


def scores(directory: Path, up_to: int) -> list[float]:
    """Of the run's evaluations at most so many steps after its start."""
    with (directory / "eval" / "evaluations.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["env_steps"]) <= up_to]
    columns = ("success_rate", "mean_max_reward", "mean_train_reward")
    episodes = Config.load(directory / "config.json").eval_episodes
    return [run.score(episodes, *(float(row[name]) for name in columns)) for row in rows]


def test_the_best_evaluation_is_remembered_even_if_no_checkpoint_came_after_it(resumable: Path) -> None:
    """As that of one that a signal ended and the next process made up for: its row is there, and its policy is `best_model`."""
    evaluations = resumable / "eval" / "evaluations.csv"
    with evaluations.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[-1]["success_rate"] = "1.0"
    with evaluations.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    best = (resumable / "best_model" / "policy.sha256").read_bytes()
    train.main(["--resume", str(resumable), "--device", "cpu", "--total-timesteps", "256"])
    assert max(scores(resumable, up_to=192)) > 0.9
    assert scores(resumable, up_to=256)[-1] < 0.9
    assert (resumable / "best_model" / "policy.sha256").read_bytes() == best


def test_an_evaluation_counts_as_made_once_its_model_is_there(resumable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that makes up for its last evaluation is killed in it, before the best model is written."""
    evaluations = resumable / "eval" / "evaluations.csv"
    rows = evaluations.read_text().splitlines(keepends=True)
    evaluations.write_text("".join(rows[:-1]))
    rising = itertools.count(2.0)
    monkeypatch.setattr(run, "score", lambda *_: next(rising))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(["--resume", str(resumable), "--device", "cpu", "--total-timesteps", "256"])
    assert evaluations.read_text() == "".join(rows[:-1])
    before = (resumable / "best_model" / "policy.sha256").read_bytes()
    train.main(["--resume", str(resumable), "--device", "cpu"])
    assert (resumable / "best_model" / "policy.sha256").read_bytes() != before
    assert [line.split(",")[0] for line in evaluations.read_text().splitlines()[1:]] == ["0", "64", "128", "192", "256"]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one or two lines on stderr of a `train.py` that ends with status 2."""
    with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
        train.main(list(args))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert 1 <= len(error.splitlines()) <= 2
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--obs", "pixels"), "--obs pixels contradicts the run, which has state"),
        (("--learning-rate", "0.1"), "--learning-rate 0.1 contradicts the run, which has 0.0003"),
        (("--no-normalize-obs",), "--normalize-obs False contradicts the run, which has True"),
        (("--log-dir", "elsewhere"), "--log-dir elsewhere contradicts the run, which has /"),
        (("--overwrite",), "--overwrite True contradicts the run, which has False"),
        (("--preset", "guide"), "--preset guide contradicts the run, which has smoke"),
        (("--total-timesteps", "64"), "--total-timesteps 64 is less than the run's own 192"),
    ],
)
def test_a_flag_that_contradicts_the_resumed_run_is_refused(
    state_run: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str
) -> None:
    before = snapshot(state_run)
    assert says in refused(capsys, "--resume", str(state_run), *flags)
    assert snapshot(state_run) == before


def test_a_flag_that_agrees_with_the_resumed_run_is_accepted(state_run: Path) -> None:
    saved = Config.load(state_run / "config.json")
    config, given = cli.parse_config(["--resume", str(state_run), "--preset", "auto"])  # which finds `cpu` or `gpu` elsewhere
    assert run_directory.resumed_config(state_run, config, given) == saved
    config, given = cli.parse_config(["--resume", str(state_run), "--obs", "state", "--preset", "smoke"])
    assert saved.device == "cpu"  # and so it goes on there, unless told otherwise
    assert run_directory.resumed_config(state_run, config, given) == saved
    same_place = ["--log-dir", os.path.relpath(state_run) + "/"]
    config, given = cli.parse_config(["--resume", str(state_run), *same_place, "--device", "auto", "--final-eval-episodes", "3"])
    anew: dict[str, Any] = {"device": "auto", "final_eval_episodes": 3}
    assert run_directory.resumed_config(state_run, config, given) == dataclasses.replace(saved, **anew)


def test_a_run_is_resumed_without_what_only_its_start_needed(resumable: Path, tmp_path: Path) -> None:
    config, given = cli.parse_config(["--resume", str(resumable), "--preset", "pixels"])  # which needs a teacher to start
    assert given == {"resume", "preset"}
    changes: dict[str, Any] = {"init_from": str(tmp_path / "gone"), "log_dir": str(resumable)}
    saved = dataclasses.replace(Config.load(resumable / "config.json"), **changes)
    with contextlib.ExitStack() as claims:
        config, env = launch.prepare(saved, True, claims)
        resumed = run.Run(config, resumable, resume=True, quiet=True, env=env)
        resumed.close()
    assert resumed.env_steps == 192


@pytest.mark.parametrize("episodes", [1, 16, 128])
def test_success_outweighs_levels_and_these_the_training_reward(episodes: int) -> None:
    score = functools.partial(run.score, episodes)
    assert score(1 / episodes, 4 / episodes, -1e3) > score(0, 3.0, 1e3)
    assert score(0, 1 / episodes, -1e3) > score(0, 0, 1e3)
    assert score(0, 0, 1.0) > score(0, 0, -1.0)


def test_a_checkpoint_has_the_score_of_its_own_policy_or_none(tmp_path: Path) -> None:
    flags = ("--checkpoint-freq", "64", "--eval-freq", "128", "--total-timesteps", "192", "--log-dir", str(tmp_path / "run"))
    train.main([*FLAGS, *STATE, *flags])
    scored = {
        int(p.parent.parent.name) for p in (tmp_path / "run/checkpoints").glob("*/metrics/metrics") if "score" in p.read_text()
    }
    assert scored == {128, 192}  # of 192 the end is evaluated


@pytest.mark.parametrize(
    ("flags", "rows"),
    [({}, None), ({"crop": None}, 80), ({"crop": (80, 0, 400, 640)}, None), ({"crop": None, "network": "joint"}, None)],
)
def test_a_crop_whose_half_turn_does_not_exchange_the_arms_is_named(flags: dict[str, Any], rows: int | None) -> None:
    warning = hints.lopsided_crop(dataclasses.replace(PRESETS["pixels"], **flags))
    assert (warning is None) == (rows is None)
    assert warning is None or f"shifted by {rows} rows and 0 columns" in warning
    assert hints.lopsided_crop(dataclasses.replace(PRESETS["state"], crop=None)) is None


@pytest.mark.parametrize(
    ("flags", "silent"),
    [
        ({"teacher": None}, False),
        ({}, True),
        ({"distill_coef_final": 0.1}, False),
        ({"teacher_mix": 0.1}, False),
    ],
)
def test_a_teacher_that_has_no_say_is_named(flags: dict[str, Any], silent: bool) -> None:
    config = dataclasses.replace(PRESETS["state"], **{"teacher": "pretrained/insertion-state", **flags})
    assert (hints.silent_teacher(config) is not None) == silent


@pytest.mark.parametrize(
    ("preset", "flags", "named"),
    [
        ("cpu", {}, None),
        ("cpu", {"reward": "sparse", "gamma": 0.9}, "--reward and --gamma"),
        ("cpu", {"reward": "sparse", "ppo_coef": 1.0}, None),
        ("state", {"reward": "sparse"}, None),
    ],
)
def test_a_reward_that_no_policy_learns_by_is_pointed_out(preset: str, flags: dict[str, Any], named: str | None) -> None:
    hint = hints.unheard_reward(dataclasses.replace(PRESETS[preset], **flags))
    assert (hint is None) == (named is None)
    assert named is None or f"{named} change" in str(hint)


@pytest.mark.parametrize(
    ("preset", "flags", "said"),
    [
        *((preset, {}, None) for preset in PRESETS),
        ("state", {"start_share": 0.1}, None),
        ("scratch", {"start_share": 0.9}, "--start-share with --start-states task"),
        ("state", {"reward": "shaped", "action_cost": 0.1}, "--action-cost with --reward shaped"),
        ("state", {"renderer": "warp", "features_dim": 7}, "--renderer and --features-dim with --obs state"),
        ("cpu", {"clip_range": 0.1, "crop": None}, "--clip-range with --ppo-coef 0"),
        ("pixels-ppo", {"clip_range": 0.1, "crop": None, "action_cost": 0.1}, None),
        (
            "pixels-finetune",
            {"init_from": "there", "log_std_init": -2.2},
            "--log-std-init with --init-from and no --log-std-final",
        ),
        ("pixels-finetune", {"init_from": "there", "log_std_init": -2.2, "log_std_final": -2.2}, None),
    ],
)
def test_a_setting_that_nothing_reads_is_pointed_out(preset: str, flags: dict[str, Any], said: str | None) -> None:
    hint = hints.idle_settings(dataclasses.replace(PRESETS[preset], **flags))
    assert hint == (None if said is None else f"without effect: {said}")


def test_a_profile_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    error = refused(capsys, *FLAGS, *STATE, "--log-dir", str(tmp_path / "run"), "--profile", str(tmp_path / "file" / "profile"))
    assert "--profile" in error
    assert not (tmp_path / "run").exists()


def test_a_profile_may_lie_in_the_run_that_is_begun(tmp_path: Path) -> None:
    config = Config(log_dir=str(tmp_path / "run"), profile=str(tmp_path / "run" / "profile"))
    require_profile(config)
    assert not (tmp_path / "run").exists()  # or `check_directory` would find it in use


def test_nothing_to_resume(tmp_path: Path, state_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in refused(capsys, "--resume", str(missing))
    (tmp_path / "run").mkdir()
    shutil.copy(state_run / "config.json", tmp_path / "run")
    assert "no complete checkpoint" in refused(capsys, "--resume", str(tmp_path / "run"))
    assert "a model, not a run" in refused(capsys, "--resume", "pretrained/insertion-state")


def test_a_damaged_checkpoint_to_resume(resumable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(resumable / "checkpoints" / "192" / "run")
    before = snapshot(resumable / "best_model")
    assert str(resumable / "checkpoints" / "192") in refused(capsys, "--resume", str(resumable), "--total-timesteps", "256")
    assert snapshot(resumable / "best_model") == before


def test_log_dir_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"--log-dir {file}" in refused(capsys, *FLAGS, *STATE, "--log-dir", str(file), "--overwrite")
    assert file.read_text() == "mine"
    below = file / "run"
    assert f"--log-dir {below}" in refused(capsys, *FLAGS, *STATE, "--log-dir", str(below))


@pytest.mark.parametrize("name", ["[x]", "a\\b"])
def test_a_place_where_orbax_loses_checkpoints_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "--log-dir" in refused(capsys, *FLAGS, *STATE, "--log-dir", str(tmp_path / name / "run"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".", ""])
def test_the_folder_one_is_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the folder you are in" in refused(capsys, *FLAGS, *STATE, "--log-dir", name, "--overwrite")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [("--init-from",), ("--distill-coef", "1", "--teacher")])
def test_overwrite_does_not_delete_what_the_run_begins_with(
    state_run: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    before = snapshot(state_run)
    error = refused(capsys, *FLAGS, *STATE, "--log-dir", str(state_run), "--overwrite", *flags, str(state_run / "final_model"))
    assert f"{flags[-1]} {state_run}" in error
    assert snapshot(state_run) == before


def test_a_record_that_is_none_is_not_gone_on_with(resumable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (resumable / "progress.csv").write_bytes(b"\xff\x00 nonsense\n1,2\n")
    assert "progress.csv is damaged" in refused(capsys, "--resume", str(resumable), "--total-timesteps", "256")


def test_log_dir_in_use(state_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(state_run)
    error = refused(capsys, *FLAGS, *STATE, "--log-dir", str(state_run))
    assert "--resume" in error
    assert "--overwrite" in error
    assert snapshot(state_run) == before


def test_overwrite_deletes_only_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("of another program")
    (tmp_path / "thesis.tex").write_text("ten years of work")
    assert "--overwrite" in refused(capsys, *FLAGS, *STATE, "--log-dir", str(tmp_path), "--overwrite")
    assert (tmp_path / "thesis.tex").exists()


def test_overwrite_starts_afresh(tmp_path: Path) -> None:
    config = Config(log_dir=str(tmp_path / "run"), overwrite=True)
    run_directory.prepare_directory(config)
    (tmp_path / "run" / "best_model").mkdir()
    run_directory.prepare_directory(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "command.txt"}


def test_log_dir_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    """/proc takes no folders, not even root's."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    assert "cannot write --log-dir /proc/aloha" in refused(capsys, *FLAGS, *STATE, "--log-dir", "/proc/aloha")


@pytest.mark.parametrize("flags", [("--obs", "pixels", "--renderer", "egl"), ("--obs", "state", "--final-eval-episodes", "1")])
def test_without_opengl_nothing_is_begun_and_nothing_deleted(
    resumable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "4711")
    before = snapshot(resumable)
    for directory in (resumable, tmp_path / "new"):
        assert "OpenGL" in refused(capsys, *FLAGS, *flags, "--log-dir", str(directory), "--overwrite")
    assert snapshot(resumable) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("platform", "gpus", "device", "environment", "warns"),
    [
        ("cpu", 1, "auto", None, True),
        ("cpu", 1, "cpu", None, False),
        ("cpu", 1, "auto", "cpu", False),
        ("cpu", 0, "auto", None, False),
        ("gpu", 1, "auto", None, False),
    ],
)
def test_a_gpu_that_nobody_uses_is_noticed(
    platform: str,
    gpus: int,
    device: Literal["auto", "cpu"],
    environment: str | None,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if environment is not None:
        monkeypatch.setenv("JAX_PLATFORMS", environment)
    warning = hints.idle_gpu(Config(device=device), platform, gpus)
    assert (warning is not None) is warns
    assert warning is None or ("--extra cuda" in warning and "\n" not in warning)


@pytest.mark.parametrize(("preset", "platform", "warns"), [("gpu", "cpu", True), ("gpu", "gpu", False), ("cpu", "cpu", False)])
def test_mjx_on_a_cpu_is_noticed(preset: str, platform: str, warns: bool) -> None:
    warning = hints.physics_on_cpu(PRESETS[preset], platform)
    assert (warning is not None) is warns
    assert warning is None or "--engine c" in warning


def test_out_of_memory(resumable: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(state: training.RunState) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.\nBufferAssignment: ...")

    monkeypatch.setattr(training, "make_train_step", lambda *args, **options: exhausted)
    before = {name: snapshot(resumable / name) for name in ("checkpoints", "best_model", "final_model")}
    error = refused(capsys, "--resume", str(resumable), "--total-timesteps", "256")
    assert "--n-envs" in error
    assert {name: snapshot(resumable / name) for name in before} == before


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError), cli.user_errors(trains=True):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(OSError, match="device on fire"), cli.user_errors(trains=True):
        raise OSError(5, "device on fire")


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def damage(directory: Path) -> None:
    """Cut every array file in half."""
    for file in directory.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_final_report_is_written(state_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our engine in gym_aloha's place, which tests/test_evaluation.py looks after."""
    judge = evaluation.evaluate
    seeds = []

    def in_c(policy: Any, simulator: str, n_episodes: int, seed: int, **rest: Any) -> Any:
        assert simulator == "gym_aloha"
        seeds.append(seed)
        return judge(policy, "c", n_episodes, seed, on_episode=rest["on_episode"], on_report=rest["on_report"])

    monkeypatch.setattr(evaluation, "evaluate", in_c)
    directory = Path(shutil.copytree(state_run, tmp_path / "run"))
    config = dataclasses.replace(Config.load(directory / "config.json"), final_eval_episodes=2, final_video=False)
    logger = MetricsLogger(directory, 192, 192, quiet=True)
    report, video = launch.final_evaluation(config, directory, logger)
    logger.close()
    assert video is None
    assert seeds == [launch.FINAL_SEED]
    assert json.loads((directory / "eval" / "report.json").read_text())["n_episodes"] == report.n_episodes == 2
