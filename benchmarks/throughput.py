"""Steps per second of every engine, renderer and batch size: bare physics, the environment, and full PPO, next to each other.

uv run -m benchmarks.throughput                                                 # C MuJoCo and OpenGL
uv run -m benchmarks.throughput --engine mjx --renderer warp --worlds 1024 4096 # a GPU
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import mujoco
import mujoco.rollout
import numpy as np
import tyro

import aloha_jax
from aloha_jax import training
from aloha_jax.config import NATURE_CNN
from aloha_jax.engines import Engine, make_engine
from aloha_jax.env import Env, make_from_config
from aloha_jax.pixels import make_renderer
from aloha_jax.presets import PRESETS

HOME = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.5) * 2  # gym_aloha's start pose, grippers half open


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to measure."""

    engine: Literal["c", "mjx"] = "c"
    """Physics."""
    impl: Literal["auto", "warp", "jax"] = "auto"
    """Implementation of mjx."""
    renderer: Literal["egl", "warp"] = "egl"
    """Pixels."""
    quality: Literal["fast", "shadows", "exact"] = "fast"
    """Of the pixels."""
    worlds: tuple[int, ...] = (64,)
    """Batch sizes."""
    size: int = 84
    """Height and width of the pixels, of the whole frame."""
    steps: int = 32
    """Control steps per measurement, and per PPO rollout."""
    measure: tuple[Literal["physics", "state", "render", "pixels", "state-ppo", "pixel-ppo"], ...] = (
        "physics",
        "state",
        "render",
        "pixels",
        "state-ppo",
        "pixel-ppo",
    )
    """Bare physics, the environment from the state, the bare renderer, the environment from pixels, full PPO from either."""
    repeats: int = 3
    """Measurements; the fastest counts."""


def seconds_of(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of the fastest of the others."""
    taken = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return taken[0], min(taken[1:])


def actions_of(num_worlds: int, steps: int) -> jax.Array:
    """float32[steps, N, 14], absolute targets that wander around the start pose."""
    home = jnp.array(HOME)[None, None]
    return home + 0.3 * jnp.cumsum(jax.random.normal(jax.random.key(1), (steps, num_worlds, 14)), axis=0) / steps**0.5


def bare_physics(engine: Engine, flags: Flags, num_worlds: int) -> Callable[[], Any]:
    """The engine's own library, in one call for all steps: `mujoco.rollout`, or a scan over `mjx.step`."""
    model, substeps = engine.scene.model, engine.scene.substeps * flags.steps
    if flags.engine == "c":
        data = mujoco.MjData(model)
        mujoco.mj_resetDataKeyframe(model, data, 0)
        state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS))
        mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        threads = len(os.sched_getaffinity(0))
        pool, each = mujoco.rollout.Rollout(nthread=threads), [mujoco.MjData(model) for _ in range(threads)]
        ctrl = np.tile(model.key_qpos[0][: model.nu], (num_worlds, 1, 1))
        return lambda: pool.rollout(model, each, np.tile(state, (num_worlds, 1)), ctrl, nstep=substeps)[0]
    from mujoco import mjx

    from aloha_jax.engines.mjx import MjxEngine

    assert isinstance(engine, MjxEngine)
    start = jnp.tile(jnp.asarray(model.key_qpos[0], jnp.float32), (num_worlds, 1))
    zeros = jnp.zeros((num_worlds, model.nv))
    step = jax.vmap(mjx.step, in_axes=(None, 0))

    def run(qpos: jax.Array) -> jax.Array:
        data = engine._load(qpos, zeros, zeros, qpos[:, : model.nu])
        return jax.lax.scan(lambda data, _: (step(engine.model, data), None), data, length=substeps)[0].qpos

    compiled = jax.jit(run)
    return lambda: compiled(start)


def environment(env: Env, flags: Flags) -> Callable[[], Any]:
    """Steps of the environment, resets and observations included; the observations are summed, so that none is optimised away."""

    def step(state: Any, action: jax.Array) -> tuple[Any, jax.Array]:
        state = env.step(state, action)
        return state, jnp.sum(state.obs, dtype=jnp.float32)

    run = jax.jit(lambda state, actions: jax.lax.scan(step, state, actions)[1])
    state, actions = jax.jit(env.reset)(jax.random.key(0)), actions_of(env.num_envs, flags.steps)
    return lambda: run(state, actions)


def ppo(flags: Flags, num_worlds: int, obs: Literal["state", "pixels"]) -> Callable[[], Any]:
    """Full updates: rollout and four epochs on the guide's network."""
    config = dataclasses.replace(
        PRESETS["gpu"],
        obs=obs,
        engine=flags.engine,
        impl=flags.impl if flags.engine == "mjx" else "auto",
        renderer=flags.renderer,
        render_quality=flags.quality,
        image_height=flags.size,
        image_width=flags.size,
        crop=None,
        conv=NATURE_CNN,
        n_envs=num_worlds,
        n_steps=flags.steps,
        batch_size=num_worlds * flags.steps // 4,
    ).validate()
    env = make_from_config(config)
    carry = [training.init_run(config, env)]
    train_step = training.make_train_step(config, env)

    def update() -> Any:
        carry[0], metrics = train_step(carry[0])
        return metrics

    return update


def measurements(flags: Flags, num_worlds: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    physics = {"engine": flags.engine, "impl": flags.impl}
    make: Any = aloha_jax.make
    pixels = {"image_height": flags.size, "image_width": flags.size, "renderer": flags.renderer, "render_quality": flags.quality}
    for what in flags.measure:
        if what == "physics":
            engine = make_engine(flags.engine, impl=flags.impl)
            yield what, bare_physics(engine, flags, num_worlds)
        elif what == "state":
            yield what, environment(make("insertion", num_worlds, obs="state", **physics), flags)
        elif what == "render":
            with make_renderer(flags.renderer, "insertion", flags.size, flags.size, quality=flags.quality) as renderer:
                poses = np.tile(make_engine("c").scene.model.key_qpos[0], (num_worlds, 1))
                yield what, lambda: [renderer.render(poses) for _ in range(flags.steps)]  # noqa: B023 - called at once
        elif what == "pixels":
            yield what, environment(make("insertion", num_worlds, obs="pixels", **pixels, **physics), flags)
        else:
            yield what, ppo(flags, num_worlds, "state" if what == "state-ppo" else "pixels")


def main(flags: Flags) -> None:
    device = jax.devices()[0].device_kind
    print(
        f"{device}; engine {flags.engine} ({flags.impl}), renderer {flags.renderer} ({flags.quality}), {flags.size}×{flags.size}"
    )
    print("| worlds | what | control steps/s | first call, s |\n|---|---|---|---|")
    for num_worlds in flags.worlds:
        for what, work in measurements(flags, num_worlds):
            first, fastest = seconds_of(work, flags.repeats)
            print(f"| {num_worlds} | {what} | {num_worlds * flags.steps / fastest:,.0f} | {first:.1f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
