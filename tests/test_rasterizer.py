"""The rasteriser draws what MuJoCo's renderer draws, and says what it cannot draw."""

from collections.abc import Callable

import mujoco
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from aloha_jax import scene, visual
from aloha_jax.pixels import make_renderer
from aloha_jax.pixels.egl import EglRenderer
from aloha_jax.pixels.triangles import Triangles, triangulate
from aloha_jax.visual import Crop

TABLE: Crop = (196, 180, 168, 280)  # what the presets look at
SIZES = [((120, 160), None), ((72, 120), TABLE), ((48, 80), (0, 500, 200, 140))]


@pytest.fixture(scope="module")
def poses() -> np.ndarray:
    """Nine poses float64[9, 32]: every arm joint and the camera anywhere, the objects turned, lifted and in the picture."""
    rng = np.random.default_rng(0)
    poses = np.tile(visual.make_visual_model().key_qpos[0], (9, 1))
    for arm in scene.ARM_QPOS.values():
        poses[:, arm] += rng.uniform(-0.4, 0.4, (9, 6))
    for which, x in ((scene.PEG_QPOS, 0.1), (scene.SOCKET_QPOS, -0.1)):
        turn = rng.normal(size=(9, 4))
        poses[:, which] = np.hstack(
            [
                rng.uniform((x - 0.05, 0.45, 0.05), (x + 0.05, 0.6, 0.2), (9, 3)),
                turn / np.linalg.norm(turn, axis=1, keepdims=True),
            ]
        )
    return np.hstack([poses, rng.uniform(-0.05, 0.05, (9, 2))])


def drawn_from(model: mujoco.MjModel, triangles: Triangles | None, poses: np.ndarray) -> np.ndarray:
    """Pictures int[n, H, W, 3]; by MuJoCo's renderer without triangles."""
    with EglRenderer(model, num_workers=1, triangles=triangles) as renderer:
        return renderer.render(poses).astype(int)


@pytest.mark.parametrize(("size", "crop"), SIZES)
def test_without_shadows_it_draws_what_mujoco_draws(poses: np.ndarray, size: tuple[int, int], crop: Crop | None) -> None:
    """A pixel at an edge may belong to either side of it."""
    model = visual.make_visual_model("insertion", "fast", *size, crop)
    difference = np.abs(drawn_from(model, triangulate(model, scene.CAMERA), poses) - drawn_from(model, None, poses))
    assert np.mean(difference > 2) < 1e-3
    assert difference.mean() < 0.1


@pytest.mark.parametrize(("size", "crop", "at_least"), [((84, 84), None, 0.97), ((72, 120), TABLE, 0.9)])
def test_shadows_fall_where_mujocos_fall(poses: np.ndarray, size: tuple[int, int], crop: Crop | None, at_least: float) -> None:
    def drawn(quality: str) -> np.ndarray:
        with make_renderer("egl", "insertion", *size, crop, num_workers=1, quality=quality) as renderer:
            return renderer.render(poses)

    exact, shadows, fast = drawn("exact"), drawn("shadows"), drawn("fast")
    similar = [structural_similarity(*pair, channel_axis=2) for pair in zip(exact, shadows, strict=True)]
    without = [structural_similarity(*pair, channel_axis=2) for pair in zip(exact, fast, strict=True)]
    assert min(similar) > at_least
    assert np.mean(similar) > np.mean(without) + 0.02


@pytest.mark.parametrize("quality", ["shadows", "fast"])
def test_leaving_out_what_the_camera_does_not_see_changes_nothing(poses: np.ndarray, quality: str) -> None:
    model = visual.make_visual_model("insertion", quality, 72, 120, TABLE)
    triangles = triangulate(model, scene.CAMERA)
    whole = drawn_from(model, triangles, poses)
    np.testing.assert_array_equal(
        drawn_from(model, {**triangles, "radii": np.full(model.ngeom, np.inf, np.float32)}, poses), whole
    )
    none = drawn_from(model, {**triangles, "radii": np.full(model.ngeom, -np.inf, np.float32)}, poses)
    assert not none.any(), "what is said to be nowhere is drawn"


def test_the_shadow_map_covers_what_the_camera_sees() -> None:
    """The corners of the picture at the table, and half the way up to the camera."""
    model = visual.make_visual_model("insertion", "shadows", 72, 120, TABLE)
    triangles = triangulate(model, scene.CAMERA)
    for x in (-1, 1):
        for y in (-1, 1):
            near_clip = np.linalg.inv(triangles["projection"].astype(float)) @ (x, y, -1, 1)
            ray = near_clip[:3] / -near_clip[2] @ triangles["axes"]  # one metre before the camera
            for height in (0.0, triangles["eye"][2] / 2 - 0.05):
                point = triangles["eye"] + (triangles["eye"][2] - height) / -ray[2] * ray
                assert np.all(np.abs((triangles["shadow_box"] @ (*point, 1))[:3]) <= 1 + 1e-5)


def test_triangles_are_wound_counterclockwise_from_outside() -> None:
    triangles = triangulate(visual.make_visual_model(), scene.CAMERA)
    corners = triangles["vertices"][triangles["indices"].reshape(-1, 3)]
    faces = np.cross(corners[:, 1, :3] - corners[:, 0, :3], corners[:, 2, :3] - corners[:, 0, :3])
    assert np.all(np.sum(faces * corners[..., 3:6].sum(axis=1), axis=1) >= -1e-9)
    assert triangles["ends"][-1] == len(triangles["indices"])
    assert triangles["shadow_light"] == -1


def with_texture(spec: mujoco.MjSpec) -> None:
    spec.add_texture(
        name="wood", type=mujoco.mjtTexture.mjTEXTURE_2D, builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT, width=8, height=8
    )


def with_transparent_geom(spec: mujoco.MjSpec) -> None:
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=(0.1, 0.1, 0.1), rgba=(1, 0, 0, 0.5))


def with_hidden_geom(spec: mujoco.MjSpec) -> None:
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=(0.1, 0.1, 0.1), group=5)


def with_sphere(spec: mujoco.MjSpec) -> None:
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=(0.1, 0, 0))


def with_spotlight(spec: mujoco.MjSpec) -> None:
    spec.worldbody.add_light(type=mujoco.mjtLightType.mjLIGHT_SPOT, castshadow=False)


def with_moving_light(spec: mujoco.MjSpec) -> None:
    spec.bodies[-1].add_light(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, castshadow=False)


def with_two_shadows(spec: mujoco.MjSpec) -> None:
    for _ in range(2):
        spec.worldbody.add_light(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, castshadow=True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (with_texture, "no textures"),
        (with_transparent_geom, "opaque geoms"),
        (with_hidden_geom, "visible geoms only"),
        (with_sphere, "meshes and boxes"),
        (with_spotlight, "directional lights"),
        (with_moving_light, "that do not move"),
        (with_two_shadows, "one light that casts shadows"),
    ],
)
def test_what_it_cannot_draw_is_named(change: Callable[[mujoco.MjSpec], None], what: str) -> None:
    spec = scene.load_spec("insertion")
    change(spec)
    with pytest.raises(ValueError, match=what) as refusal:
        triangulate(spec.compile(), scene.CAMERA)
    assert "--render-quality exact" in str(refusal.value)
    assert "\n" not in str(refusal.value)
