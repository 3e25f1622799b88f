"""The rasteriser draws what MuJoCo's renderer draws, and says what it cannot draw."""

import pathlib
import shutil
from collections.abc import Callable

import mujoco
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from aloha_jax import scene, visual
from aloha_jax.pixels import RendererUnavailable, egl, make_renderer
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


@pytest.mark.parametrize("way", [(0.0, 0.0), (0.2, 0.0), (-0.2, 0.1)], ids=str)
def test_shadows_fall_where_mujocos_fall(poses: np.ndarray, way: tuple[float, float]) -> None:
    """By large shadow maps, wherever the camera is."""
    model = visual.make_visual_model("insertion", "shadows", 72, 120, TABLE)
    model.vis.quality.shadowsize = 2048
    poses = np.hstack([poses[:, :-2], np.tile(way, (len(poses), 1))])
    theirs = drawn_from(model, None, poses)
    assert different(drawn_from(model, triangulate(model, scene.CAMERA), poses), theirs) < 0.005
    assert different(drawn_from(model, without_shadows(model), poses), theirs) > 0.03, "there is no shadow to be seen"


def different(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of the values that are off by more than an edge's softness."""
    return float(np.mean(np.abs(ours - theirs) > 10))


def without_shadows(model: mujoco.MjModel) -> Triangles:
    return {**triangulate(model, scene.CAMERA), "shadow_light": -1}


@pytest.mark.parametrize(("size", "crop", "at_least"), [((84, 84), None, 0.97), ((72, 120), TABLE, 0.9)])
def test_a_coarse_shadow_map_is_like_gym_alohas(
    poses: np.ndarray, size: tuple[int, int], crop: Crop | None, at_least: float
) -> None:
    def drawn(quality: str) -> np.ndarray:
        with make_renderer("egl", "insertion", *size, crop, num_workers=1, quality=quality) as renderer:
            return renderer.render(poses)

    exact, shadows, fast = drawn("exact"), drawn("shadows"), drawn("fast")
    similar = [structural_similarity(*pair, channel_axis=2) for pair in zip(exact, shadows, strict=True)]
    without = [structural_similarity(*pair, channel_axis=2) for pair in zip(exact, fast, strict=True)]
    assert min(similar) > at_least
    assert np.mean(similar) > np.mean(without) + 0.02


def test_what_the_shadow_map_does_not_reach_is_in_the_light(poses: np.ndarray) -> None:
    """Though shadows fall across the map's edge."""
    model = visual.make_visual_model("insertion", "shadows", 72, 120, TABLE)
    triangles = triangulate(model, scene.CAMERA)
    box = np.diag((20, 20, 1, 1)).astype(np.float32) @ triangles["shadow_box"]
    lit, shaded = drawn_from(model, without_shadows(model), poses), drawn_from(model, triangles, poses)
    difference = np.mean(np.abs(drawn_from(model, {**triangles, "shadow_box": box}, poses) - lit) > 10, axis=(1, 2, 3))
    assert difference.max() < 0.01
    assert difference.max() > 0.0, "the map has no shadow in it"
    assert different(shaded, lit) > 0.03


def test_nothing_shades_itself() -> None:
    """A box alone, on which light falls aslant: its edges are the hard part."""
    model = mujoco.MjModel.from_xml_string(f"""<mujoco>
      <visual><quality shadowsize="128"/><global offwidth="64" offheight="48"/></visual>
      <worldbody>
        <light type="directional" dir="0.4 0.3 -1"/>
        <camera name="{scene.CAMERA}" pos="0 0 2" resolution="64 48" focal="1 1" sensorsize="0.8 0.6"/>
        <geom type="box" size="0.6 0.4 0.1" euler="10 20 30"/>
      </worldbody>
    </mujoco>""")
    pose = np.zeros((1, 2))
    lit = drawn_from(model, without_shadows(model), pose)
    assert len(np.unique(lit)) > 3
    assert different(drawn_from(model, triangulate(model, scene.CAMERA), pose), lit) == 0


@pytest.mark.parametrize("quality", ["shadows", "fast"])
def test_a_picture_does_not_depend_on_those_beside_it(poses: np.ndarray, quality: str) -> None:
    """More than are read at once, by one process."""
    many = poses[np.random.default_rng(1).integers(0, len(poses), 140)]
    with make_renderer("egl", "insertion", 72, 120, TABLE, num_workers=1, quality=quality) as renderer:
        alone = {pose.tobytes(): renderer.render(pose[None])[0] for pose in poses}
        np.testing.assert_array_equal(renderer.render(many), [alone[pose.tobytes()] for pose in many])


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


def test_radii_reach_every_vertex() -> None:
    triangles = triangulate(visual.make_visual_model(), scene.CAMERA)
    farthest = np.zeros(len(triangles["radii"]))
    np.maximum.at(farthest, triangles["vertices"][:, 12].astype(int), np.linalg.norm(triangles["vertices"][:, :3], axis=1))
    assert np.all(farthest <= triangles["radii"])
    np.testing.assert_allclose(farthest, triangles["radii"], rtol=1e-5)


@pytest.mark.parametrize("up_to", [0.25, 0.5])
def test_the_shadow_map_covers_what_the_camera_sees(monkeypatch: pytest.MonkeyPatch, up_to: float) -> None:
    """The corners of the picture, from the table up to a share of the way to the camera."""
    monkeypatch.setattr("aloha_jax.pixels.triangles.SHADOWS_UP_TO", up_to)
    model = visual.make_visual_model("insertion", "shadows", 72, 120, TABLE)
    triangles = triangulate(model, scene.CAMERA)
    above_table, reached = triangles["eye"][2], []
    for x in (-1, 1):
        for y in (-1, 1):
            near_clip = np.linalg.inv(triangles["projection"].astype(float)) @ (x, y, -1, 1)
            ray = near_clip[:3] / -near_clip[2] @ triangles["axes"]  # one metre before the camera
            for share in (0.0, up_to - 0.1, up_to + 0.1):
                point = triangles["eye"] + above_table * (1 - share) / -ray[2] * ray
                reached.append((share <= up_to, np.all(np.abs((triangles["shadow_box"] @ (*point, 1))[:3]) <= 1 + 1e-5)))
    assert all(inside for wanted, inside in reached if wanted)
    assert not all(inside for wanted, inside in reached if not wanted), "texels are spent on what is never there"


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


def with_turning_camera(spec: mujoco.MjSpec) -> None:
    camera = spec.camera(scene.CAMERA)
    camera.mode, camera.targetbody = mujoco.mjtCamLight.mjCAMLIGHT_TARGETBODY, spec.bodies[-1].name


def with_orthographic_camera(spec: mujoco.MjSpec) -> None:
    spec.camera(scene.CAMERA).proj = mujoco.mjtProjection.mjPROJ_ORTHOGRAPHIC


def with_camera_of_an_angle(spec: mujoco.MjSpec) -> None:
    spec.camera(scene.CAMERA).sensor_size = (0, 0)


def without_lights(spec: mujoco.MjSpec) -> None:
    spec.visual.headlight.active = 0
    for light in spec.lights:
        spec.delete(light)


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
        (with_hidden_geom, "nothing but visible geoms"),
        (with_sphere, "meshes and boxes"),
        (with_spotlight, "directional lights"),
        (without_lights, "directional lights"),
        (with_moving_light, "lights that do not move"),
        (with_turning_camera, "a camera that does not move"),
        (with_orthographic_camera, "a camera with a perspective"),
        (with_camera_of_an_angle, "a camera with a sensor"),
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


def test_pictures_that_opengl_cannot_hold_are_refused() -> None:
    with pytest.raises(RendererUnavailable, match=r"^OpenGL cannot draw these pictures: 40000x8 pixels .* along an edge$"):
        make_renderer("egl", "insertion", 20000, 4, num_workers=1, quality="fast")


def test_an_opengl_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mesa says it is what it is told to be."""
    monkeypatch.setenv("MESA_GL_VERSION_OVERRIDE", "2.1")
    monkeypatch.setenv("MESA_GLSL_VERSION_OVERRIDE", "120")
    with pytest.raises(
        RendererUnavailable, match=r"needs OpenGL 3.0, and this is 2.1 .*; --render-quality exact does with less$"
    ):
        make_renderer("egl", "insertion", 8, 8, num_workers=1, quality="fast")
    with make_renderer("egl", "insertion", 8, 8, num_workers=1, quality="exact") as renderer:
        assert renderer.render(visual.make_visual_model().key_qpos[:1]).any()


def test_what_the_driver_says_of_a_shader_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    worker = shutil.copy(egl.WORKER, tmp_path)
    shaders = shutil.copytree(egl.WORKER.parent / "shaders", tmp_path / "shaders")
    (shaders / "scene.vert").write_text("void main() { gl_Position = nowhere;\n and(more); }\n")
    monkeypatch.setattr(egl, "WORKER", worker)
    with pytest.raises(
        RendererUnavailable, match=r"^OpenGL cannot draw these pictures: scene.vert does not compile: .*nowhere"
    ) as no:
        make_renderer("egl", "insertion", 8, 8, num_workers=1, quality="fast")
    assert "\n" not in str(no.value)
    (shaders / "scene.vert").write_text("in vec3 place;\nvoid main() { gl_Position = vec4(place, 1.); }\n")
    with pytest.raises(RendererUnavailable, match="the shaders of scene"):
        make_renderer("egl", "insertion", 8, 8, num_workers=1, quality="fast")
