"""The command line: flags from dataclasses (tyro), and what a user can get wrong as one sentence and exit status 2."""

import argparse
import contextlib
import dataclasses
import errno
import io
import logging
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import tyro

from aloha_jax import checkpoints, startup
from aloha_jax.checkpoints import CheckpointError
from aloha_jax.config import MAX_EPISODES, Config, ConfigError, require_single_precision
from aloha_jax.pixels import RendererUnavailable
from aloha_jax.presets import PRESETS
from aloha_jax.run import Diverged
from aloha_jax.settings import LaterStage
from aloha_jax.signals import Interrupted

T = TypeVar("T")

# What cannot be written, and what to do about it.
STORAGE_ERRORS = (
    dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another place")
    | dict.fromkeys((errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP), "choose another place")
    | dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move away what is there or choose another place")
)


def parse(kind: type[T], args: Sequence[str], default: T | None = None, description: str = "") -> T:
    """Flags as a dataclass; `--help` prints and exits.

    Raises:
        ConfigError: a flag is unknown or ill-typed.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return cast(T, tyro.cli(kind, args=args, default=default, description=description))
    except BrokenPipeError:  # `--help | head`
        _print_into_the_void()
        raise SystemExit(0) from None
    except SystemExit as error:
        if error.code == 0:
            raise
        raise ConfigError(_one_line(errors.getvalue())) from None


def parse_config(args: Sequence[str]) -> tuple[Config, set[str]]:
    """The configuration of a training run, validated unless it is to be resumed, and the names of the settings given as flags.

    Raises:
        ConfigError: a flag is wrong.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    chooser.add_argument("--preset", default="auto")
    chooser.add_argument("--device", default="auto")
    chooser.add_argument("--resume")
    try:
        chosen, _ = chooser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}; see --help") from None
    _check_choice("preset", chosen.preset)
    _check_choice("device", chosen.device)
    preset = chosen.preset
    if preset == "auto":  # a run that is resumed has its own, and its own device
        preset = "gpu" if chosen.resume is None and choose_device(chosen.device) == "gpu" else "cpu"
    description = f"Train a policy with PPO; docs: README.md. Defaults below are those of --preset {preset}."
    config = parse(Config, args, default=PRESETS[preset], description=description)
    given = {word[2:].split("=")[0].replace("-", "_").removeprefix("no_") for word in args if word.startswith("--")}
    given &= {field.name for field in dataclasses.fields(Config)}
    if preset in typing.get_args(LaterStage) and config.init_from is None and config.resume is None:
        raise ConfigError(f"--preset {preset} goes on from a policy that inserts: give it with --init-from")
    if PRESETS[preset].learns_from_teacher and config.learns_from_teacher and config.teacher is None and config.resume is None:
        raise ConfigError(
            f"--preset {preset} imitates a teacher: give one, --teacher pretrained/insertion-scratch say, "
            "or learn without one by --preset pixels-ppo"
        )
    # A run that is resumed has settings of its own, which need not fit those of the command line; `auto` fits any.
    if config.resume is not None:
        return config, given
    return dataclasses.replace(config, preset=preset).validate(), given


def choose_device(name: str) -> str:
    """Make JAX use `cpu` or `gpu`; `auto` leaves the choice to JAX. Returns the platform in use.

    Raises:
        ConfigError: there is no GPU, or JAX has been told to compute with 64 bits.
    """
    require_single_precision()
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        platform = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the environment variable JAX_PLATFORMS names something that is not there
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise ConfigError(f"JAX finds no device to run on, {asked}{f': {error}' if str(error) else ''}") from None
    if name == "gpu" and platform != "gpu":
        raise ConfigError(
            "--device gpu: JAX sees no GPU here; install its CUDA build (`uv sync --extra cuda`, or "
            "`pip install 'jax[cuda13]'`), or use --device cpu"
        )
    return platform


@contextlib.contextmanager
def user_errors(trains: bool = False) -> Iterator[None]:
    """Turns what a user can get wrong into one sentence on stderr and exit status 2; bugs keep their traceback.

    Args:
        trains: whether there may be checkpoints to go on from, and worlds to have fewer of.
    """
    intact = "; checkpoints already written are intact" if trains else ""
    out_of_memory = "out of memory" + (": lower --n-envs or --n-steps, or give --microbatch-size" if trains else "") + intact
    startup.raise_when_interrupted()
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)  # logs what a callback raised, and then raises it
    checkpoints.silence_orbax()
    _print_anything()
    try:
        yield
    except RendererUnavailable as error:
        _fail(_of_renderer(str(error), trains))
    except (ConfigError, CheckpointError, Diverged) as error:
        _fail(str(error))
    except Interrupted as error:
        _fail(str(error), error.status)
    except BrokenPipeError:  # whoever read what we print, as `head`, has seen enough
        _print_into_the_void()
    except OSError as error:
        _fail(_of_storage(error) + intact)
    except MemoryError:
        _fail(out_of_memory)
    except (RuntimeError, ValueError) as error:  # JAX's, from a callback either, and Warp's
        _fail(_of_runtime(error, trains, out_of_memory))
    except KeyboardInterrupt:
        _fail("interrupted" + ("; if there is a checkpoint, --resume goes on from it" if trains else ""), status=130)


def require_episodes(n_episodes: int, seed: int, num_workers: int = 1) -> None:
    """Refuse what cannot be judged.

    Raises:
        ConfigError: naming the flag.
    """
    if not 1 <= n_episodes <= MAX_EPISODES:
        raise ConfigError(f"--n-episodes must lie in 1..{MAX_EPISODES}, got {n_episodes}")
    if num_workers < 1:
        raise ConfigError(f"--num-workers must be at least 1, got {num_workers}")
    if not 0 <= seed < 2**32 - n_episodes:
        raise ConfigError(f"--seed must lie in 0..{2**32 - n_episodes - 1}, got {seed}")


def require_writable(flag: str, path: Path, in_place: bool = False) -> None:
    """Raises `ConfigError` before the work if its result could not be written; `in_place`: a terminal or a pipe will do, too."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag} {path}: there is no such folder")
    special = path.exists() and not path.is_file()
    if path.is_dir() or (special and not in_place) or not os.access(path if special else folder, os.W_OK):
        raise ConfigError(f"{flag} {path} is {'no file' if special else 'in a folder that cannot be written'}")


def _print_anything() -> None:
    """A path may have letters that the terminal does not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _of_storage(error: OSError) -> str:
    """What could not be written, and what to do; any other error is a bug, and raised again."""
    if error.errno not in STORAGE_ERRORS:
        raise error
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{place}: {STORAGE_ERRORS[error.errno]}"


def _of_renderer(message: str, trains: bool) -> str:
    """Why nothing can be drawn, and what helps whoever trains."""
    remedies = {
        "OpenGL does not work": "; --renderer warp with --final-eval-episodes 0 trains without it",
        "free some memory": ", or lower --n-envs",
    }
    return message + "".join(remedy for cause, remedy in remedies.items() if trains and cause in message)


def _of_runtime(error: Exception, trains: bool, out_of_memory: str) -> str:
    """What JAX and Warp say of a machine's limits; any other error is a bug, and raised again."""
    if unavailable := re.search(r"RendererUnavailable: (.+)", str(error)):  # raised in a callback
        return _of_renderer(unavailable[1], trains)
    if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Failed to allocate")):
        raise error
    return out_of_memory


def _print_into_the_void() -> None:
    """From now on; at exit Python would complain of what it could not flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int = 2) -> typing.NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def _check_choice(name: str, value: Any) -> None:
    choices = typing.get_args(typing.get_type_hints(Config)[name])
    if value not in choices:
        raise ConfigError(f"--{name} is one of {', '.join(choices)}; not {value!r}")


def _one_line(text: str) -> str:
    """The framed message of tyro as one line."""
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│─╭╮╰╯]|-{9,}", " ", text).split())
    plain = re.sub(r"(Perhaps you meant: --\S+).*", r"\1", plain)
    plain = re.sub(r"^Required options Missing from \S+ (--\S+).*", r"\1 is required", plain)
    plain = re.split(r" Argument helptext:| Got errors:| For full helptext| Similar arguments:", plain)[0]
    return (
        re.sub(r"^(Parsing error|Value error|Invalid choice|Unrecognized options|Missing (?:value|argument)) ", "", plain).strip()
        + "; see --help"
    )
