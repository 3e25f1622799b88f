"""Physics engines: one control step of N worlds behind one small interface."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from aloha_jax.config import ConfigError
from aloha_jax.scene import Scene


class Physics(NamedTuple):
    """The state of N worlds, as JAX or (on the host) NumPy arrays. The world axis leads every array.

    Attributes:
        internal: the engine's own complete state, opaque to everyone else.
        qpos: float32[N, nq], joint positions (metres, radians, unit quaternions).
        qvel: float32[N, nv], joint velocities (m/s, rad/s).
        sensordata: float32[N, nsensordata], addressed through `Scene.sensors` and `Scene.touches`.
    """

    internal: Any
    qpos: Any
    qvel: Any
    sensordata: Any


def choose(mask: jax.Array, new: Any, old: Any) -> Any:
    """`new` where bool[N] `mask` holds, else `old`, for every array [N, ...] of two like pytrees."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b), new, old)


class Engine(Protocol):
    """Pure functions of arrays: usable under `jit`, no hidden state from one call to the next."""

    scene: Scene

    def reset(self, qpos: jax.Array, qvel: jax.Array) -> Physics:
        """Worlds at float32[N, nq] positions and float32[N, nv] velocities."""
        ...

    def step(self, physics: Physics, action: jax.Array) -> Physics:
        """One control step (0.02 s) toward float32[N, 14] absolute targets in gym_aloha's meaning.

        Worlds whose physics became unstable have non-finite positions.
        """
        ...

    def reset_where(self, mask: jax.Array, physics: Physics, qpos: jax.Array, qvel: jax.Array) -> Physics:
        """`reset` for the worlds where bool[N] `mask` holds, `physics` elsewhere."""
        ...

    def complaint(self, physics: Physics) -> str | None:
        """One sentence about what went wrong in these worlds that no state shows, and what to do; None if nothing did."""
        ...


def make_engine(
    name: str,
    task: str = "insertion",
    physics: str = "fast",
    impl: str = "auto",
    *,
    friction_factor: float = 1.0,
    mass_factor: float = 1.0,
) -> Engine:
    """The engine called `name` on the scene of `task`.

    Args:
        name: `c` or `mjx`.
        task: a key of `scene.TASK_SCENES`.
        physics: `fast` or `exact`, as in `scene.make_scene`; the `jax` implementation has only its own, `reduced`.
        impl: of `mjx`: `warp`, `jax`, or `auto` for the better one on this device.
        friction_factor: with `c`, worlds differ in friction, by factors in 1/f..f.
        mass_factor: with `c`, worlds differ in mass and inertia of peg and socket, by factors in 1/f..f.

    Raises:
        ConfigError: the `jax` implementation is asked for exact physics, or `mjx` for worlds that differ.
    """
    from aloha_jax.scene import make_scene

    if name == "c":
        from aloha_jax.engines.c import CEngine, variants

        scene = make_scene(task, physics)
        return CEngine(scene, models=variants(scene.model, friction_factor, mass_factor))
    if name != "mjx":
        raise ValueError(f"engine is 'c' or 'mjx', not {name!r}")
    if not friction_factor == mass_factor == 1.0:
        raise ConfigError("--friction-factor and --mass-factor need --engine c: MJX's worlds share one model")
    from aloha_jax.engines.mjx import MjxEngine, default_impl

    impl = default_impl() if impl == "auto" else impl
    if impl == "jax":
        if physics == "exact":
            raise ConfigError(
                "--physics exact needs --impl warp or --engine c: MJX's jax implementation has its own collision model"
            )
        physics = "reduced"
    return MjxEngine(make_scene(task, physics), impl)
