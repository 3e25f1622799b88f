"""`--profile`: where the time of a few updates goes, for TensorBoard's profile tab or ui.perfetto.dev."""

import os
from pathlib import Path
from typing import Any

import jax

from aloha_jax.config import Config, ConfigError

UPDATES = 3  # recorded, after the first, which compiles


def require_profile(config: Config) -> None:
    """Raises `ConfigError` if no profile could be written: JAX says so after the updates, with a traceback. Makes nothing."""
    if config.profile is None:
        return
    directory = Path(config.profile).absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"--profile {config.profile}: {there} is a file, or cannot be written")


class Profiler:
    """Records updates 2 to 4 of a run with JAX's profiler; does nothing without a directory."""

    def __init__(self, directory: str | None):
        self._directory = directory
        self._update, self._recording = 0, False

    def before_update(self) -> None:
        """Starts recording when the first update is done."""
        if self._directory is not None and self._update == 1:
            jax.profiler.start_trace(self._directory)
            self._recording = True

    def after_update(self, result: Any) -> None:
        """Counts an update; after the last one to record, waits for its `result` and writes the profile."""
        self._update += 1
        if self._update == 1 + UPDATES:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if a run ends early."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
