"""A run's directory: made once, written by one training at a time, and what going on in it must not contradict."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from aloha_jax import checkpoints
from aloha_jax.atomic import claimed, replacing
from aloha_jax.checkpoints import CheckpointError
from aloha_jax.config import Config, ConfigError

# What a resumed run may be given anew, beside a longer `total_timesteps`; every other setting is the run's own.
ANEW = ("device", "final_eval_episodes", "final_video")


def check_directory(config: Config) -> None:
    """Refuse, before anything is done, what `prepare_directory` would have to refuse.

    Raises:
        ConfigError: `log_dir` is a file, holds something that must not be deleted, or is no place for a run.
    """
    directory = Path(config.log_dir)
    whole = directory.resolve()
    if whole == Path.cwd():
        raise ConfigError(f"--log-dir {directory} is the folder you are in: give the run one of its own")
    if set(str(whole)) & set("[]\\"):  # TensorStore's databases are found by patterns
        raise ConfigError(f"--log-dir {whole}: Orbax loses checkpoints in a path with [, ] or a backslash; choose another place")
    for name in ("init_from", "teacher"):
        model = getattr(config, name)
        if config.overwrite and model is not None and Path(model).resolve().is_relative_to(whole):
            raise ConfigError(
                f"--{name.replace('_', '-')} {model} is a part of what --overwrite deletes: choose another --log-dir"
            )
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--log-dir {directory} is a file")
    if directory.is_dir() and any(directory.iterdir()):
        if not config.overwrite:
            raise ConfigError(f"--log-dir {directory} is not empty: choose another, --resume {directory}, or --overwrite")
        _refuse_to_delete_strangers(directory)


def prepare_directory(config: Config) -> Path:
    """Make the run directory of a new run and write down how it was started.

    Raises:
        ConfigError: it exists already, or cannot be written.
    """
    directory = Path(config.log_dir)
    check_directory(config)
    try:
        with replacing(directory.resolve()) as fresh:
            write_down(config, fresh)
    except OSError as error:
        raise ConfigError(f"cannot write --log-dir {directory}: {error.strerror or error}") from None
    return directory


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[bool]:
    """No other training in that directory; False if there is none yet.

    Raises:
        ConfigError: there is one.
    """
    with contextlib.ExitStack() as claim:
        exists = directory.is_dir()
        try:
            if exists:
                claim.enter_context(claimed(directory))
        except BlockingIOError:
            raise ConfigError(f"another training runs in {directory}: wait for its end, or choose another place") from None
        yield exists


def identity(directory: Path) -> tuple[int, int] | None:
    """What tells a run's directory from another of the same name, as long as it is claimed; None where there is no run."""
    if not (directory / "config.json").exists():
        return None
    found = directory.stat()
    return found.st_dev, found.st_ino


def require_same(directory: Path, before: tuple[int, int] | None) -> None:
    """What a run writes belongs into its own directory, not into one that took its name, nor into the rest of one.

    Raises:
        ConfigError: it was deleted or moved.
    """
    if identity(directory) != before:
        raise ConfigError(f"{directory} was deleted or moved away while it was trained there: what came after is lost")


def write_down(config: Config, directory: Path) -> None:
    """`config.json`, and one more line in `command.txt`."""
    fresh = directory / ".config.json.new"
    fresh.write_text(config.to_json() + "\n")
    fresh.replace(directory / "config.json")
    with (directory / "command.txt").open("a") as file:
        file.write(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\n")


def _refuse_to_delete_strangers(directory: Path) -> None:
    """--overwrite deletes runs, not whatever a mistyped path holds."""
    missing = [name for name in ("config.json", "command.txt") if not (directory / name).exists()]
    if missing:
        raise ConfigError(f"--overwrite: {directory} holds no run (no {missing[0]}); delete it yourself if that is meant")


def resumed_config(directory: Path, flags: Config, given: set[str]) -> Config:
    """The saved configuration of a run, with a longer `total_timesteps` and what of `ANEW` was given.

    Args:
        directory: the run.
        flags: the configuration from the command line.
        given: names of the settings that were given there.

    Raises:
        ConfigError: the run does not exist or a flag contradicts it.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"--resume {directory} is not a run directory: it has no config.json")
    if (directory / "policy").is_dir():
        raise ConfigError(f"--resume {directory} is a model, not a run: --init-from starts a run from it")
    if checkpoints.latest_checkpoint(directory) is None:
        raise CheckpointError(
            f"--resume {directory}: no complete checkpoint in its folder; --init-from starts from a model, if it has one"
        )
    saved = dataclasses.replace(Config.load(directory / "config.json"), log_dir=str(directory))
    if Path(flags.log_dir).resolve() == directory.resolve():  # in other words
        given = given - {"log_dir"}
    for name in sorted(given - {"resume", "total_timesteps", "profile", *ANEW}):
        old, new = getattr(saved, name), getattr(flags, name)
        if new not in (old, "auto"):  # the run has what was found then
            raise ConfigError(f"--{name.replace('_', '-')} {new} contradicts the run, which has {old}: leave the flag out")
    total = flags.total_timesteps if "total_timesteps" in given else saved.total_timesteps
    if total < saved.total_timesteps:
        raise ConfigError(f"--total-timesteps {total} is less than the run's own {saved.total_timesteps}")
    anew = {name: getattr(flags, name) for name in ANEW if name in given}
    return dataclasses.replace(saved, total_timesteps=total, profile=flags.profile, **anew).validate()
