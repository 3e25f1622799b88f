"""One drawing process of `EglRenderer`: run as a script, so that it imports NumPy and MuJoCo but never JAX.

It holds one OpenGL context, reads batches of poses from a socket and answers each with the pictures, until the socket
closes: with its parent, however that ended. What goes wrong here is written to stderr, which the parent reads.
"""

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Protocol

import mujoco
import numpy as np
from OpenGL import GL

if TYPE_CHECKING:
    from aloha_jax.pixels.triangles import Triangles

SHADERS = pathlib.Path(__file__).parent / "shaders"
LARGEST_BATCH = 32 * 72 * 120  # pixels that are read at once
SHADOW_UNIT, DRAWN_UNIT = 0, 1  # texture units


class Artist(Protocol):
    """Draws one camera of one model."""

    def draw(self, poses: np.ndarray) -> np.ndarray:
        """Pictures uint8[n, H, W, 3] of poses float64[n, nq + 2]: joint positions, then the camera's way along x and y."""
        ...


class MujocoArtist:
    """Draws by MuJoCo's own renderer, at the size of the model's offscreen buffer."""

    def __init__(self, model: mujoco.MjModel, camera: str) -> None:
        self._model, self._data = model, mujoco.MjData(model)
        height, width = model.vis.global_.offheight, model.vis.global_.offwidth
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
        """See `Artist`."""
        pictures = np.empty((len(poses), *self._pixels.shape), np.uint8)
        for picture, pose in zip(pictures, poses, strict=True):
            self._data.qpos[:] = pose[:-2]
            self._draw_current(camera=pose[-2:])
            picture[:] = self._pixels[::-1]  # OpenGL's first row is the lowest
        return pictures

    def _draw_current(self, camera: np.ndarray) -> None:
        model, data = self._model, self._data
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        data.cam_xpos[self._camera.fixedcamid, :2] += camera
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._options, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)


class Rasterizer:
    """Draws a scene's triangles as MuJoCo's renderer does, in less time.

    MuJoCo sends the corners of every triangle of every geom, once for most lights, once for the shadow map and once more for the
    light that casts shadows. Here geoms that the camera cannot see are left out, all lights take one pass, and the shadow map
    covers what the camera sees and no more. Worlds are drawn one after another at the same place, so that a picture does not
    depend on its neighbours, and read together.
    """

    def __init__(self, model: mujoco.MjModel, scene: "Triangles") -> None:
        self._model, self._data, self._scene = model, mujoco.MjData(model), scene
        self._height, self._width = model.vis.global_.offheight, model.vis.global_.offwidth
        supersampling = scene["supersampling"]
        self._drawn_height, self._drawn_width = self._height * supersampling, self._width * supersampling
        longest = _longest_edge()
        if max(self._drawn_height, self._drawn_width) > longest:
            drawn = f"{self._drawn_height}x{self._drawn_width}"
            raise RuntimeError(f"{drawn} pixels would be drawn for each picture, and OpenGL draws {longest} along an edge")
        self._batch = max(1, min(longest // self._height, LARGEST_BATCH // (self._height * self._width)))
        words = {
            "GEOMS": model.ngeom,
            "LIGHTS": len(scene["lights"]),
            "SHADOW_LIGHT": scene["shadow_light"],
            "SHADOW_MAP": scene["shadow_map"],
            "SUPERSAMPLING": supersampling,
        }
        self._textures: dict[int, int] = {}  # of each unit
        self._prepare_scene(words)
        self._prepare_mean(words)
        if scene["shadow_light"] >= 0:
            self._prepare_shadow_map(words)
        for unit, texture in self._textures.items():  # last, since making a texture binds it, too
            GL.glActiveTexture(GL.GL_TEXTURE0 + unit)
            GL.glBindTexture(GL.GL_TEXTURE_2D, texture)
        GL.glEnable(GL.GL_CULL_FACE)
        GL.glFrontFace(GL.GL_CW)  # pictures are drawn upside down

    def _prepare_scene(self, words: dict[str, int]) -> None:
        scene = self._scene
        self._colors = _Program("scene", words)
        self._colors.set("lights", scene["lights"].reshape(-1, 3))
        self._colors.set("axes", scene["axes"])
        self._colors.set("projection", scene["projection"])
        attributes = {"place": 3, "normal": 3, "rgb": 3, "material": 4}
        self._mesh = _Mesh(self._colors, scene["vertices"], scene["indices"], attributes)

    def _prepare_mean(self, words: dict[str, int]) -> None:
        self._drawn, self._textures[DRAWN_UNIT] = _color_buffer(self._drawn_height, self._drawn_width, with_depth=True)
        self._pictures, _ = _color_buffer(self._batch * self._height, self._width, with_depth=False)
        self._mean = _Program("mean", words)
        self._mean.set("drawn", DRAWN_UNIT)
        covers_all = np.array([[-1, -1], [-1, 3], [3, -1]], np.float32)
        self._picture_mesh = _Mesh(self._mean, covers_all, np.arange(3, dtype=np.uint32), {"corner": 2})

    def _prepare_shadow_map(self, words: dict[str, int]) -> None:
        scene = self._scene
        self._colors.set("shadow_offset", np.float32(scene["shadow_offset"]))
        self._colors.set("shadow_map", SHADOW_UNIT)
        self._depths = _Program("shadow", words)
        self._shadow_mesh = _Mesh(self._depths, scene["shadow_vertices"], scene["shadow_indices"], {"place": 4})
        self._shadow_map, self._textures[SHADOW_UNIT] = _depth_buffer(scene["shadow_map"])

    def draw(self, poses: np.ndarray) -> np.ndarray:
        """See `Artist`."""
        pictures = np.empty((len(poses), self._height, self._width, 3), np.uint8)
        for start in range(0, len(poses), self._batch):
            batch = slice(start, start + self._batch)
            pictures[batch] = self._draw_batch(poses[batch])
        return pictures

    def _draw_batch(self, poses: np.ndarray) -> np.ndarray:
        """The same for poses that fit into the buffer of pictures."""
        geoms = np.empty((len(poses), self._model.ngeom, 3, 4), np.float32)
        for places, pose in zip(geoms, poses, strict=True):
            self._data.qpos[:] = pose[:-2]
            mujoco.mj_kinematics(self._model, self._data)
            places[:, :, :3] = self._data.geom_xmat.reshape(-1, 3, 3)
            places[:, :, 3] = self._data.geom_xpos
        scene = self._scene
        ways = np.pad(poses[:, -2:], ((0, 0), (0, 1))).astype(np.float32)
        eyes = scene["eye"] + ways
        before_eye = (geoms[..., 3] - eyes[:, None]) @ scene["axes"].T
        seen = _reach_into(scene["projection"], before_eye, scene["radii"])
        casting = _reach_into(scene["shadow_box"], geoms[..., 3] - ways[:, None], scene["radii"])
        for i, places in enumerate(geoms.reshape(len(poses), -1, 4)):
            if scene["shadow_light"] >= 0:
                self._draw_shadow_map(places, ways[i], _runs(casting[i], scene["shadow_ends"]))
            self._draw_scene(places, eyes[i], _runs(seen[i], scene["ends"]))
            self._average_into(i)
        pictures = np.empty((len(poses), self._height, self._width, 4), np.uint8)
        GL.glReadPixels(0, 0, self._width, len(poses) * self._height, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, pictures)
        return pictures[..., :3]

    def _draw_shadow_map(self, places: np.ndarray, way: np.ndarray, runs: list[tuple[int, int]]) -> None:
        size, box = self._scene["shadow_map"], self._scene["shadow_box"].copy()
        box[:3, 3] -= box[:3, :3] @ way  # it goes with the camera
        GL.glBindFramebuffer(GL.GL_FRAMEBUFFER, self._shadow_map)
        GL.glViewport(1, 1, size - 2, size - 2)  # nothing beyond the margin is in a shadow
        GL.glEnable(GL.GL_DEPTH_TEST)
        GL.glClear(GL.GL_DEPTH_BUFFER_BIT)
        self._colors.set("shadow_box", box)
        self._depths.set("shadow_box", box)
        self._depths.set("pose", places)
        # The map is not upside down: these are the sides away from the light, so that what it shines on does not shade itself.
        self._shadow_mesh.draw(runs)

    def _draw_scene(self, places: np.ndarray, eye: np.ndarray, runs: list[tuple[int, int]]) -> None:
        GL.glBindFramebuffer(GL.GL_FRAMEBUFFER, self._drawn)
        GL.glViewport(0, 0, self._drawn_width, self._drawn_height)
        GL.glEnable(GL.GL_DEPTH_TEST)
        GL.glClear(GL.GL_COLOR_BUFFER_BIT | GL.GL_DEPTH_BUFFER_BIT)
        self._colors.set("pose", places)
        self._colors.set("eye", eye)
        self._mesh.draw(runs)

    def _average_into(self, place: int) -> None:
        GL.glBindFramebuffer(GL.GL_FRAMEBUFFER, self._pictures)
        GL.glViewport(0, place * self._height, self._width, self._height)
        GL.glDisable(GL.GL_DEPTH_TEST)
        self._mean.set("first_row", place * self._height)
        self._picture_mesh.draw([(0, 3)])


def _reach_into(box: np.ndarray, places: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """bool[n, G]: which spheres reach into what a matrix maps to -1..1 along x and y; places float[n, G, 3] and radii, metres."""
    planes = np.stack([box[3] + side * box[axis] for axis in (0, 1) for side in (-1, 1)])  # positive inside
    planes /= np.linalg.norm(planes[:, :3], axis=1, keepdims=True)
    return np.asarray((places @ planes[:, :3].T + planes[:, 3] > -radii[:, None]).all(axis=-1))


def _runs(wanted: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
    """Where the indices of wanted geoms start and stop, those of neighbours together."""
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
    return [(start, stop) for start, stop in ends[edges].reshape(-1, 2).tolist() if start < stop]


class _Program:
    """The vertex and the fragment shader of that name, compiled with some words replaced by numbers."""

    def __init__(self, name: str, words: dict[str, int]) -> None:
        head = "#version 130\n" + "".join(f"#define {word} {number}\n" for word, number in words.items())
        self._program = GL.glCreateProgram()
        self._uniforms: dict[str, int] = {}
        for kind, suffix in ((GL.GL_VERTEX_SHADER, "vert"), (GL.GL_FRAGMENT_SHADER, "frag")):
            shader = GL.glCreateShader(kind)
            GL.glShaderSource(shader, head + (SHADERS / f"{name}.{suffix}").read_text())
            GL.glCompileShader(shader)
            if not GL.glGetShaderiv(shader, GL.GL_COMPILE_STATUS):
                raise RuntimeError(f"{name}.{suffix} does not compile: {_sentence(GL.glGetShaderInfoLog(shader))}")
            GL.glAttachShader(self._program, shader)
        GL.glLinkProgram(self._program)
        if not GL.glGetProgramiv(self._program, GL.GL_LINK_STATUS):
            raise RuntimeError(f"the shaders of {name} do not link: {_sentence(GL.glGetProgramInfoLog(self._program))}")
        self._name = name

    def attribute(self, name: str) -> int:
        return self._found(name, GL.glGetAttribLocation(self._program, name))

    def set(self, uniform: str, value: "np.ndarray | np.float32 | int") -> None:
        """Use the program, and set one of its uniforms: an integer, a float, vectors [3], [n, 3], [n, 4], a matrix."""
        GL.glUseProgram(self._program)
        if uniform not in self._uniforms:
            self._uniforms[uniform] = self._found(uniform, GL.glGetUniformLocation(self._program, uniform))
        place = self._uniforms[uniform]
        if isinstance(value, int):
            GL.glUniform1i(place, value)
        elif isinstance(value, np.float32):
            GL.glUniform1f(place, value)
        elif value.shape == (4, 4):
            GL.glUniformMatrix4fv(place, 1, True, value)
        elif value.shape == (3, 3):
            GL.glUniformMatrix3fv(place, 1, True, value)
        elif value.shape[-1] == 3:
            GL.glUniform3fv(place, value.size // 3, value)
        else:
            GL.glUniform4fv(place, len(value), value)

    def _found(self, name: str, place: int) -> int:
        if place < 0:  # OpenGL would say nothing, and draw something else
            raise RuntimeError(f"the shaders of {self._name} use no {name}")
        return int(place)


class _Mesh:
    """Triangles in OpenGL's memory, and what a vertex's numbers are to a program."""

    def __init__(self, program: _Program, vertices: np.ndarray, indices: np.ndarray, attributes: dict[str, int]) -> None:
        self._array = GL.glGenVertexArrays(1)
        GL.glBindVertexArray(self._array)
        for target, values in ((GL.GL_ARRAY_BUFFER, vertices), (GL.GL_ELEMENT_ARRAY_BUFFER, indices)):
            GL.glBindBuffer(target, GL.glGenBuffers(1))
            GL.glBufferData(target, values.nbytes, values, GL.GL_STATIC_DRAW)
        column = 0
        for name, size in attributes.items():
            place, offset = program.attribute(name), ctypes.c_void_p(column * vertices.itemsize)
            GL.glEnableVertexAttribArray(place)
            GL.glVertexAttribPointer(place, size, GL.GL_FLOAT, False, vertices.strides[0], offset)
            column += size

    def draw(self, runs: list[tuple[int, int]]) -> None:
        """The triangles of these ranges of indices, by the program in use."""
        GL.glBindVertexArray(self._array)
        for start, stop in runs:
            GL.glDrawElements(GL.GL_TRIANGLES, stop - start, GL.GL_UNSIGNED_INT, ctypes.c_void_p(4 * start))


def _color_buffer(height: int, width: int, with_depth: bool) -> tuple[int, int]:
    """A framebuffer and the texture behind it, RGBA."""
    options = {GL.GL_TEXTURE_MIN_FILTER: GL.GL_NEAREST}
    framebuffer, texture = _framebuffer(height, width, GL.GL_RGBA8, GL.GL_RGBA, GL.GL_COLOR_ATTACHMENT0, options)
    if with_depth:
        depth = GL.glGenRenderbuffers(1)
        GL.glBindRenderbuffer(GL.GL_RENDERBUFFER, depth)
        GL.glRenderbufferStorage(GL.GL_RENDERBUFFER, GL.GL_DEPTH_COMPONENT24, width, height)
        GL.glFramebufferRenderbuffer(GL.GL_FRAMEBUFFER, GL.GL_DEPTH_ATTACHMENT, GL.GL_RENDERBUFFER, depth)
    _require_complete()
    return framebuffer, texture


def _depth_buffer(size: int) -> tuple[int, int]:
    """A framebuffer of depths alone and the texture behind it, which tells what share of four texels lies behind a place."""
    options = {
        GL.GL_TEXTURE_MIN_FILTER: GL.GL_LINEAR,
        GL.GL_TEXTURE_MAG_FILTER: GL.GL_LINEAR,
        GL.GL_TEXTURE_WRAP_S: GL.GL_CLAMP_TO_EDGE,  # of the margin
        GL.GL_TEXTURE_WRAP_T: GL.GL_CLAMP_TO_EDGE,
        GL.GL_TEXTURE_COMPARE_MODE: GL.GL_COMPARE_REF_TO_TEXTURE,
        GL.GL_TEXTURE_COMPARE_FUNC: GL.GL_LEQUAL,
    }
    buffer = _framebuffer(size, size, GL.GL_DEPTH_COMPONENT24, GL.GL_DEPTH_COMPONENT, GL.GL_DEPTH_ATTACHMENT, options)
    GL.glDrawBuffer(GL.GL_NONE)
    GL.glReadBuffer(GL.GL_NONE)
    _require_complete()
    return buffer


def _framebuffer(height: int, width: int, sized: int, kind: int, attachment: int, options: dict[int, int]) -> tuple[int, int]:
    framebuffer, texture = int(GL.glGenFramebuffers(1)), int(GL.glGenTextures(1))
    GL.glBindFramebuffer(GL.GL_FRAMEBUFFER, framebuffer)
    GL.glBindTexture(GL.GL_TEXTURE_2D, texture)
    GL.glTexImage2D(GL.GL_TEXTURE_2D, 0, sized, width, height, 0, kind, GL.GL_UNSIGNED_INT, None)
    for option, value in options.items():
        GL.glTexParameteri(GL.GL_TEXTURE_2D, option, value)
    GL.glFramebufferTexture2D(GL.GL_FRAMEBUFFER, attachment, GL.GL_TEXTURE_2D, texture, 0)
    return framebuffer, texture


def _require_complete() -> None:
    if GL.glCheckFramebufferStatus(GL.GL_FRAMEBUFFER) != GL.GL_FRAMEBUFFER_COMPLETE:
        raise RuntimeError("OpenGL has no buffer to draw pictures of this size into")


def _longest_edge() -> int:
    """Of what OpenGL can draw into, pixels.

    Raises:
        RuntimeError: this OpenGL is too old for the shaders.
    """
    version = GL.glGetString(GL.GL_VERSION).decode()
    if tuple(map(int, version.split()[0].split(".")[:2])) < (3, 0):
        raise RuntimeError(f"it needs OpenGL 3.0, and this is {version}; --render-quality exact does with less")
    return int(GL.glGetIntegerv(GL.GL_MAX_TEXTURE_SIZE))


def _sentence(words: "bytes | str") -> str:
    """OpenGL's words in one line."""
    text = words.decode(errors="replace") if isinstance(words, bytes) else words
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def prefer(device: int) -> None:
    """Draw on that EGL device, unless the user chose another or there are not so many, as without the driver's EGL."""
    if os.environ.get("MUJOCO_GL", "").lower() != "egl" or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return
    from mujoco.egl import egl_ext

    if device < len(egl_ext.eglQueryDevicesEXT()):
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(device)  # MuJoCo reads it when it makes its first context


def make_artist(model: mujoco.MjModel, camera: str, triangles: "Triangles | None") -> Artist:
    """What draws, in the current OpenGL context.

    Raises:
        RuntimeError: in one line, why it cannot.
    """
    try:
        return MujocoArtist(model, camera) if triangles is None else Rasterizer(model, triangles)
    except GL.GLError as error:
        raise RuntimeError(f"{error.baseOperation.__name__}: {_sentence(error.description)}") from error


def main(connection: Connection) -> None:
    model, camera, triangles, device = connection.recv()
    if device is not None:
        prefer(device)
    context = mujoco.GLContext(model.vis.global_.offwidth, model.vis.global_.offheight)
    context.make_current()
    try:
        artist = make_artist(model, camera, triangles)
    except RuntimeError as error:
        connection.send(error)
        return
    connection.send(GL.glGetString(GL.GL_RENDERER).decode())
    while True:
        poses = np.frombuffer(connection.recv_bytes()).reshape(-1, model.nq + 2)
        connection.send_bytes(artist.draw(poses).data.cast("B"))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's affair, which may have a last picture to draw
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has gone
        main(Connection(int(sys.argv[1])))
