"""Ray-traced pictures are gym_aloha's too, of the right worlds, without OpenGL and without leaving the device."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mujoco import mjx
from skimage.metrics import structural_similarity

from aloha_jax import scene
from aloha_jax.env import Env
from aloha_jax.factory import make
from aloha_jax.pixels import DeviceRenderer, frame_to_observation, make_renderer
from aloha_jax.pixels.egl import EglRenderer
from aloha_jax.pixels.ended import render_now_and_ended
from aloha_jax.pixels.warp import WarpRenderer, near_together, rays_of_pixels
from aloha_jax.visual import Crop, make_visual_model, places_in_pixel

TABLE: Crop = (150, 140, 170, 360)


@pytest.fixture(scope="module")
def poses() -> np.ndarray:
    """Four poses float32[4, 30] that differ in every arm joint and in where the objects are."""
    rng = np.random.default_rng(0)
    poses = np.tile(scene.make_scene().model.key_qpos[0], (4, 1))
    for arm in scene.ARMS:
        poses[:, scene.ARM_QPOS[arm]] += rng.uniform(-0.4, 0.4, (4, 6))
    poses[:, [scene.PEG_QPOS.start, scene.SOCKET_QPOS.start]] += rng.uniform(-0.1, 0.1, (4, 2))
    poses[:, scene.SOCKET_QPOS.start + 2] += rng.uniform(0, 0.2, 4)  # held in the air
    return poses.astype(np.float32)


@pytest.fixture(scope="module")
def frames(poses: np.ndarray) -> np.ndarray:
    """gym_aloha's own frames of them, uint8[4, 480, 640, 3] (tests/test_pixels.py)."""
    with make_renderer("egl", "insertion", 480, 640, quality="exact") as renderer:
        return renderer.render(poses)


@pytest.fixture(scope="module")
def renderer() -> Iterator[WarpRenderer]:
    with make_renderer("warp", "insertion", 12, 20) as renderer:
        assert isinstance(renderer, WarpRenderer)
        yield renderer


@pytest.mark.parametrize(
    ("quality", "size", "crop", "at_least"),
    [
        ("fast", (64, 64), None, 0.95),
        ("fast", (84, 84), None, 0.95),
        ("shadows", (84, 84), None, 0.98),
        ("shadows", (85, 90), TABLE, 0.97),
    ],
)
def test_pictures_look_like_gym_aloha(
    poses: np.ndarray, frames: np.ndarray, quality: str, size: tuple[int, int], crop: Crop | None, at_least: float
) -> None:
    expected = [frame_to_observation(frame, *size, crop) for frame in frames]

    def similarity(pictures: np.ndarray) -> float:
        return min(structural_similarity(a, b, channel_axis=2) for a, b in zip(pictures, expected, strict=True))

    with make_renderer("warp", "insertion", *size, crop, quality=quality) as renderer:
        pictures = renderer.render(poses)
    assert pictures.dtype == np.uint8
    assert similarity(pictures) >= at_least
    assert similarity(np.roll(pictures, 1, axis=0)) < at_least, "another pose passes, too: the test is blind"


@pytest.mark.parametrize(("size", "crop"), [((48, 64), None), ((9, 13), (100, 40, 300, 500))], ids=str)
def test_rays_go_through_pixels_as_those_that_warp_makes(size: tuple[int, int], crop: Crop | None) -> None:
    """One per pixel, through its middle."""
    model = make_visual_model("insertion", "fast", *size, crop, ray_traced=True)
    options = dict(nworld=1, cam_active=[scene.CAMERA], cam_res=size[::-1], render_rgb=True, render_depth=False)
    its_own = mjx.create_render_context(model, devices=["cpu"], **options).ray.numpy()
    np.testing.assert_allclose(rays_of_pixels(model, places_in_pixel(1))[:, 0], its_own, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (8, 8), (9, 13)])
def test_every_pixel_has_its_turn(height: int, width: int) -> None:
    order = near_together(height, width)
    assert sorted(order) == list(range(height * width))
    if (height, width) == (8, 8):
        row, column = np.divmod(order.reshape(4, 4, 4), 8)
        for block, side in ((row, 4), (column, 4)):  # each 16 in a row are a square of 4 by 4
            assert (np.ptp(block, axis=(1, 2)) == side - 1).all()


def test_the_table_has_the_greys_of_opengl(poses: np.ndarray) -> None:
    with make_renderer("egl", "insertion", 120, 160) as egl, make_renderer("warp", "insertion", 120, 160) as warp:
        drawn, traced = egl.render(poses[:1])[0].astype(int), warp.render(poses[:1])[0].astype(int)
    column = slice(25, 94), 54  # from the far edge to the near one, between the objects
    assert drawn[column].min() >= 70, "something stands in the way"
    assert np.ptp(drawn[column]) >= 12
    assert np.abs(drawn - traced)[column].max() <= 1


def test_a_world_looks_the_same_in_any_batch(renderer: WarpRenderer, poses: np.ndarray) -> None:
    pictures = renderer.render(poses)
    assert pictures.shape == (4, 12, 20, 3)
    assert len({picture.tobytes() for picture in pictures}) == 4
    np.testing.assert_array_equal(renderer.render(poses[2::-1]), pictures[2::-1])
    assert renderer.render(poses[:0]).shape == (0, 12, 20, 3)
    traced = jax.jit(lambda poses: jax.lax.map(renderer.trace, poses))(jnp.asarray(poses).reshape(2, 2, 30))
    np.testing.assert_array_equal(traced.reshape(4, 12, 20, 3), pictures)


def test_shadows_are_as_dark_as_those_of_opengl(poses: np.ndarray) -> None:
    drawn: dict[str, np.ndarray] = {}
    traced: dict[str, np.ndarray] = {}
    for quality in ("fast", "shadows"):
        for pictures, name in ((drawn, "egl"), (traced, "warp")):
            with make_renderer(name, "insertion", 120, 160, quality=quality) as renderer:
                pictures[quality] = renderer.render(poses[:1])[0].astype(int)
    taken = drawn["fast"] - drawn["shadows"]  # by shadows, of the light
    table = np.zeros(taken.shape[:2], bool)
    table[25:94, 30:130] = True
    shadow = table & (taken.min(axis=2) >= 8)
    assert shadow.sum() > 200
    assert abs((traced["fast"] - traced["shadows"])[shadow].mean() - taken[shadow].mean()) <= 1.5


def test_each_picture_may_have_the_camera_elsewhere(poses: np.ndarray) -> None:
    moved = np.concatenate([poses[:1], poses[:1]])
    moved = np.concatenate([moved, [[0.0, 0.0], [0.03, -0.02]]], axis=1).astype(np.float32)
    with make_renderer("egl", "insertion", 84, 84, quality="shadows") as renderer:
        expected = renderer.render(moved)
    with make_renderer("warp", "insertion", 84, 84, quality="shadows") as renderer:
        pictures = renderer.render(moved)
    alike = [[structural_similarity(a, b, channel_axis=2) for b in expected] for a in pictures]
    assert min(alike[0][0], alike[1][1]) >= 0.96
    assert max(alike[0][1], alike[1][0]) < 0.9


def test_joint_positions_of_another_model_are_refused(renderer: WarpRenderer) -> None:
    with pytest.raises(ValueError, match=r"float\[N, 30\]"):
        renderer.render(np.zeros((2, 29)))


def test_a_renderer_that_is_closed_says_so(poses: np.ndarray) -> None:
    with make_renderer("warp", "insertion", 8, 8) as renderer:
        assert isinstance(renderer, DeviceRenderer)
        renderer.render(poses[:1])
    renderer.close()
    with pytest.raises(RuntimeError, match="the renderer is closed"):
        renderer.render(poses[:1])
    with pytest.raises(RuntimeError, match="the renderer is closed"):
        renderer.trace(jnp.asarray(poses[:1], jnp.float32))


def test_without_opengl_auto_traces_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_renderer("auto", "insertion", 8, 8) as renderer:
        assert isinstance(renderer, EglRenderer)
    monkeypatch.setenv("MUJOCO_GL", "disable")
    with make_renderer("auto", "insertion", 8, 8) as renderer:
        assert isinstance(renderer, DeviceRenderer)


@pytest.mark.parametrize("ended", [[], [33], [0, 5, 7], list(range(40))], ids=len)
def test_ended_worlds_show_how_they_ended(renderer: WarpRenderer, poses: np.ndarray, ended: list[int]) -> None:
    """For none, few and many of forty, whose next episodes start elsewhere."""
    now, final = poses[np.arange(40) % 4], poses[np.arange(1, 41) % 4]
    done = np.isin(np.arange(40), ended)
    final = np.where(done[:, None], final, now)
    pixels, final_pixels = jax.jit(lambda *args: render_now_and_ended(renderer, *args))(now, final, done)
    pictures = renderer.render(poses)
    np.testing.assert_array_equal(pixels, pictures[np.arange(40) % 4])
    np.testing.assert_array_equal(final_pixels, pictures[np.where(done, np.arange(1, 41), np.arange(40)) % 4])


def primitives(env: Env) -> set[str]:
    """Names of everything that a step of the environment computes, however deep."""
    state = jax.eval_shape(env.reset, jax.random.key(0))
    found: set[str] = set()

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            found.add(equation.primitive.name)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(env.step)(state, jnp.zeros((env.num_envs, 14))).jaxpr)
    return found


def small(engine: str, renderer: str) -> Env:
    return make("insertion", 2, engine=engine, renderer=renderer, obs="pixels", image_height=8, image_width=8)


def test_nothing_leaves_the_device() -> None:
    """Physics and pictures of a step are kernels of the device, without a callback to the host; C MuJoCo and OpenGL need one."""
    on_device = primitives(small("mjx", "warp"))
    assert "ffi_call" in on_device
    assert not [name for name in on_device if "callback" in name]
    on_host = small("c", "egl")
    assert on_host.renderer is not None
    on_host.renderer.close()
    assert {"pure_callback", "buffer_callback"} <= primitives(on_host)  # elsewhere, and on the CPU


@pytest.mark.slow
def test_a_rollout_transfers_nothing() -> None:
    env = small("mjx", "warp")
    rollout = jax.jit(lambda state, actions: jax.lax.scan(lambda s, a: (env.step(s, a), s.obs), state, actions))
    state, actions = jax.jit(env.reset)(jax.random.key(0)), jnp.zeros((3, 2, 14))
    compiled = rollout.lower(state, actions).compile()  # tracing makes constants of its own
    with jax.transfer_guard("disallow"):
        state, pictures = compiled(state, actions)
        jax.block_until_ready(pictures)
    assert np.asarray(pictures).std() > 0
