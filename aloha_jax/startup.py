"""What must be settled before MuJoCo is imported and before anything is compiled."""

import importlib
import math
import os
import pathlib
import signal
import sys
import tempfile
import time

_STARTED = time.monotonic()


def seconds_since_start() -> float:
    """Seconds since this module was imported, which the package does first."""
    return time.monotonic() - _STARTED


CGROUP = pathlib.Path("/sys/fs/cgroup")  # where a container finds its limits (Linux's control groups, version 2)


def usable_cores() -> int:
    """CPU cores that this process may use, as many as a container's quota pays for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (*container_limit("cpu.max"), None, None)[:2]
    return cores if quota is None or not period else min(cores, max(1, math.ceil(quota / period)))


def container_limit(name: str) -> tuple[int | None, ...]:
    """The numbers in a control group's file, None for `max`; nothing where there is no such file."""
    try:
        return tuple(None if word == "max" else int(word) for word in (CGROUP / name).read_text().split())
    except (OSError, ValueError):
        return ()


def raise_when_interrupted() -> None:
    """From now on Ctrl-C raises `KeyboardInterrupt` again, if the entry point made it end the process."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def remember_compilations() -> None:
    """Keep what XLA compiles in the user's cache folder, unless the user chose another; Warp does so on its own.

    Programs with host callbacks, which are those that hold the C engine or OpenGL, JAX keeps from 0.11 (Python 3.12) on.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_user_cache() / "aloha_jax" / "xla"))  # JAX reads it when imported


def _user_cache() -> pathlib.Path:
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches"
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError:  # a container's user without a home
        return pathlib.Path(tempfile.gettempdir())


def require_opengl() -> None:
    """Import MuJoCo, which loads the OpenGL that MUJOCO_GL names; if it fails, exit with status 2 and one line."""
    try:
        importlib.import_module("mujoco")
    except Exception as error:  # whatever PyOpenGL and MuJoCo make of a library that is missing or misnamed
        choice = os.environ.get("MUJOCO_GL", "")
        reason = " ".join(str(error).split())
        remedy = "unset it, or set it to egl (libegl1 libgl1) or osmesa (libosmesa6)"
        print(f"error: MUJOCO_GL={choice} does not work here ({reason}): {remedy}", file=sys.stderr)
        raise SystemExit(2) from None
