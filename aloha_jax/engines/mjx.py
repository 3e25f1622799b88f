"""MuJoCo XLA: physics inside the jit boundary, on whatever device JAX computes on.

Two implementations of the same model: `warp` (NVIDIA Warp kernels behind XLA's foreign function interface: CUDA and CPU) takes
gym_aloha's collisions as they are, `jax` (any XLA device) a reduced model of them, `scene.reduced_physics`.

A world's state is its positions, its velocities and the solver's warm start. All else in `mjx.Data` follows from them, so each
control step starts from blank data: the state stays small, a checkpoint can hold it, and resetting a world is a `jnp.where`.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import warp
from gym_aloha.constants import START_ARM_POSE
from mujoco import mjx
from mujoco.mjx.third_party.mujoco_warp import OverflowType
from mujoco.mjx.warp.types import GraphMode

from aloha_jax.config import ConfigError
from aloha_jax.engines import Physics, choose
from aloha_jax.engines.c import action_to_ctrl
from aloha_jax.scene import Scene

# Buffers of the `warp` implementation, per world; measured maxima and margins: tests/test_mjx.py, docs/architecture.md.
MAX_CONTACTS = 64  # contacts, and pairs of geoms whose bounds overlap; shared by all worlds, so peaks of few average out
MAX_CONVEX_PAIRS = 16  # pairs that need the general algorithm for convex bodies, whose workspace is the largest; shared likewise
MAX_CONSTRAINTS = 320  # rows of the constraint Jacobian; of each world

GRAPH_MODE = "ALOHA_JAX_GRAPH_MODE"  # environment variable: how Warp's kernels become CUDA graphs, to compare what MJX offers

# What a full buffer is called in `OverflowType`. Its other bits are no loss: solvers that stop at their iteration limit.
CONTACT_OVERFLOW = int(OverflowType.BROADPHASE | OverflowType.NARROWPHASE)
CONVEX_OVERFLOW = int(OverflowType.CCD)
CONSTRAINT_OVERFLOW = int(OverflowType.NEFC | OverflowType.NJMAX_NNZ)


class MjxState(NamedTuple):
    """`Physics.internal` of this engine.

    Attributes:
        warmstart: float32[N, nv], accelerations from which the solver starts.
        overflow: int32[N], buffers that were ever too small for the world (bits of `OverflowType`); outlives resets.
    """

    warmstart: jax.Array
    overflow: jax.Array


def warp_has_kernels() -> bool:
    """Whether Warp has kernels for JAX's default device: CPUs and CUDA have; TPUs, ROCm and Metal do not."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return True
    try:
        return device in jax.devices("cuda")  # its name says nothing: a "Tesla T4" is NVIDIA's, too
    except RuntimeError:  # there is no such backend
        return False


def default_impl() -> str:
    """The implementation for JAX's default device: `warp` where Warp has kernels, `jax` elsewhere."""
    return "warp" if warp_has_kernels() else "jax"


def chosen_graph_mode() -> GraphMode | None:
    """What the environment variable `GRAPH_MODE` asks for; None if nothing.

    Raises:
        ConfigError: there is no such mode.
    """
    name = os.environ.get(GRAPH_MODE)
    if name is None:
        return None
    modes = GraphMode.__members__
    if name not in modes:
        raise ConfigError(f"{GRAPH_MODE} is one of {', '.join(modes)}; not {name!r}")
    return modes[name]


class MjxEngine:
    """The Engine interface over `mujoco.mjx`.

    Attributes:
        scene: the model.
        impl: `warp` or `jax`.
        model: `scene.model` on the device.
    """

    def __init__(
        self,
        scene: Scene,
        impl: str,
        *,
        max_contacts: int = MAX_CONTACTS,
        max_convex_pairs: int = MAX_CONVEX_PAIRS,
        max_constraints: int = MAX_CONSTRAINTS,
        graph_mode: GraphMode | None = None,
    ):
        """Puts the model on the device.

        Args:
            scene: what to simulate; for `jax` one that it can compile (`reduced`).
            impl: `warp` or `jax`.
            max_contacts: contacts per world for which there is room, on average over the worlds; `warp` only.
            max_convex_pairs: of those, pairs of convex bodies that are no simple shapes; `warp` only.
            max_constraints: constraint rows for which each world has room; `warp` only.
            graph_mode: how Warp's kernels become CUDA graphs; by default `chosen_graph_mode`, else MJX's choice.
        """
        if impl not in ("warp", "jax"):
            raise ValueError(f"impl is 'warp' or 'jax', not {impl!r}")
        warp.config.log_level = warp.LOG_ERROR  # it would print every kernel that it loads
        self.scene, self.impl = scene, impl
        self._max_contacts, self._max_constraints = max_contacts, max_constraints
        self._max_convex_pairs = min(max_convex_pairs, max_contacts)
        graph_mode = chosen_graph_mode() if graph_mode is None else graph_mode
        self.model = mjx.put_model(scene.model, impl=impl, graph_mode=graph_mode)
        if impl == "warp":  # `complaint` says once what the kernels would print at every step
            self.model = self.model.tree_replace({"opt._impl.warn_overflow": 0})

    def reset(self, qpos: jax.Array, qvel: jax.Array) -> Physics:
        num_worlds = qpos.shape[0]
        internal = MjxState(jnp.zeros_like(qvel), jnp.zeros(num_worlds, jnp.int32))
        ctrl = jnp.broadcast_to(jnp.asarray(START_ARM_POSE, jnp.float32), (num_worlds, self.scene.model.nu))
        data = self._forward(self._load(qpos, qvel, internal.warmstart, ctrl))
        return Physics(internal, qpos, qvel, data.sensordata)

    def step(self, physics: Physics, action: jax.Array) -> Physics:
        data = self._load(physics.qpos, physics.qvel, physics.internal.warmstart, action_to_ctrl(action))

        def substep(carry: tuple[mjx.Data, jax.Array], _: None) -> tuple[tuple[mjx.Data, jax.Array], None]:
            data, overflow = carry
            data = jax.vmap(mjx.step, in_axes=(None, 0))(self.model, data)
            return (data, overflow | self._overflow(data)), None

        carry, _ = jax.lax.scan(substep, (data, physics.internal.overflow), length=self.scene.substeps)
        data, overflow = carry
        sensed = self._forward(data) if self.scene.fresh_sensors else data  # `mjx.step` senses before it integrates
        # Warp clips a control that is no number to the control range, and goes on.
        qpos = jnp.where(jnp.isfinite(action).all(axis=1, keepdims=True), data.qpos, jnp.nan)
        return Physics(MjxState(data.qacc_warmstart, overflow), qpos, data.qvel, sensed.sensordata)

    def reset_where(self, mask: jax.Array, physics: Physics, qpos: jax.Array, qvel: jax.Array) -> Physics:
        def merged() -> Physics:
            chosen: Physics = choose(mask, self.reset(qpos, qvel), physics)
            return chosen._replace(internal=chosen.internal._replace(overflow=physics.internal.overflow))

        return jax.lax.cond(mask.any(), merged, lambda: physics)

    def complaint(self, physics: Physics) -> str | None:
        """One sentence if a buffer was ever too small for these worlds, with the number to raise; waits for the device."""
        overflow = np.asarray(physics.internal.overflow)
        worlds = int(np.count_nonzero(overflow))
        if worlds == 0:
            return None
        bits = int(np.bitwise_or.reduce(overflow))
        limits = (
            (CONTACT_OVERFLOW, "max_contacts", self._max_contacts),
            (CONVEX_OVERFLOW, "max_convex_pairs", self._max_convex_pairs),
            (CONSTRAINT_OVERFLOW, "max_constraints", self._max_constraints),
        )
        remedies = [f"{name} above {limit}" for buffers, name, limit in limits if bits & buffers]
        return (
            f"MJX-Warp had to drop contacts in {worlds} of {len(overflow)} worlds: "
            f"raise {' and '.join(remedies)} (aloha_jax/engines/mjx.py)"
        )

    def _load(self, qpos: jax.Array, qvel: jax.Array, warmstart: jax.Array, ctrl: jax.Array) -> mjx.Data:
        """Data of N worlds in these states."""
        blank = self._blank(qpos.shape[0])

        def load(qpos: jax.Array, qvel: jax.Array, warmstart: jax.Array, ctrl: jax.Array) -> mjx.Data:
            return blank.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart, ctrl=ctrl)

        return jax.vmap(load)(qpos, qvel, warmstart, ctrl)

    def _blank(self, num_worlds: int) -> mjx.Data:
        """Data of one world; the contact buffers of `warp`, which all worlds share, have room for `num_worlds`."""
        with jax.ensure_compile_time_eval():
            if self.impl == "jax":
                return mjx.make_data(self.model)
            data = mjx.make_data(
                self.scene.model,
                impl="warp",
                naconmax=num_worlds * self._max_contacts,
                naccdmax=num_worlds * self._max_convex_pairs,
                njmax=self._max_constraints,
            )
        # Buffers grow with the number of worlds: make them on the device, rather than store them in the program.
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if not np.asarray(x).any() else x, data)

    def _forward(self, data: mjx.Data) -> mjx.Data:
        return jax.vmap(mjx.forward, in_axes=(None, 0))(self.model, data)

    def _overflow(self, data: Any) -> jax.Array:
        """int32[N], the buffers that were too small in the last `mjx.step`."""
        if self.impl == "jax":  # its contacts are as many as the pairs allow
            return jnp.zeros(data.qpos.shape[0], jnp.int32)
        return data._impl.overflow & (CONTACT_OVERFLOW | CONVEX_OVERFLOW | CONSTRAINT_OVERFLOW)
