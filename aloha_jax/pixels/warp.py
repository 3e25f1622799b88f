"""Pictures by ray tracing with Warp kernels, drawn where JAX computes: on a CUDA GPU nothing leaves it, a CPU needs no OpenGL.

Lights, colours and the camera's frustum are OpenGL's (docs/fidelity.md); smooth surfaces are shaded per pixel, not per vertex.
"""

from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import warp
from mujoco import mjx

from aloha_jax.engines.mjx import chosen_graph_mode, warp_has_kernels
from aloha_jax.pixels import RendererUnavailable, check_poses
from aloha_jax.scene import CAMERA
from aloha_jax.visual import places_in_pixel

# Of a light, what reaches a shadow. Less than none is closest to gym_aloha's frames (docs/fidelity.md), presumably because OpenGL
# lights the table's eight far corners and interpolates: a shadow then takes more light away than falls on its place.
SHADOW_LIGHT = -0.3
BATCH = 64  # worlds that `render` draws at once; `trace` draws as many as it is given


class WarpRenderer:
    """Draws batches of worlds by ray tracing; see `pixels.Renderer`.

    Attributes:
        height: of a picture, pixels.
        width: of a picture, pixels.
    """

    name: Literal["warp"] = "warp"

    def __init__(self, model: mujoco.MjModel, rays: int) -> None:
        """Puts the model on JAX's default device.

        Args:
            model: from `visual.make_visual_model` with `ray_traced`, which decides the camera's view, the size, and whether there
                are shadows.
            rays: from `visual.rays_per_pixel`; a pixel is the mean of as many.

        Raises:
            RendererUnavailable: Warp has no kernels for JAX's default device.
        """
        device = jax.devices()[0]
        if not warp_has_kernels():
            raise RendererUnavailable(f"--renderer warp runs on NVIDIA GPUs and on CPUs, not on {device.device_kind}: use egl")
        warp.config.log_level = warp.LOG_ERROR  # it would print every kernel that it loads
        self.height: int = model.vis.global_.offheight
        self.width: int = model.vis.global_.offwidth
        self._host_model, self._rays = model, rays
        self._order = near_together(self.height, self.width)
        self._model = mjx.put_model(model, impl="warp", graph_mode=chosen_graph_mode())
        self._blank = _still_data(model)
        # Warp's own default is a GPU, even where JAX is told to use the CPU.
        self._device: str = warp.device_from_jax(device).alias
        self._contexts: dict[int, Any] = {}  # by number of worlds, which Warp's buffers have built in
        self._closed = False
        self._trace_batch = jax.jit(self.trace)

    def trace(self, poses: jax.Array) -> jax.Array:
        """Pictures uint8[N, H, W, 3] of poses float32[N, nq] or [N, nq + 2]; under `jit`, where N decides the buffers' size.

        Raises:
            RuntimeError: the renderer is closed. Programs that were compiled before find their buffers gone as they run.
        """
        self._require_open()
        check_poses(poses.shape, self._host_model.nq)
        num_worlds = poses.shape[0]
        context = self._context(num_worlds)
        data = jax.vmap(self._posed)(poses)
        data = jax.vmap(mjx.kinematics, in_axes=(None, 0))(self._model, data)
        data = jax.vmap(mjx.refit_bvh, in_axes=(None, 0, None))(self._model, data, context)
        packed, _, _ = jax.vmap(mjx.render, in_axes=(None, 0, None))(self._model, data, context)
        packed = packed.reshape(num_worlds, -1, self._rays)  # 0xAARRGGBB
        mean = jnp.stack([((packed >> shift) & 0xFF).mean(axis=2) for shift in (16, 8, 0)], axis=-1)
        pictures = jnp.round(mean[:, np.argsort(self._order)]).astype(jnp.uint8)
        return pictures.reshape(num_worlds, self.height, self.width, 3)

    def _posed(self, pose: jax.Array) -> mjx.Data:
        nq, blank = self._host_model.nq, self._blank
        if len(pose) == nq:
            return blank.replace(qpos=pose)
        return blank.replace(qpos=pose[:nq], cam_xpos=blank.cam_xpos.at[:, :2].add(pose[nq:]))  # of all cameras one is drawn

    def render(self, poses: np.ndarray) -> np.ndarray:
        """Pictures uint8[N, H, W, 3] of poses float[N, nq] or [N, nq + 2].

        Raises:
            RuntimeError: the renderer is closed.
        """
        self._require_open()
        poses = np.asarray(poses, np.float32)
        check_poses(poses.shape, self._host_model.nq)
        pictures = np.empty((len(poses), self.height, self.width, 3), np.uint8)
        for start in range(0, len(poses), BATCH):
            some = poses[start : start + BATCH]
            # Powers of two: each size of batch costs a compilation.
            padded = np.resize(some, (min(BATCH, 1 << (len(some) - 1).bit_length()), poses.shape[1]))
            pictures[start : start + len(some)] = np.asarray(self._trace_batch(padded))[: len(some)]
        return pictures

    def close(self) -> None:
        """Frees Warp's buffers; may be called twice."""
        self._closed = True
        self._contexts.clear()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the renderer is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _context(self, num_worlds: int) -> Any:
        """MJX's handle of the ray tracer's buffers for so many worlds."""
        if num_worlds not in self._contexts:
            context = mjx.create_render_context(
                self._host_model,
                nworld=num_worlds,
                devices=[self._device],
                cam_active=[CAMERA],
                cam_res=(self.width, self.height * self._rays),
                render_rgb=True,
                render_depth=False,
                render_seg=False,
                use_textures=False,
                use_shadows=self._host_model.vis.quality.shadowsize > 0,
                shadow_light_fraction=SHADOW_LIGHT,
            )
            # Its own are a grid's, row by row. Here a pixel's rays, and then its neighbours', lie side by side, so that those
            # which a GPU traces together meet the same things.
            rays = rays_of_pixels(self._host_model, places_in_pixel(self._rays))[self._order]
            context.ray.assign(rays.reshape(-1, 3).astype(np.float32))
            self._contexts[num_worlds] = context
        return self._contexts[num_worlds].pytree()


def _still_data(model: mujoco.MjModel) -> mjx.Data:
    """Blank data of one world, whose camera and lights, which never move, are where C MuJoCo puts them."""
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    still = {
        "cam_xpos": data.cam_xpos,
        "cam_xmat": data.cam_xmat.reshape(-1, 3, 3),
        "_impl.light_xpos": data.light_xpos,
        "_impl.light_xdir": data.light_xdir,
    }
    blank = mjx.make_data(model, impl="warp", naconmax=1, njmax=1)
    return blank.tree_replace({name: jnp.asarray(value, jnp.float32) for name, value in still.items()})


def rays_of_pixels(model: mujoco.MjModel, places: np.ndarray) -> np.ndarray:
    """Unit vectors float[H * W, n, 3] through n `places` in each pixel; in the camera's frame, which looks along -z, y up."""
    height, width = model.vis.global_.offheight, model.vis.global_.offwidth
    row, column = np.divmod(np.arange(height * width), width)
    pixels = np.stack([column, row], axis=1)[:, None] + places  # [H * W, n, 2], from the picture's upper left corner
    camera = model.camera(CAMERA).id
    focal, principal = np.split(model.cam_intrinsic[camera], 2)  # in the sensor's units
    x, y = np.moveaxis((pixels - (width / 2, height / 2)) * model.cam_sensorsize[camera] / (width, height) + principal, -1, 0)
    rays = np.stack([x / focal[0], -y / focal[1], -np.ones_like(x)], axis=-1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def near_together(height: int, width: int) -> np.ndarray:
    """The picture's pixels int[H * W], ordered so that those near in the list are near in the picture (Morton's order)."""
    row, column = np.divmod(np.arange(height * width), width)
    bits = np.arange(max(height, width).bit_length())
    interleaved = ((column[:, None] >> bits & 1) << 2 * bits) | ((row[:, None] >> bits & 1) << 2 * bits + 1)
    return np.argsort(interleaved.sum(axis=1))
