"""Whatever a user can get wrong on the two command lines ends with status 2 and a line that says what is wrong."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_command
import train
from aloha_jax import cli, launch
from aloha_jax.checkpoints import save_model
from aloha_jax.config import ConfigError
from aloha_jax.host import call_host
from aloha_jax.pixels import RendererUnavailable
from aloha_jax.policy import Policy, init_params, init_stats
from aloha_jax.presets import PRESETS
from aloha_jax.signals import Interrupted

ROOT = Path(__file__).parents[1]

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command line in an empty folder; the line on stderr of one that ends with status 2 and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[list[str]], None], *args: str) -> str:
        before = set(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
            main(list(args))
        captured = capsys.readouterr()
        assert end.value.code == 2
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert len(captured.err) < 400
        assert captured.err.startswith("error: ")
        assert set(tmp_path.rglob("*")) == before
        return captured.err

    return run


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--colour red", "--colour"),
        ("--preset polish", "--init-from"),
        ("--preset pixels", "--preset pixels imitates a teacher: give one, --teacher pretrained/insertion-scratch say"),
        ("--preset cpu --teacher None", "--preset cpu imitates a teacher"),
        ("--preset state --history 4 8", "--history, --observe-target or --privileged-critic, which --preset state does without"),
        ("--preset pixels-polish", "--init-from"),
        ("--preset pixels-finetune", "--init-from"),
        ("--preset pixels-ppo-polish", "--init-from"),
        ("--preset gpu-polish", "--init-from"),
        ("--preset pixels-ppo --no-privileged-critic", "--state-coef needs --privileged-critic"),
        ("--preset pixels-ppo --state-coef -1", "--state-coef"),
        ("--preset state --state-coef 1", "--state-coef needs --privileged-critic"),
        ("--learning-rat 0.1", "--learning-rat"),
        ("--n-envs many", "--n-envs"),
        ("--n-envs 1.5", "--n-envs"),
        ("--learning-rate fast", "--learning-rate"),
        ("--gamma", "--gamma"),
        ("--resume", "--resume: expected one argument"),
        ("--preset", "--preset: expected one argument"),
        ("--task weeding", "--task"),
        ("--obs smell", "--obs"),
        ("--crop 1 2 3", "--crop"),
        ("--conv 8 4", "--conv"),
        ("stray", "stray"),
        ("--preset huge", "--preset"),
        ("--preset=huge", "--preset"),
        ("--device tpu", "--device"),
        ("--n-envs 6 --n-steps 7 --batch-size 8", "--n-envs 6 x --n-steps 7 = 42"),
        ("--image-height 0 --image-width 0", "--image-height"),
        ("--image-width 1000", "--image-width"),
        ("--image-height 20 --image-width 20 --conv 32 8 4 64 4 2 64 3 1", "20x20 picture"),
        ("--crop 400 0 100 100", "--crop"),
        ("--total-timesteps 0", "--total-timesteps"),
        ("--seed -1", "--seed"),
        ("--impl warp", "--impl"),
        ("--engine mjx --impl jax --physics exact", "--physics"),
        ("--renderer vulkan", "--renderer"),
        ("--resume missing", "--resume missing"),
    ],
)
def test_train_refuses(refused: Refused, monkeypatch: pytest.MonkeyPatch, args: str, says: str) -> None:
    monkeypatch.setattr(launch, "execute", pytest.fail)
    assert says in refused(train.main, *args.split())


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_train_refuses_a_gpu_that_is_not_there(refused: Refused) -> None:
    assert "--device gpu" in refused(train.main, "--device", "gpu")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("", "error: --model-path is required; see --help\n"),
        ("--model-path", "--model-path"),
        ("--model-path missing", "--model-path missing does not exist"),
        ("--model-path .", "holds no model"),
        (f"--model-path {__file__}", "holds no model"),
        ("--model-path . --n-episodes 0", "--n-episodes"),
        ("--model-path . --n-episodes ten", "--n-episodes"),
        ("--model-path . --seed -1", "--seed"),
        ("--model-path . --seed 4294967290", "--seed"),  # the tenth episode's is beyond 2^32
        ("--model-path . --sim bullet", "--sim"),
        ("--model-path . --sim c --num-workers 2", "--num-workers"),
        ("--model-path . --sim gazebo", "--sim"),
        ("--model-path . --json missing/report.json", "--json missing/report.json"),
        ("--model-path . --json .", "--json"),
        ("--model-path . --video-path missing/film.mp4", "--video-path missing/film.mp4"),
        ("--model-path . --films", "--films"),
    ],
)
def test_eval_refuses(refused: Refused, args: str, says: str) -> None:
    assert says in refused(eval_command.main, *args.split())


def test_a_terminal_without_frames_gets_the_same_line() -> None:
    program = [sys.executable, str(ROOT / "train.py"), "--n-envs", "many"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    framed, plain = (
        subprocess.run(program, capture_output=True, text=True, env=os.environ | extra, check=False).stderr
        for extra in ({}, ascii_only)
    )
    assert plain == framed == "error: Error parsing --n-envs: invalid literal for int() with base 10: 'many'; see --help\n"


@pytest.mark.parametrize("main", [train.main, eval_command.main])
def test_help_is_no_error(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
        main(["--help"])
    captured = capsys.readouterr()
    assert end.value.code == 0
    assert "--seed" in captured.out
    whose = f"Defaults below are those of --preset {jax.default_backend()}."
    assert main is not train.main or whose in " ".join(captured.out.split())
    assert captured.err == ""


@pytest.mark.parametrize(
    ("script", "args", "platform", "says"),
    [
        ("eval.py", ["--model-path", "missing"], "cpu", "--model-path missing does not exist"),
        ("train.py", [], "typewriter", "typewriter"),  # JAX chooses its platform once per process
    ],
)
def test_the_scripts_themselves_end_with_status_2(tmp_path: Path, script: str, args: list[str], platform: str, says: str) -> None:
    command, env = [sys.executable, str(ROOT / script), *args], os.environ | {"JAX_PLATFORMS": platform}
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (end.returncode, end.stdout) == (2, "")
    assert end.stderr.startswith("error: ")
    assert len(end.stderr.splitlines()) == 1
    assert says in end.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, ": choose another place"),
        (errno.EROFS, ": choose another place"),
        (errno.EEXIST, "move away what is there"),
        (errno.EISDIR, "move away what is there"),
    ],
)
def test_a_storage_error_names_the_file_and_the_remedy(capsys: pytest.CaptureFixture[str], number: int, remedy: str) -> None:
    with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
        raise OSError(number, os.strerror(number), "/run/checkpoints/64")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert len(error.splitlines()) == 1
    assert os.strerror(number) in error
    assert "/run/checkpoints/64" in error
    assert remedy in error


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_ctrl_c_during_the_imports_prints_no_traceback(script: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / script)]
    # A suite that a script runs in the background ignores Ctrl-C, as would, rightly, a training that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while "gymnasium." not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate()
        finally:
            process.kill()
            signal.signal(signal.SIGINT, before)
    assert process.returncode == -signal.SIGINT  # of which shells make 130
    assert printed == ""
    assert "Traceback" not in errors


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_that_nobody_reads_to_its_end_is_no_error(script: str) -> None:
    command = [sys.executable, str(ROOT / script), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory"),
        jax.errors.JaxRuntimeError("UNKNOWN: FFI callback error: RuntimeError: Failed to allocate 1024 bytes on device 'cuda:0'"),
        RuntimeError("Failed to allocate 1024 bytes on device 'cuda:0'"),
    ],
)
def test_out_of_memory_says_what_to_lower(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
        raise error
    assert end.value.code == 2
    assert "--n-envs" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize(("trains", "more"), [(False, ""), (True, ", or lower --n-envs")])
def test_a_renderer_lost_inside_a_callback_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], trains: bool, more: str, lost: int
) -> None:
    died = "render worker 7 was killed by SIGKILL, the 3rd over one batch: free some memory"

    def draw(x: np.ndarray) -> np.ndarray:
        if x == lost:
            raise RendererUnavailable(died)
        return x

    program = jax.jit(lambda x: call_host(draw, jax.ShapeDtypeStruct((), x.dtype), x))
    for step in range(lost):  # once it has run, JAX raises another exception
        program(jnp.float32(step)).block_until_ready()
    with pytest.raises(SystemExit) as end, cli.user_errors(trains):
        program(jnp.float32(lost)).block_until_ready()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {died}{more}\n"


@pytest.mark.parametrize(
    ("trains", "more"), [(False, ""), (True, "; --renderer warp with --final-eval-episodes 0 trains without it")]
)
def test_what_does_without_opengl_is_told_to_who_trains(capsys: pytest.CaptureFixture[str], trains: bool, more: str) -> None:
    with pytest.raises(SystemExit), cli.user_errors(trains):
        raise RendererUnavailable("OpenGL does not work here: install EGL")
    assert capsys.readouterr().err == f"error: OpenGL does not work here: install EGL{more}\n"


def test_a_terminal_can_be_written_to_where_its_folder_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/dev")  # root may write everywhere
    cli.require_writable("--json", Path("/dev/null"), in_place=True)
    with pytest.raises(ConfigError, match="--video-path /dev/null is no file"):
        cli.require_writable("--video-path", Path("/dev/null"))
    with pytest.raises(ConfigError, match=r"--json /dev/report\.json"):
        cli.require_writable("--json", Path("/dev/report.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_the_shells_status(capsys: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
        raise Interrupted(number, "stopped; to go on: train.py --resume x")
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == "error: stopped; to go on: train.py --resume x\n"


def test_an_interruption_has_the_shells_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, cli.user_errors(trains=True):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_does_not_train_speaks_of_no_checkpoints(capsys: pytest.CaptureFixture[str], error: BaseException) -> None:
    with pytest.raises(SystemExit), cli.user_errors():
        raise error
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert not any(word in message for word in ("checkpoint", "--resume", "--n-envs"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("bug"), jax.errors.JaxRuntimeError("INTERNAL: bug")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), cli.user_errors(trains=True):
        raise error


def test_flags_override_the_preset() -> None:
    config, given = cli.parse_config(
        ["--preset", "smoke", "--n_envs", "8", "--no-normalize-obs", "--no_final_video", "--crop", "None"]
    )
    smoke = PRESETS["smoke"]
    assert (config.n_envs, config.normalize_obs, config.crop) == (8, False, None)
    assert (config.n_steps, config.features_dim) == (smoke.n_steps, smoke.features_dim)
    assert given == {"preset", "n_envs", "normalize_obs", "final_video", "crop"}


def test_auto_chooses_the_preset_of_the_machine() -> None:
    config, given = cli.parse_config([])
    assert config == PRESETS[jax.default_backend()]
    assert given == set()


def test_flags_of_the_guide_keep_their_names() -> None:
    args = (
        "--total-timesteps 640 --log-dir x --learning-rate 1e-3 --n-envs 2 --n-steps 8 --batch-size 4 --n-epochs 3 "
        "--ent-coef 0.1 --gamma 0.9 --checkpoint-freq 7 --features-dim 9 --device cpu --seed 5"
    )
    config, _ = cli.parse_config(args.split())
    assert (config.total_timesteps, config.log_dir, config.learning_rate, config.n_envs) == (640, "x", 1e-3, 2)
    assert (config.n_steps, config.batch_size, config.n_epochs, config.ent_coef, config.gamma) == (8, 4, 3, 0.1, 0.9)
    assert (config.checkpoint_freq, config.features_dim, config.device, config.seed) == (7, 9, "cpu", 5)


def test_a_default_and_a_flag_agree_on_types() -> None:
    """What the command line makes can be written down and read again: no lists where tuples belong."""
    args = "--preset smoke --conv 8 4 2 16 3 1 --hidden-sizes 5 6 --crop 0 0 100 100"
    config, _ = cli.parse_config(args.split())
    assert (config.conv, config.hidden_sizes, config.crop) == (((8, 4, 2), (16, 3, 1)), (5, 6), (0, 0, 100, 100))
    assert type(config).from_json(config.to_json()) == config


def test_parse_raises_before_anything_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        cli.parse(eval_command.Flags, ["--model-path"])
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = dataclasses.replace(PRESETS["smoke"], obs="state", episode_length=3)
    save_model(tmp_path / "model", Policy(config, init_params(config, jax.random.key(0)), init_stats(config)))
    return tmp_path / "model"


def test_eval_without_opengl(model: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "4711")
    assert "OpenGL" in refused(eval_command.main, "--model-path", str(model), "--json", str(model.parent / "report.json"))


def test_eval_of_a_model_whose_video_has_no_place(model: Path, refused: Refused) -> None:
    (model / "videos").write_text("a file where a folder should be")
    error = refused(eval_command.main, "--model-path", str(model), "--sim", "c", "--n-episodes", "1", "--save-video")
    assert str(model / "videos") in error


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_an_opengl_that_does_not_exist_is_refused_before_anything_else(script: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "MUJOCO_GL": "nonsense"}
    command = [sys.executable, str(root / script), "--help"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: MUJOCO_GL=nonsense")
