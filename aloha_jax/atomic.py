"""Files and directories that change in one instant: whoever looks, or is killed, finds the older or the newer."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # <fcntl.h>, <linux/fs.h>, macOS's <sys/stdio.h>


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` to be filled, which then takes its place; after an exception it is gone instead."""
    fresh, stale = _beside(target)
    if stale.exists() and not target.exists():  # killed between the two renames below
        os.rename(stale, target)
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not target.exists():
        os.rename(fresh, target)
    elif _exchange(fresh, target):
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        os.rename(target, stale)
        os.rename(fresh, target)
        shutil.rmtree(stale, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, which appears, or is replaced, once it is complete. What is no file, as a terminal, is written to."""
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    path = path.resolve()  # a link stays one
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """An existing directory kept from others who claim it; ends with the process at the latest, however that ends.

    Raises:
        BlockingIOError: someone else has it, or has just put another in its place.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks: nothing is kept from anybody there, and nothing else is wrong
            pass
        if not (directory.exists() and os.path.samestat(os.fstat(descriptor), os.stat(directory))):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(directory))
        yield
    finally:
        os.close(descriptor)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one system call; False where the system or the file system has none."""
    first, second = os.fsencode(a), os.fsencode(b)
    if hasattr(_LIBC, "renameat2"):
        failed = _LIBC.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
    elif hasattr(_LIBC, "renamex_np"):
        failed = _LIBC.renamex_np(first, second, _RENAME_SWAP)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))
