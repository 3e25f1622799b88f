"""Pictures: as gym_aloha draws them, wherever and however many are drawn."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import gym_aloha  # noqa: F401 - registers the environment
import gymnasium
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from aloha_jax import hints, scene, visual
from aloha_jax.conditions import Condition
from aloha_jax.decimation import cluster_vertices
from aloha_jax.pixels import RendererUnavailable, egl, frame_to_observation, make_renderer
from aloha_jax.pixels.egl import WORKER, EglRenderer, gl_renderer_string
from aloha_jax.pixels.triangles import triangulate
from aloha_jax.visual import Crop

TABLE: Crop = (150, 140, 170, 360)
CAMERA_SHIFT = (0.02, -0.01)


@pytest.fixture(scope="module")
def gym_aloha_frames() -> tuple[np.ndarray, np.ndarray]:
    """Joint positions float64[4, 30] and gym_aloha's own frames uint8[4, 480, 640, 3]: starts, moved arms, lifted objects."""
    env = gymnasium.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels", disable_env_checker=True)
    physics = env.unwrapped._env.physics  # type: ignore[attr-defined]
    poses, frames = [], []

    def keep(frame: np.ndarray) -> None:
        poses.append(physics.data.qpos.copy())
        frames.append(frame)

    for seed in (0, 1):
        observation, _ = env.reset(seed=seed)
        keep(observation["top"])
    for _ in range(4):
        observation, *_ = env.step(np.array([0.4, -0.6, 0.9, 0.5, -0.1, 0.3, 1.0] + [-0.5, -0.4, 1.3, 0.0, 0.4, 0.0, 0.5]))
    keep(observation["top"])
    physics.data.qpos[scene.PEG_QPOS] = (0.1, 0.5, 0.15, 0.966, 0.0, 0.0, 0.259)
    physics.data.qpos[scene.SOCKET_QPOS] = (-0.05, 0.5, 0.15, 1.0, 0.0, 0.0, 0.0)
    physics.forward()
    keep(physics.render(height=480, width=640, camera_id="top"))
    env.close()
    return np.array(poses), np.array(frames)


@pytest.fixture
def frame_of_moved_camera() -> tuple[np.ndarray, np.ndarray]:
    """gym_aloha's start float64[1, 32] and frame uint8[1, 480, 640, 3] with the camera 2 cm along x and -1 cm along y."""
    env = gymnasium.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels", disable_env_checker=True)
    env.reset(seed=0)
    physics = env.unwrapped._env.physics  # type: ignore[attr-defined]
    Condition(camera_shift=CAMERA_SHIFT).change_model(physics)
    physics.forward()
    pose, frame = physics.data.qpos.copy(), physics.render(height=480, width=640, camera_id="top")
    env.close()
    return np.array([[*pose, *CAMERA_SHIFT]]), frame[None]


@pytest.fixture(scope="module")
def renderer() -> Iterator[EglRenderer]:
    with make_renderer("egl", "insertion", 48, 64, num_workers=2) as renderer:
        assert isinstance(renderer, EglRenderer)
        yield renderer


@pytest.fixture(scope="module")
def poses() -> np.ndarray:
    """Seven poses float64[7, 30] that differ in every arm joint and in where the objects lie."""
    rng = np.random.default_rng(0)
    model = visual.make_visual_model()
    poses = np.tile(model.key_qpos[0], (7, 1))
    poses[:, scene.ARM_QPOS["left"]] += rng.uniform(-0.4, 0.4, (7, 6))
    poses[:, scene.ARM_QPOS["right"]] += rng.uniform(-0.4, 0.4, (7, 6))
    poses[:, scene.PEG_QPOS.start] -= rng.uniform(0, 0.1, 7)
    poses[:, scene.SOCKET_QPOS.start] += rng.uniform(0, 0.1, 7)
    return poses


def similarity(ours: np.ndarray, theirs: np.ndarray) -> float:
    return min(structural_similarity(a, b, channel_axis=2) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("quality", "size", "at_least"),
    [
        ("fast", (120, 160), 0.95),
        ("fast", (84, 84), 0.94),
        ("fast", (64, 64), 0.94),
        ("shadows", (84, 84), 0.97),
        ("shadows", (120, 160), 0.97),
    ],
)
def test_pictures_look_like_gym_aloha(
    gym_aloha_frames: tuple[np.ndarray, np.ndarray], quality: str, size: tuple[int, int], at_least: float
) -> None:
    poses, frames = gym_aloha_frames
    expected = [frame_to_observation(frame, *size) for frame in frames]
    with make_renderer("egl", "insertion", *size, num_workers=1, quality=quality) as renderer:
        pictures = renderer.render(poses)
    assert similarity(pictures, np.array(expected)) >= at_least
    assert similarity(pictures, np.array(expected[1:] + expected[:1])) < at_least, "another pose passes, too: the test is blind"


def test_exact_quality_is_gym_alohas_frame(gym_aloha_frames: tuple[np.ndarray, np.ndarray]) -> None:
    poses, frames = gym_aloha_frames
    with make_renderer("egl", "insertion", 480, 640, num_workers=1, quality="exact") as renderer:
        pictures = renderer.render(poses[2:])
    np.testing.assert_array_equal(pictures, frames[2:])


def test_each_picture_may_have_the_camera_elsewhere(frame_of_moved_camera: tuple[np.ndarray, np.ndarray]) -> None:
    moved, frame = frame_of_moved_camera
    in_place = np.pad(moved[:, :-2], ((0, 0), (0, 2)))
    with make_renderer("egl", "insertion", 480, 640, num_workers=1, quality="exact") as renderer:
        pictures = renderer.render(np.concatenate([moved, in_place, moved]))
        np.testing.assert_array_equal(pictures[[0, 2]], [frame[0]] * 2)
        np.testing.assert_array_equal(pictures[1:2], renderer.render(moved[:, :-2]))
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("crop", [(0, 0, 480, 640), TABLE, (300, 0, 101, 77), (0, 500, 200, 140)])
def test_a_crop_is_a_part_of_the_frame(gym_aloha_frames: tuple[np.ndarray, np.ndarray], crop: Crop) -> None:
    """Without resizing, so that only a wrong frustum can make a difference: half a pixel off is an error of 1 and more."""
    poses, frames = gym_aloha_frames
    expected = np.array([frame_to_observation(frame, *crop[2:], crop) for frame in frames[2:3]])
    with make_renderer("egl", "insertion", *crop[2:], crop, num_workers=1, quality="exact") as renderer:
        pictures = renderer.render(poses[2:3])
    assert np.abs(pictures.astype(int) - expected).mean() < 0.05


def test_a_crop_may_be_stretched(gym_aloha_frames: tuple[np.ndarray, np.ndarray]) -> None:
    poses, frames = gym_aloha_frames
    expected = np.array([frame_to_observation(frame, 85, 90, TABLE) for frame in frames])
    with make_renderer("egl", "insertion", 85, 90, TABLE, num_workers=1, quality="shadows") as renderer:
        assert similarity(renderer.render(poses), expected) >= 0.93


def test_every_world_gets_its_own_picture(renderer: EglRenderer, poses: np.ndarray) -> None:
    pictures = renderer.render(poses)
    assert pictures.shape == (7, 48, 64, 3)
    assert pictures.dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == 7
    np.testing.assert_array_equal(renderer.render(poses[::-1]), pictures[::-1])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 33])
def test_any_number_of_worlds(renderer: EglRenderer, poses: np.ndarray, count: int) -> None:
    batch = poses[np.arange(count) % len(poses)]
    pictures = renderer.render(batch.astype(np.float32).astype(np.float64))
    assert pictures.shape == (count, 48, 64, 3)
    one_by_one = [renderer.render(pose[None].astype(np.float32))[0] for pose in batch[:7]]
    np.testing.assert_array_equal(pictures[:7], np.array(one_by_one).reshape(-1, 48, 64, 3))


def test_pictures_do_not_depend_on_the_number_of_workers(renderer: EglRenderer, poses: np.ndarray) -> None:
    with make_renderer("egl", "insertion", 48, 64, num_workers=3) as other:
        np.testing.assert_array_equal(other.render(poses), renderer.render(poses))


@pytest.mark.parametrize("size", [(1, 1), (1, 640), (37, 53), (480, 640)])
def test_any_size(poses: np.ndarray, size: tuple[int, int]) -> None:
    with make_renderer("auto", "insertion", *size, num_workers=1) as renderer:
        pictures = renderer.render(poses[:2])
    assert pictures.shape == (2, *size, 3)
    assert (renderer.height, renderer.width) == size
    assert pictures.any()


@pytest.mark.parametrize(("on_gpu", "lost"), [(False, "egl.EglRenderer"), (True, "warp.WarpRenderer")])
def test_auto_takes_the_other_renderer_where_one_does_not_work(monkeypatch: pytest.MonkeyPatch, on_gpu: bool, lost: str) -> None:
    def unavailable(*args: object) -> None:
        raise RendererUnavailable("not here")

    with make_renderer("auto", "insertion", 8, 8, num_workers=1, on_gpu=on_gpu) as renderer:
        assert type(renderer).__name__ == lost.split(".")[1]
    monkeypatch.setattr(f"aloha_jax.pixels.{lost}", unavailable)
    with make_renderer("auto", "insertion", 8, 8, num_workers=1, on_gpu=on_gpu) as renderer:
        assert {type(renderer).__name__, lost.split(".")[1]} == {"EglRenderer", "WarpRenderer"}


@pytest.mark.parametrize(
    ("quality", "size", "crop", "drawn", "traced"),
    [
        ("fast", (64, 64), None, 4, 4),
        ("fast", (84, 84), None, 3, 3),
        ("shadows", (120, 160), None, 2, 4),
        ("fast", (72, 120), (196, 180, 168, 280), 2, 2),
        ("shadows", (480, 640), None, 2, 4),
        ("exact", (64, 64), None, 1, 16),
    ],
)
def test_coarser_pictures_have_more_pixels_drawn_or_rays_traced_for_each_of_theirs(
    quality: str, size: tuple[int, int], crop: Crop | None, drawn: int, traced: int
) -> None:
    assert visual.supersampling(quality, *size, crop) == drawn
    assert visual.rays_per_pixel(quality, *size, crop) == traced


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9, 16])
def test_rays_share_no_row_and_no_column_and_no_cell_of_a_pixel(count: int) -> None:
    places = visual.places_in_pixel(count)
    lines = (np.arange(count) + 0.5) / count
    np.testing.assert_allclose(np.sort(places[:, 0]), lines)
    np.testing.assert_allclose(np.sort(places[:, 1]), lines)
    root = int(np.sqrt(count))
    if root**2 == count:
        assert len(set(map(tuple, (places * root).astype(int)))) == count


def test_four_rays_are_the_rotated_grid() -> None:
    places = {tuple(place) for place in visual.places_in_pixel(4) * 8}
    assert places == {(1, 3), (5, 1), (3, 7), (7, 5)}


@pytest.mark.parametrize(
    ("size", "crop", "cells"),
    [
        ((64, 64), None, (0.015, 0.015)),
        ((84, 84), None, (0.015, 0.015)),
        ((120, 160), None, (0.007, 0.015)),
        ((48, 80), (196, 180, 168, 280), (0.007, 0.015)),
        ((240, 320), None, (0.007, 0.015)),
    ],
)
def test_a_coarse_picture_has_coarse_meshes(size: tuple[int, int], crop: Crop | None, cells: tuple[float, float]) -> None:
    assert visual.mesh_cells(*size, crop) == cells


def test_hands_have_the_finer_meshes_of_a_fine_picture() -> None:
    coarse, fine = visual.make_visual_model(height=64, width=64), visual.make_visual_model(height=120, width=160)
    finer: set[str] = set()
    for i in range(coarse.nmesh):
        name = coarse.mesh(i).name
        if fine.mesh(name).facenum[0] != coarse.mesh(i).facenum[0]:
            assert fine.mesh(name).facenum[0] > coarse.mesh(i).facenum[0]
            finer.update(part for part in visual.HANDS if part in name)
            assert any(part in name for part in visual.HANDS)
    assert finer == set(visual.HANDS)


def test_a_supersampled_picture_is_the_mean_of_a_larger_one(poses: np.ndarray) -> None:
    crop = (150, 200, 144, 192)  # so small that either picture has the finer meshes
    k = visual.supersampling("fast", 48, 64, crop)
    model = visual.make_visual_model(height=48 * k, width=64 * k, crop=crop)
    with EglRenderer(model, num_workers=1, triangles=triangulate(model, scene.CAMERA)) as larger:
        blocks = larger.render(poses).reshape(-1, 48, k, 64, k, 3)
    with make_renderer("egl", "insertion", 48, 64, crop, num_workers=1) as renderer:
        np.testing.assert_allclose(renderer.render(poses), blocks.mean(axis=(2, 4)), atol=0.51)  # rounded


def test_a_killed_worker_is_replaced_and_its_part_drawn_again(renderer: EglRenderer, poses: np.ndarray) -> None:
    with make_renderer("egl", "insertion", 48, 64, num_workers=2) as other:
        assert isinstance(other, EglRenderer)
        before = [worker._process.pid for worker in other._workers]
        other._workers[1]._process.kill()
        with pytest.warns(RuntimeWarning, match=r"render worker \d+ was killed by SIGKILL; another"):
            np.testing.assert_array_equal(other.render(poses), renderer.render(poses))
        after = [worker._process.pid for worker in other._workers]
        assert after[0] == before[0]
        assert after[1] != before[1]
        np.testing.assert_array_equal(other.render(poses), renderer.render(poses))  # and all is well again


@pytest.mark.filterwarnings("ignore:render worker:RuntimeWarning")
def test_workers_that_cannot_live_are_given_up(poses: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = make_renderer("egl", "insertion", 8, 8, num_workers=2)
    assert isinstance(renderer, EglRenderer)
    monkeypatch.setenv("MUJOCO_GL", "disable")  # no worker that is started now will draw
    renderer._workers[1]._process.kill()
    with pytest.raises(RendererUnavailable, match=r"render worker \d+ ended with exit status 1.*, the 3rd over one batch"):
        renderer.render(poses)
    with pytest.raises(RuntimeError, match="closed"):
        renderer.render(poses)


def test_a_renderer_may_be_closed_twice(poses: np.ndarray) -> None:
    renderer = make_renderer("egl", "insertion", 8, 8, num_workers=1)
    renderer.render(poses)
    renderer.close()
    renderer.close()
    with pytest.raises(RuntimeError, match="closed"):
        renderer.render(poses)


def test_a_renderer_may_be_closed_while_another_thread_draws(poses: np.ndarray, recwarn: pytest.WarningsRecorder) -> None:
    renderer = make_renderer("egl", "insertion", 48, 64, num_workers=2)
    assert isinstance(renderer, EglRenderer)
    processes = [worker._process for worker in renderer._workers]
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(renderer.render, np.tile(poses, (400, 1)))
        time.sleep(0.2)
        renderer.close()
        assert isinstance(drawing.exception(timeout=60), RuntimeError | OSError | ValueError)
    assert all(process.poll() is not None for process in processes)
    assert renderer._workers == []
    assert len(recwarn) == 0  # no worker was mourned, none took its place


def test_workers_end_with_their_parent() -> None:
    program = (
        "import os, signal; from aloha_jax.pixels import make_renderer\n"
        "renderer = make_renderer('egl', 'insertion', 8, 8, num_workers=1)\n"
        "print(renderer._workers[0]._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    deadline = time.monotonic() + 10
    while is_running(int(parent.stdout)):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended; an orphan may wait to be reaped for as long as it likes."""
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return listing != "" and not listing.startswith("Z")


def test_without_opengl_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")
    with pytest.raises(RendererUnavailable, match="libegl1 libgl1"):
        make_renderer("egl", "insertion", 8, 8, num_workers=2)


def test_opengl_is_found_when_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "glx")  # as a viewer in this process would leave it
    assert gl_renderer_string() != ""


@pytest.mark.parametrize(
    ("gpus", "visible", "devices"),
    [
        (0, None, [None] * 3),
        (1, None, [None] * 3),
        (2, None, [0, 1, 0]),
        (4, "2,3", [2, 3, 2]),
        (4, "1", [1, 1, 1]),
        (2, "GPU-8f2a", [0, 1, 0]),
        (2, "", [0, 1, 0]),
    ],
)
def test_workers_take_turns_on_the_gpus(
    gpus: int, visible: str | None, devices: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egl, "num_gpus", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [egl._device(i) for i in range(3)] == devices


def test_a_gpu_that_opengl_does_not_know_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that has the GPU, but not the driver's EGL."""
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.setattr(egl, "_device", lambda index: 63)
    assert gl_renderer_string()
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "63")
    with pytest.raises(RendererUnavailable, match="MUJOCO_EGL_DEVICE_ID"):
        gl_renderer_string()


@pytest.mark.parametrize(
    ("renderer", "gpus", "warns"),
    [("llvmpipe (LLVM 15.0.6, 256 bits)", 1, True), ("llvmpipe (LLVM 15.0.6)", 0, False), ("NVIDIA H200/PCIe/SSE2", 1, False)],
)
def test_drawing_in_software_beside_a_gpu_is_noticed(renderer: str, gpus: int, warns: bool) -> None:
    warning = hints.software_opengl(renderer, gpus)
    assert (warning is not None) is warns
    assert warning is None or (renderer in warning and "\n" not in warning)


def test_workers_do_not_import_jax() -> None:
    program = f"import runpy, sys; runpy.run_path({str(WORKER)!r}); sys.exit('jax' in sys.modules or 'aloha_jax' in sys.modules)"
    environment = os.environ | {"MUJOCO_GL": "disable"}
    assert subprocess.run([sys.executable, "-P", "-c", program], env=environment).returncode == 0


@pytest.mark.parametrize("crop", [(0, 0, 481, 640), (-1, 0, 10, 10), (0, 0, 0, 10), (479, 639, 2, 1)])
def test_a_crop_outside_the_frame_is_refused(crop: Crop) -> None:
    with pytest.raises(ValueError, match="not inside"):
        visual.make_visual_model(crop=crop)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'egl' or 'warp'"):
        make_renderer("vulkan", "insertion", 8, 8)
    with pytest.raises(ValueError, match="exact, shadows, fast"):
        make_renderer("egl", "insertion", 8, 8, quality="ugly")


def test_joint_positions_of_another_model_are_refused(renderer: EglRenderer) -> None:
    for shape in ((30,), (2, 29)):
        with pytest.raises(ValueError, match=r"float\[N, 30\]"):
            renderer.render(np.zeros(shape))


def test_an_observation_is_the_mean_of_the_area_it_covers() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    np.testing.assert_array_equal(frame_to_observation(frame, 480, 640), frame)
    means = frame.reshape(120, 4, 160, 4, 3).mean(axis=(1, 3))
    assert np.abs(frame_to_observation(frame, 120, 160) - means).max() <= 1
    corner = frame_to_observation(frame, 1, 1, (8, 16, 2, 4))
    assert np.abs(corner[0, 0] - frame[8:10, 16:20].mean(axis=(0, 1))).max() <= 1
    with pytest.raises(ValueError, match="uint8"):
        frame_to_observation(frame[:240], 120, 160)


def test_clustering_keeps_the_shape_of_a_finely_meshed_cube() -> None:
    """Whatever the grid, flat faces stay flat and corners stay where three of them meet."""
    steps = np.linspace(0.0, 1.0, 11)
    u, v = (axis.ravel() for axis in np.meshgrid(np.arange(10), np.arange(10)))
    square = np.concatenate([np.stack([u, v, u + 1, v, u + 1, v + 1], 1), np.stack([u, v, u + 1, v + 1, u, v + 1], 1)])
    square = steps[square].reshape(-1, 3, 2)
    sides = []
    for axis in range(3):
        for side in (0.0, 1.0):
            sides.append(np.insert(square, axis, side, axis=2))
    corners = np.concatenate(sides).reshape(-1, 3)
    vertices, index = np.unique(corners, axis=0, return_inverse=True)
    coarse, faces = cluster_vertices(vertices, index.reshape(-1, 3), 0.27)
    assert len(faces) < len(index) / 3 / 4
    np.testing.assert_allclose(coarse.min(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(coarse.max(axis=0), 1.0, atol=1e-6)
    for corner in np.array(np.meshgrid(*[(0.0, 1.0)] * 3)).reshape(3, -1).T:
        assert np.linalg.norm(coarse - corner, axis=1).min() < 1e-6
