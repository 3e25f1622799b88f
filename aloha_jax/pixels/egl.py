"""Pictures by OpenGL, drawn by a pool of processes that each hold one context.

Processes, not threads: Mesa's software rasteriser serialises the contexts of one process. On two cores and with antialiasing, two
threads draw 1.2 times as many frames as one, two processes 2.0 times (64x64 and 84x84). Frames travel over a socket, which costs
1 % of drawing them and leaves nothing behind when a process dies.
"""

import contextlib
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from multiprocessing.connection import Connection, wait
from typing import Literal, Self, cast

import mujoco
import numpy as np

from aloha_jax.pixels import RendererUnavailable, check_poses
from aloha_jax.pixels.triangles import Triangles
from aloha_jax.scene import CAMERA
from aloha_jax.startup import usable_cores

WORKER = pathlib.Path(__file__).with_name("egl_worker.py")
MAX_WORKERS = 32  # each takes about 75 MB of its own
BATCHES_PER_WORKER = 4  # small enough that workers end together, large enough that messages do not count
SHUTDOWN_SECONDS = 2.0
MAX_DEATHS = 3  # of workers, for one call of `render`


class EglRenderer:
    """Draws batches of worlds with `num_workers` processes; see `pixels.Renderer`.

    What a world looks like depends neither on the number of workers nor on the rest of the batch. A worker that dies (killed for
    memory, say) is replaced and its part drawn again.

    Attributes:
        height: of a picture, pixels.
        width: of a picture, pixels.
        gl_renderer: what draws, in OpenGL's words (GL_RENDERER).
    """

    name: Literal["egl"] = "egl"

    def __init__(self, model: mujoco.MjModel, num_workers: int | None = None, triangles: Triangles | None = None) -> None:
        """Starts the workers.

        Args:
            model: from `visual.make_visual_model`, which decides the camera's view, the size and the quality.
            num_workers: number of processes; by default one per core that this process may use.
            triangles: of the model, to be drawn by `egl_worker.Rasterizer`; by default MuJoCo's renderer draws.

        Raises:
            RendererUnavailable: OpenGL does not work here, or cannot draw this.
        """
        self.height: int = model.vis.global_.offheight
        self.width: int = model.vis.global_.offwidth
        self._nq, self._order = model.nq, (model, CAMERA, triangles)
        self._deaths, self._closed = 0, False
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers)
        try:
            for index in range(num_workers or min(usable_cores(), MAX_WORKERS)):
                self._workers.append(self._new_worker(index))
            self.gl_renderer = {worker.await_ready() for worker in self._workers}.pop()
        except BaseException:
            self.close()
            raise

    def render(self, poses: np.ndarray) -> np.ndarray:
        """Pictures uint8[N, H, W, 3] of poses float[N, nq] or [N, nq + 2].

        Raises:
            RuntimeError: the renderer is closed.
            RendererUnavailable: `MAX_DEATHS` workers died over it; the renderer is closed.
        """
        poses = np.asarray(poses, np.float64)
        check_poses(poses.shape, self._nq)
        whole = np.zeros((len(poses), self._nq + 2))
        whole[:, : poses.shape[1]] = poses
        with self._lock:
            self._require_open()
            pictures = np.empty((len(whole), self.height, self.width, 3), np.uint8)
            self._deaths = 0
            try:
                self._draw(whole, pictures)
            except BaseException:  # with answers under way, the next call would read the wrong pictures
                self.close()
                raise
            return pictures

    def _draw(self, poses: np.ndarray, pictures: np.ndarray) -> None:
        """Hands out batches to whichever worker is idle."""
        size = max(1, -(-len(poses) // (BATCHES_PER_WORKER * len(self._workers))))
        batches = iter([slice(start, start + size) for start in range(0, len(poses), size)])
        busy: dict[_Worker, slice] = {}
        for worker, batch in zip(self._workers, itertools.islice(batches, len(self._workers)), strict=False):
            worker.request(poses[batch])
            busy[worker] = batch
        while busy:
            for worker in _answering(busy):
                todo: slice | None = busy.pop(worker)
                if worker.receive(pictures[todo]):
                    todo = next(batches, None)
                else:
                    worker = self._successor(worker)
                if todo is not None:
                    worker.request(poses[todo])
                    busy[worker] = todo

    def _new_worker(self, place: int) -> "_Worker":
        return _Worker((*self._order, _device(place)))

    def _successor(self, dead: "_Worker") -> "_Worker":
        """A living worker in the place of a dead one."""
        self._require_open()
        place = self._workers.index(dead)
        while True:
            self._deaths += 1
            obituary = dead.obituary()
            if self._deaths == MAX_DEATHS:
                raise RendererUnavailable(f"{obituary}, the {MAX_DEATHS}rd over one batch: free some memory")
            warnings.warn(f"{obituary}; another one takes its place", RuntimeWarning, stacklevel=2)
            dead.hang_up()
            dead.join()
            dead = self._workers[place] = self._new_worker(place)
            with contextlib.suppress(RendererUnavailable):
                dead.await_ready()
                return dead

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the renderer is closed")

    def close(self) -> None:
        """Ends the workers; may be called twice, and while another thread draws, whose `render` then raises."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def gl_renderer_string() -> str:
    """OpenGL's name of what draws here, such as `llvmpipe (LLVM 15.0.6, 256 bits)`.

    Raises:
        RendererUnavailable: OpenGL does not work here.
    """
    empty = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody><camera name='{CAMERA}'/></worldbody></mujoco>")
    with EglRenderer(empty, num_workers=1) as renderer:
        return renderer.gl_renderer


class _Worker:
    """The parent's end of one drawing process."""

    def __init__(self, order: tuple[object, ...]) -> None:
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        # Not multiprocessing: forking is unsafe beside JAX's threads, and spawning would import the main module, JAX and all.
        # -P keeps this folder out of the worker's module search path.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stderr=self._stderr,
                env=_worker_environment(),
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it died at once: `await_ready` says so
            self.connection.send(order)

    def await_ready(self) -> str:
        """GL_RENDERER of the worker's context."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RendererUnavailable(
                f"OpenGL does not work here ({self.obituary()}): install EGL (Debian, Ubuntu: libegl1 libgl1), "
                "or libosmesa6 and set MUJOCO_GL=osmesa"
            ) from error
        if isinstance(answer, Exception):
            raise RendererUnavailable(f"OpenGL cannot draw these pictures: {answer}")
        return cast(str, answer)

    def request(self, poses: np.ndarray) -> None:
        with contextlib.suppress(OSError):  # it died: `receive` says so
            self.connection.send_bytes(poses.data.cast("B"))

    def receive(self, pictures: np.ndarray) -> bool:
        """Wait for the pictures that were requested; False if the process died over them."""
        try:
            self.connection.recv_bytes_into(pictures.data.cast("B"))
        except (EOFError, OSError):
            return False
        return True

    def obituary(self) -> str:
        """How the process ended and its last words."""
        try:
            status = self._process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            return f"render worker {self._process.pid} closed its connection"
        cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        self._stderr.seek(0)
        last_words = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"render worker {self._process.pid} {cause}", *last_words])

    def hang_up(self) -> None:
        """Lets the process end."""
        self.connection.close()

    def join(self) -> None:
        try:
            self._process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


def _stop(workers: list[_Worker]) -> None:
    """Ends all workers and forgets them."""
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.join()
    workers.clear()


def _answering(busy: dict[_Worker, slice]) -> list[_Worker]:
    """Waits for at least one busy worker to answer, or to die."""
    ready = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in ready]


def num_gpus() -> int:
    """NVIDIA GPUs of this machine, by their device files: JAX may have been told to leave them alone."""
    return len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))


def _device(index: int) -> int | None:
    """The EGL device on which a worker had best draw: they take turns on the GPUs that this process may use.

    The driver lists its devices before Mesa's, by the numbers that CUDA_VISIBLE_DEVICES has.
    """
    gpus = list(range(num_gpus()))
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(word.strip().isdigit() for word in words):
        gpus = [int(word) for word in words if int(word) in gpus]
    return gpus[index % len(gpus)] if len(gpus) > 0 and num_gpus() > 1 else None


def _worker_environment() -> dict[str, str]:
    environment = dict(os.environ)
    if sys.platform == "linux":  # elsewhere MuJoCo knows the one way
        environment.setdefault("MUJOCO_GL", "egl")
    environment.pop("PYOPENGL_PLATFORM", None)  # set by whatever drew in this process; MUJOCO_GL decides
    environment.setdefault("LP_NUM_THREADS", "0")  # llvmpipe's own threads: the cores are busy with other worlds
    return environment
