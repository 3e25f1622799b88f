"""One drawing process of `EglRenderer`: run as a script, so that it imports NumPy, Pillow and MuJoCo but never JAX.

It holds one OpenGL context, reads batches of poses from a socket and answers each with the pictures, until the socket
closes: with its parent, however that ended. What goes wrong here is written to stderr, which the parent reads.
"""

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection

import mujoco
import numpy as np
from OpenGL import GL
from PIL import Image


class Artist:
    """Draws one camera of one model at the size of the model's offscreen buffer, which it makes `supersampling` times larger."""

    def __init__(self, model: mujoco.MjModel, camera: str, supersampling: int = 1) -> None:
        self._model, self._data, self._supersampling = model, mujoco.MjData(model), supersampling
        self._shape = (model.vis.global_.offheight, model.vis.global_.offwidth, 3)
        model.vis.global_.offheight *= supersampling
        model.vis.global_.offwidth *= supersampling
        height, width = model.vis.global_.offheight, model.vis.global_.offwidth
        self._gl = mujoco.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + 10)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = model.vis.quality.shadowsize > 0
        self._options = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = model.camera(camera).id
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)

    def draw(self, poses: np.ndarray) -> np.ndarray:
        """Pictures uint8[n, H, W, 3] of poses float64[n, nq + 2]: joint positions, then the camera's way along x and y."""
        pictures = np.empty((len(poses), *self._shape), np.uint8)
        for picture, pose in zip(pictures, poses, strict=True):
            self._data.qpos[:] = pose[:-2]
            self._draw_current(camera=pose[-2:])
            picture[:] = self._averaged()[::-1]  # OpenGL's first row is the lowest
        return pictures

    def _averaged(self) -> np.ndarray:
        return self._pixels if self._supersampling == 1 else np.asarray(Image.fromarray(self._pixels).reduce(self._supersampling))

    def _draw_current(self, camera: np.ndarray) -> None:
        model, data = self._model, self._data
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        data.cam_xpos[self._camera.fixedcamid, :2] += camera
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._options, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)


def prefer(device: int) -> None:
    """Draw on that EGL device, unless the user chose another or there are not so many, as without the driver's EGL."""
    if os.environ.get("MUJOCO_GL", "").lower() != "egl" or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return
    from mujoco.egl import egl_ext

    if device < len(egl_ext.eglQueryDevicesEXT()):
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(device)  # MuJoCo reads it when it makes its first context


def main(connection: Connection) -> None:
    model, camera, supersampling, device = connection.recv()
    if device is not None:
        prefer(device)
    artist = Artist(model, camera, supersampling)
    connection.send(GL.glGetString(GL.GL_RENDERER).decode())
    while True:
        poses = np.frombuffer(connection.recv_bytes()).reshape(-1, model.nq + 2)
        connection.send_bytes(artist.draw(poses).data.cast("B"))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's affair, which may have a last picture to draw
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has gone
        main(Connection(int(sys.argv[1])))
