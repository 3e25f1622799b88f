"""Rollout videos: what the camera saw, what the policy saw, and what the task said. The only file that knows imageio."""

import contextlib
import errno
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as iio
import imageio_ffmpeg  # type: ignore[import-untyped]
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FPS = 50  # control steps per second: real time
PANEL_WIDTH = 240  # pixels, beside the camera's frame
LEVEL_NAMES = ("approaching", "both touched", "both lifted", "peg at socket", "inserted")


def compose(frame: np.ndarray, view: np.ndarray | None, step: int, level: int, best_level: int) -> np.ndarray:
    """One video frame, uint8[480, 880, 3]: the camera's frame with step and level, beside it the policy's own view.

    Args:
        frame: uint8[480, 640, 3], the top camera.
        view: uint8[H, W, 3], the policy's picture; None for a policy that sees none.
        step: control steps since the episode's start.
        level: official level of this step.
        best_level: highest level so far.
    """
    canvas = Image.new("RGB", (frame.shape[1] + PANEL_WIDTH, frame.shape[0]), (18, 18, 18))
    canvas.paste(Image.fromarray(frame), (0, 0))
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(22), ImageFont.load_default(15)
    draw.text((12, 10), f"step {step:3d}   level {level}", font=large, fill="white", stroke_width=2, stroke_fill="black")
    left = frame.shape[1] + 8
    if view is not None:
        scale = (PANEL_WIDTH - 16) / max(view.shape[:2])
        size = (max(1, round(view.shape[1] * scale)), max(1, round(view.shape[0] * scale)))
        canvas.paste(Image.fromarray(view).resize(size, Image.Resampling.NEAREST), (left, 36))
        draw.text((left, 10), f"policy's view {view.shape[0]}x{view.shape[1]}", font=small, fill="white")
    for i, name in enumerate(LEVEL_NAMES):
        reached = i <= best_level
        draw.text((left, 290 + 26 * i), f"{'*' if reached else '-'} {i} {name}", font=small, fill="white" if reached else "gray")
    return np.asarray(canvas)


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int = FPS) -> None:
    """Encode uint8[H, W, 3] frames as H.264, one at a time; the file appears under its name once it is complete.

    Raises:
        OSError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part.mp4")
    try:
        options: Any = {"format": "FFMPEG", "fps": fps, "codec": "libx264", "quality": 7, "macro_block_size": 16}
        options["ffmpeg_log_level"] = "quiet"
        # The writer's own `with` closes only after success.
        with _fork_is_harmless(), contextlib.closing(iio.get_writer(unfinished, **options)) as writer:
            for frame in frames:
                writer.append_data(frame)
        _check(unfinished, path)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _fork_is_harmless() -> Iterator[None]:
    """The package imageio_ffmpeg forks, sets a process group and executes ffmpeg: no lock of JAX is ever waited for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        yield


def _check(video: Path, name: Path) -> None:
    """Ffmpeg fails without a word where imageio starts it: an mp4 that was cut short has no index, and cannot be read."""
    try:
        imageio_ffmpeg.count_frames_and_secs(str(video))
    except RuntimeError:
        raise OSError(errno.ENOSPC, "The video could not be written to its end; is the disk full?", str(name)) from None


def gif_bytes(frames: Sequence[np.ndarray], fps: int = 25) -> bytes:
    """An animated GIF of uint8[H, W, 3] frames, as TensorBoard shows them."""
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()
