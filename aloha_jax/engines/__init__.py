"""Physics engines: one control step of N worlds behind one small interface."""

from typing import Any, NamedTuple, Protocol

import jax

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


def make_engine(name: str, task: str = "insertion", physics: str = "fast") -> Engine:
    """The engine called `name` (`c`) on the scene of `task`; `physics` as in `scene.make_scene`."""
    from aloha_jax.engines.c import CEngine
    from aloha_jax.scene import make_scene

    if name != "c":
        raise ValueError(f"engine is 'c', not {name!r}")
    return CEngine(make_scene(task, physics))
