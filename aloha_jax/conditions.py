"""gym_aloha, changed: other start poses, friction, masses, delays, cameras and light, to see what a policy can bear."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from aloha_jax.engines.c import CEngine, scaled
from aloha_jax.env_state import Domain
from aloha_jax.scene import CAMERA, PEG_QPOS, SOCKET_QPOS, make_scene, scale_dynamics
from aloha_jax.tasks.insertion import pose_error


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
        pose_noise: metres that objects seem off their place to a policy that sees the state, the standard deviation along each
            axis; they seem turned, too, by a degree per millimetre.
    """

    yaw: float = 0.0
    shift: float = 0.0
    friction: float = 1.0
    mass: float = 1.0
    delay: int = 0
    camera_shift: tuple[float, float] = (0.0, 0.0)
    brightness: float = 1.0
    pose_noise: float = 0.0

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
        """Whether our own worlds can differ so, too, whose actions are late by one step at most."""
        return self.delay <= 1

    def start(self, qpos: np.ndarray, seed: int) -> np.ndarray:
        """Joint positions float[30] to start from, given gym_aloha's."""
        rng, moved = np.random.default_rng(seed), qpos.copy()
        for part in (PEG_QPOS, SOCKET_QPOS):
            position, yaw = moved[part][:2] + rng.uniform(-self.shift, self.shift, 2), rng.uniform(-self.yaw, self.yaw)
            moved[part] = [*position, moved[part][2], np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        return moved

    def pose_error(self, seed: int) -> np.ndarray:
        """By how much objects seem off, float32[2, 6], as of `Domain.pose_error`."""
        return np.asarray(pose_error(self.pose_noise, np.random.default_rng([seed, 1]).normal(size=(2, 6))), np.float32)

    def light(self, frame: np.ndarray) -> np.ndarray:
        """A picture uint8[H, W, 3] under this light."""
        return frame if self.brightness == 1.0 else np.clip(self.brightness * frame, 0, 255).astype(np.uint8)


NOMINAL = Condition()


@dataclasses.dataclass(frozen=True)
class OurWorlds:
    """Some conditions as our own worlds have them, side by side.

    Attributes:
        conditions: all that there are.
    """

    conditions: Sequence[Condition]

    def engine(self, task: str, physics: str) -> CEngine:
        """C MuJoCo, with a model for each friction and mass."""
        scene = make_scene(task, physics)
        return CEngine(scene, models=[scaled(scene.model, friction, mass) for friction, mass in self._dynamics])

    def models(self, worlds: Sequence[Condition]) -> np.ndarray:
        """int32[N], which of the engine's models each of these worlds is to move under."""
        return np.array([self._dynamics.index((condition.friction, condition.mass)) for condition in worlds], np.int32)

    def domain(self, worlds: Sequence[Condition], seeds: Sequence[int]) -> Domain:
        """What is off in these worlds, in the episodes of these seeds."""
        camera = np.array([condition.camera_shift for condition in worlds], np.float32)
        late = np.array([condition.delay > 0 for condition in worlds])
        known = self.conditions
        seem_off = any(condition.pose_noise for condition in known)
        errors = (condition.pose_error(seed) for condition, seed in zip(worlds, seeds, strict=True))
        return Domain(
            camera=jnp.asarray(camera) if any(any(condition.camera_shift) for condition in known) else None,
            late=jnp.asarray(late) if any(condition.delay for condition in known) else None,
            pose_error=jnp.asarray(np.stack(list(errors))) if seem_off else None,
        )

    def light(self, worlds: Sequence[Condition]) -> jax.Array | None:
        """float32[N], factors on these worlds' pictures; None if none is to be changed under any condition."""
        if all(condition.brightness == 1.0 for condition in self.conditions):
            return None
        return jnp.array([condition.brightness for condition in worlds], jnp.float32)

    @property
    def _dynamics(self) -> list[tuple[float, float]]:
        return list(dict.fromkeys((condition.friction, condition.mass) for condition in self.conditions))
