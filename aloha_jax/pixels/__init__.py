"""Poses to pictures: uint8[N, H, W, 3] of the `top` camera.

A pose is nq joint positions, and perhaps two numbers more: how far the camera is off its place along x and y, metres.

What a policy sees is defined once, for every renderer and for gym_aloha's own frames:
`observation = resize(crop(480x640 frame), (H, W))` with an area filter. Renderers draw the crop directly at H x W.
"""

from typing import TYPE_CHECKING, Literal, Protocol, Self, runtime_checkable

import numpy as np
from PIL import Image

from aloha_jax.scene import CAMERA, FRAME_SHAPE
from aloha_jax.visual import Crop, make_visual_model, rays_per_pixel, supersampling

if TYPE_CHECKING:
    import jax


class RendererUnavailable(RuntimeError):
    """This machine cannot draw; the message says what to install or to set."""


class Renderer(Protocol):
    """Draws batches of worlds.

    Attributes:
        height: of a picture, pixels.
        width: of a picture, pixels.
    """

    height: int
    width: int

    @property
    def name(self) -> Literal["egl", "warp"]:
        """What `make_renderer` calls it."""
        ...

    def render(self, poses: np.ndarray) -> np.ndarray:
        """Pictures uint8[N, H, W, 3] of poses float[N, nq] or [N, nq + 2]; N may differ from call to call."""
        ...

    def close(self) -> None:
        """Frees what the renderer holds; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


@runtime_checkable
class DeviceRenderer(Renderer, Protocol):
    """Draws where JAX computes."""

    def trace(self, poses: "jax.Array") -> "jax.Array":
        """Pictures uint8[N, H, W, 3] of poses float32[N, nq] or [N, nq + 2], under `jit`."""
        ...


def make_renderer(
    name: str,
    task: str,
    height: int,
    width: int,
    crop: Crop | None = None,
    num_workers: int | None = None,
    quality: str = "fast",
    on_gpu: bool = False,
) -> Renderer:
    """The renderer of that name, looking at a crop of a task's scene.

    Args:
        name: `egl`, `warp`, or `auto` for the best one here.
        task: a key of `scene.TASK_SCENES`.
        height: of a picture, pixels.
        width: of a picture, pixels.
        crop: part of the 480x640 frame to look at; by default all of it.
        num_workers: processes that draw; by default one per core.
        quality: a key of `visual.QUALITIES`.
        on_gpu: whether the worlds live on a GPU; `auto` then draws there, if that works.

    Raises:
        RendererUnavailable: OpenGL does not work here, or Warp has no kernels for this device.
    """
    if name not in ("auto", "egl", "warp"):
        raise ValueError(f"renderer is 'auto', 'egl' or 'warp', not {name!r}")

    def by_opengl() -> Renderer:
        from aloha_jax.pixels.egl import EglRenderer
        from aloha_jax.pixels.triangles import triangulate

        model = make_visual_model(task, quality, height, width, crop)
        if quality == "exact":
            return EglRenderer(model, num_workers)
        return EglRenderer(model, num_workers, triangulate(model, CAMERA, supersampling(quality, height, width, crop)))

    def by_rays() -> Renderer:
        from aloha_jax.pixels.warp import WarpRenderer

        model = make_visual_model(task, quality, height, width, crop, ray_traced=True)
        return WarpRenderer(model, rays_per_pixel(quality, height, width, crop))

    if name != "auto":
        return by_opengl() if name == "egl" else by_rays()
    first, second = (by_rays, by_opengl) if on_gpu else (by_opengl, by_rays)
    try:
        return first()
    except RendererUnavailable:
        return second()


def check_poses(shape: tuple[int, ...], nq: int) -> None:
    """Refuse what is not a batch of poses.

    Raises:
        ValueError: `shape` is neither (N, nq) nor (N, nq + 2).
    """
    if len(shape) != 2 or shape[1] not in (nq, nq + 2):
        raise ValueError(f"poses are float[N, {nq}], or float[N, {nq + 2}] with the camera's, not float{list(shape)}")


def frame_to_observation(frame: np.ndarray, height: int, width: int, crop: Crop | None = None) -> np.ndarray:
    """What a policy sees of gym_aloha's own frame.

    Args:
        frame: uint8[480, 640, 3].
        height: of the observation, pixels.
        width: of the observation, pixels.
        crop: part of the frame to keep; by default all of it.

    Returns:
        uint8[height, width, 3], each pixel the mean of the area it covers.
    """
    if frame.shape != (*FRAME_SHAPE, 3) or frame.dtype != np.uint8:
        raise ValueError(f"a frame is uint8{[*FRAME_SHAPE, 3]}, not {frame.dtype}{list(frame.shape)}")
    if crop is not None:
        top, left, crop_height, crop_width = crop
        frame = frame[top : top + crop_height, left : left + crop_width]
    if frame.shape[:2] == (height, width):
        return frame.copy()
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))
