"""gym_aloha, changed: other start poses, friction, masses, delays, cameras and light, to see what a policy can bear."""

import copy
import dataclasses
from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np

from aloha_jax.engines import Engine
from aloha_jax.engines.c import CEngine
from aloha_jax.env_state import Domain
from aloha_jax.scene import CAMERA, PEG_QPOS, SOCKET_QPOS, make_scene, scale_dynamics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """How the world differs from gym_aloha's. The default does not.

    Attributes:
        yaw: peg and socket start turned about the vertical by up to this, radians, either way.
        shift: they start moved by up to this along x and along y, metres, either way, beside gym_aloha's own range.
        friction: factor on all friction coefficients.
        mass: factor on mass and inertia of peg and socket.
        delay: control steps by which actions arrive late.
        camera_shift: the top camera is moved by this along x and y, metres, and looks straight down as before.
        brightness: factor on the pictures.
    """

    yaw: float = 0.0
    shift: float = 0.0
    friction: float = 1.0
    mass: float = 1.0
    delay: int = 0
    camera_shift: tuple[float, float] = (0.0, 0.0)
    brightness: float = 1.0

    def change_model(self, physics: Any) -> None:
        """Apply what belongs to the model to gym_aloha's `dm_control` physics, once."""
        model = physics.model
        if any(self.camera_shift):
            camera = model.name2id(CAMERA, "camera")
            # gym_aloha's camera turns towards the table, from straight above: moved a little, its picture would roll by a right
            # angle and more.
            model.cam_mode[camera] = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
            mujoco.mju_mat2Quat(model.cam_quat[camera], model.cam_mat0[camera])
            model.cam_pos[camera][:2] += self.camera_shift
        scale_dynamics(model.ptr, self.friction, self.mass)

    @property
    def is_ours(self) -> bool:
        """Whether our own worlds can differ so, too: they have one light, and actions are late by one step at most."""
        return self.brightness == 1.0 and self.delay <= 1

    def domain(self, num_worlds: int) -> Domain:
        """Camera and lateness of that many of our worlds."""
        camera = jnp.tile(jnp.array(self.camera_shift, jnp.float32), (num_worlds, 1)) if any(self.camera_shift) else None
        return Domain(camera, jnp.ones(num_worlds, bool) if self.delay else None)

    def engine(self, task: str, physics: str) -> Engine:
        """C MuJoCo with this friction and these masses in all worlds."""
        scene = make_scene(task, physics)
        model = copy.copy(scene.model)
        scale_dynamics(model, self.friction, self.mass)
        return CEngine(dataclasses.replace(scene, model=model))

    def start(self, qpos: np.ndarray, seed: int) -> np.ndarray:
        """Joint positions float[30] to start from, given gym_aloha's."""
        rng, moved = np.random.default_rng(seed), qpos.copy()
        for part in (PEG_QPOS, SOCKET_QPOS):
            position, yaw = moved[part][:2] + rng.uniform(-self.shift, self.shift, 2), rng.uniform(-self.yaw, self.yaw)
            moved[part] = [*position, moved[part][2], np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        return moved

    def light(self, frame: np.ndarray) -> np.ndarray:
        """A picture uint8[H, W, 3] under this light."""
        return frame if self.brightness == 1.0 else np.clip(self.brightness * frame, 0, 255).astype(np.uint8)


NOMINAL = Condition()
