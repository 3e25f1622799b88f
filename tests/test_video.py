"""Videos: what is written on them, and that they are files others can read."""

import io
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from aloha_jax.video import FPS, compose, gif_bytes, write_mp4
from tests.tiny_disk import tiny_disk

FRAME = np.full((480, 640, 3), 90, np.uint8)
VIEW = np.zeros((32, 64, 3), np.uint8)
VIEW[:, :32] = (255, 0, 0)


def test_a_picture_shows_the_camera_and_the_policys_view() -> None:
    picture = compose(FRAME, VIEW, step=1, level=0, best_level=0)
    assert picture.shape == (480, 880, 3)
    assert picture.dtype == np.uint8
    assert (picture[60:, :640] == 90).all()  # nothing covers the camera's frame but the caption
    panel = picture[:, 640:].reshape(-1, 3)
    red = int((panel == (255, 0, 0)).all(axis=1).sum())
    assert red == 112 * 112  # half of 64x32, enlarged 3.5 times: sharp, and in proportion
    assert not (compose(FRAME, None, 1, 0, 0)[:, 640:].reshape(-1, 3) == (255, 0, 0)).all(axis=1).any()


@pytest.mark.parametrize("other", [{"step": 2}, {"level": 1}, {"best_level": 1}])
def test_step_level_and_progress_are_written_on_it(other: dict[str, int]) -> None:
    same: dict[str, int] = {"step": 1, "level": 0, "best_level": 0}
    assert (compose(FRAME, VIEW, **same) != compose(FRAME, VIEW, **(same | other))).any()
    assert (compose(FRAME, VIEW, **same) == compose(FRAME, VIEW, **same)).all()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio's reader
def test_an_mp4_can_be_read_back(tmp_path: Path) -> None:
    frames = [compose(np.full_like(FRAME, 20 * i), VIEW, i, 0, 0) for i in range(8)]
    path = tmp_path / "videos" / "film.mp4"
    write_mp4(path, frames)
    back = iio.imread(path, plugin="FFMPEG")
    assert back.shape == (8, 480, 880, 3)
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == FPS
    np.testing.assert_allclose(back[:, 100:, :600].mean(axis=(1, 2, 3)), 20 * np.arange(8), atol=3)
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_film_leaves_the_older(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match="same size"):
        write_mp4(path, [np.zeros((480, 880, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)])
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    with tiny_disk(tmp_path / "disk") as disk:
        path = disk / "film.mp4"
        path.write_bytes(b"older")
        frames = (noise.integers(0, 256, (480, 880, 3), dtype=np.uint8) for _ in range(20))
        with pytest.raises(OSError, match="is the disk full"):
            write_mp4(path, frames)
        assert path.read_bytes() == b"older"
        assert list(disk.iterdir()) == [path]


def test_a_gif_plays_every_frame() -> None:
    frames = [np.full((8, 12, 3), value, np.uint8) for value in (0, 100, 200)]
    with Image.open(io.BytesIO(gif_bytes(frames))) as image:
        assert getattr(image, "n_frames", 1) == 3
        assert image.size == (12, 8)
        image.seek(2)
        assert np.asarray(image.convert("RGB"))[0, 0].tolist() == [200, 200, 200]
