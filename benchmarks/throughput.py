"""Steps per second of every engine, renderer and batch size: bare physics, the environment, policy, full PPO, next to each other.

uv run -m benchmarks.throughput                                                 # C MuJoCo and OpenGL
uv run -m benchmarks.throughput --engine mjx --renderer warp --worlds 1024 4096 # a GPU
"""

import concurrent.futures
import dataclasses
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import mujoco.rollout
import numpy as np
import tyro

import aloha_jax
from aloha_jax import training
from aloha_jax.config import Config
from aloha_jax.engines import Engine, make_engine
from aloha_jax.engines.c import action_to_ctrl
from aloha_jax.env import Env
from aloha_jax.factory import make_from_config
from aloha_jax.pixels import DeviceRenderer, Renderer, make_renderer
from aloha_jax.policy import make_network
from aloha_jax.settings import NATURE_CNN
from aloha_jax.startup import usable_cores

HOME = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.5) * 2  # gym_aloha's start pose, grippers half open


What = Literal["testspeed", "physics", "state", "state-policy", "state-ppo", "render", "pixels", "pixel-policy", "pixel-ppo"]
ALL: tuple[What, ...] = ("physics", "state", "state-policy", "state-ppo", "render", "pixels", "pixel-policy", "pixel-ppo")


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
    measure: tuple[What, ...] = ALL
    """Bare physics, the environment from the state, with the policy, full PPO; the bare renderer, and the same from pixels. On
    request, for MJX-Warp: `testspeed`, MJX's own benchmark of our scene."""
    double_buffer: bool = True
    """Of rollouts with pictures from the host."""
    repeats: int = 3
    """Measurements; the fastest counts."""
    paired: bool = False
    """Each next to its bare one, call by call in one process, where the speed swings: shares are medians of the ratios of
    such pairs, memory is both's."""


def seconds_of(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of the fastest of the others."""
    taken = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return taken[0], min(taken[1:])


def paired_share(bare: Callable[[], Any], work: Callable[[], Any], repeats: int) -> float:
    """What `work` leaves of the rate of `bare`: the median over calls of both in turn."""
    shares = []
    for _ in range(1 + repeats):
        seconds = []
        for call in (bare, work):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        shares.append(seconds[0] / seconds[1])
    return float(np.median(shares[1:]))


def actions_of(num_worlds: int, steps: int) -> jax.Array:
    """float32[steps, N, 14], absolute targets that wander around the start pose."""
    home = jnp.array(HOME)[None, None]
    return home + 0.3 * jnp.cumsum(jax.random.normal(jax.random.key(1), (steps, num_worlds, 14)), axis=0) / steps**0.5


def bare_physics(engine: Engine, flags: Flags, num_worlds: int) -> Callable[[], Any]:
    """The engine's own library, in one call for all steps: `mujoco.rollout`, or a scan over `mjx.step`."""
    model = engine.scene.model
    # The environment's own starts and controls: what arms and objects touch decides how long a step takes.
    env = aloha_jax.make(num_envs=num_worlds)
    starts = env.reset(jax.random.key(0)).qpos
    actions = jnp.clip(actions_of(num_worlds, flags.steps), env.target_low[None, None], env.target_high[None, None])
    if flags.engine == "c":
        state = np.zeros((num_worlds, mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)))
        state[:, 1 : 1 + model.nq] = starts  # behind the time
        ctrl = np.stack([action_to_ctrl(action) for action in np.asarray(actions)], axis=1).repeat(engine.scene.substeps, axis=1)
        threads = usable_cores()
        pool, each = mujoco.rollout.Rollout(nthread=threads), [mujoco.MjData(model) for _ in range(threads)]
        return lambda: pool.rollout(model, each, state, ctrl)[0]
    from mujoco import mjx

    from aloha_jax.engines.mjx import MjxEngine

    assert isinstance(engine, MjxEngine)
    zeros = jnp.zeros((num_worlds, model.nv))
    substep = jax.vmap(mjx.step, in_axes=(None, 0))

    def step(data: mjx.Data, action: jax.Array) -> tuple[mjx.Data, None]:
        data = data.replace(ctrl=action_to_ctrl(action))
        return jax.lax.fori_loop(0, engine.scene.substeps, lambda _, data: substep(engine.model, data), data), None

    def run(qpos: jax.Array, actions: jax.Array) -> jax.Array:
        data = engine._load(qpos, zeros, zeros, action_to_ctrl(actions[0]))
        return jax.lax.scan(step, data, actions)[0].qpos

    compiled = jax.jit(run)
    return lambda: compiled(starts, actions)


def environment(env: Env, flags: Flags) -> Callable[[], Any]:
    """Steps of the environment, resets and observations included; the observations are summed, so that none is optimised away."""

    def step(state: Any, action: jax.Array) -> tuple[Any, jax.Array]:
        state = env.step(state, action)
        return state, jnp.sum(state.obs, dtype=jnp.float32)

    run = jax.jit(lambda state, actions: jax.lax.scan(step, state, actions)[1])
    state, actions = jax.jit(env.reset)(jax.random.key(0)), actions_of(env.num_envs, flags.steps)
    return lambda: run(state, actions)


def pictures(renderer: Renderer, poses: np.ndarray, flags: Flags) -> Callable[[], Any]:
    """The bare renderer: OpenGL's into the host's memory, a ray tracer's into the device's, all worlds at once."""
    if not isinstance(renderer, DeviceRenderer):
        return lambda: [renderer.render(poses) for _ in range(flags.steps)]
    trace, on_device = jax.jit(renderer.trace), jnp.asarray(poses, jnp.float32)
    return lambda: [trace(on_device) for _ in range(flags.steps)]


def config_of(flags: Flags, num_worlds: int, obs: Literal["state", "pixels"]) -> Config:
    """The guide's network, four epochs of four minibatches."""
    return Config(
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
        double_buffer=flags.double_buffer,
    ).validate()


def policy(config: Config) -> Callable[[], Any]:
    """Rollouts: the environment under a policy that samples its actions."""
    env, network = make_from_config(config), make_network(config)
    run = training.init_run(config, env)
    rollout = jax.jit(lambda run, key: training.make_collector(config, env, network, run).rollout(run.env, key))
    return lambda: rollout(run, jax.random.key(0))


def ppo(config: Config) -> Callable[[], Any]:
    """Full updates: rollout and four epochs."""
    env = make_from_config(config)
    carry = [training.init_run(config, env)]
    train_step = training.make_train_step(config, env)

    def update() -> Any:
        carry[0], metrics = train_step(carry[0])
        return metrics

    return update


def work_of(flags: Flags, num_worlds: int, what: What) -> Callable[[], Any]:
    """What to time: `flags.steps` control steps of all worlds, or as many pictures."""
    physics = {"engine": flags.engine, "impl": flags.impl}
    make: Any = aloha_jax.make
    if what == "physics":
        return bare_physics(make_engine(flags.engine, impl=flags.impl), flags, num_worlds)
    if what == "state":
        return environment(make("insertion", num_worlds, obs="state", **physics), flags)
    if what == "render":
        renderer = make_renderer(flags.renderer, "insertion", flags.size, flags.size, quality=flags.quality)
        poses = np.tile(make_engine("c").scene.model.key_qpos[0], (num_worlds, 1))
        return pictures(renderer, poses, flags)
    if what == "pixels":
        size = {"image_height": flags.size, "image_width": flags.size}
        pixels = {"renderer": flags.renderer, "render_quality": flags.quality}
        return environment(make("insertion", num_worlds, obs="pixels", **size, **pixels, **physics), flags)
    config = config_of(flags, num_worlds, "state" if what.startswith("state") else "pixels")
    return ppo(config) if what.endswith("ppo") else policy(config)


class Measured(NamedTuple):
    """One row.

    Attributes:
        first, fastest: seconds of the first call and of the fastest later one.
        share: what is left of the bare one's rate, if both were timed in turn.
        process_bytes, device_bytes: peaks, the latter 0 if the device has no memory of its own.
    """

    first: float
    fastest: float
    share: float | None
    process_bytes: int
    device_bytes: int


def testspeed_seconds(flags: Flags, num_worlds: int) -> tuple[float, float]:
    """Seconds to compile and to run `flags.steps` control steps by MJX's own benchmark, all worlds from the first keyframe.

    Raises:
        ValueError: the engine is not MJX-Warp.
    """
    from absl import flags as absl_flags
    from mujoco.mjx.warp import forward, testspeed

    from aloha_jax.engines.mjx import MAX_CONSTRAINTS, MAX_CONTACTS, MjxEngine

    engine = make_engine(flags.engine, impl=flags.impl)
    if not isinstance(engine, MjxEngine) or engine.impl != "warp":
        raise ValueError("testspeed measures MJX-Warp: --engine mjx --impl warp")
    absl_flags.FLAGS(["testspeed", f"--naconmax={num_worlds * MAX_CONTACTS}", f"--njmax={MAX_CONSTRAINTS}"])
    step = jax.vmap(forward.step, in_axes=(None, 0))
    substeps = flags.steps * engine.scene.substeps
    compiling, running, _ = testspeed.benchmark(engine.scene.model, engine.model, step, substeps, num_worlds)
    return compiling, running


def bare_of(what: What) -> What:
    """What it stands on: the share of it that is left is told."""
    if what == "physics":
        return "testspeed"
    return "render" if what == "render" or what.startswith("pixel") else "physics"


def measure(flags: Flags, num_worlds: int, what: What) -> Measured:
    share = None
    if what == "testspeed":
        seconds = testspeed_seconds(flags, num_worlds)
    else:
        work = work_of(flags, num_worlds, what)
        seconds = seconds_of(work, flags.repeats)
        if flags.paired and (bare := bare_of(what)) not in (what, "testspeed"):
            share = paired_share(work_of(flags, num_worlds, bare), work, flags.repeats)
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return Measured(*seconds, share, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device)


def in_its_own_process(work: Callable[..., Any], *args: Any) -> Any:
    """So that its peak memory is its own (OpenGL's processes, some 60 MB each, not counted), and that it fails alone."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def device_kind() -> str:
    return jax.devices()[0].device_kind


def main(flags: Flags) -> int:
    """Print a row per measurement; returns 1 if one failed."""
    status = 0
    device = in_its_own_process(device_kind)  # here it would keep the device's memory from the others
    kind = f"engine {flags.engine} ({flags.impl}), renderer {flags.renderer} ({flags.quality}), {flags.size}×{flags.size}"
    print(f"{device}; {kind}{'' if flags.double_buffer else ', not double-buffered'}")
    print("| worlds | what | control steps/s | of | first call | peak memory |\n|---|---|---|---|---|---|")
    for num_worlds in flags.worlds:
        done: dict[What, Measured] = {}
        for what in flags.measure:
            try:
                done[what] = now = in_its_own_process(measure, flags, num_worlds, what)
            except Exception as error:
                reason = str(error).partition("\n")[0][:80] or type(error).__name__
                print(f"| {num_worlds} | {what} | failed: {reason} | | | |", flush=True)
                status = 1
                continue
            bare = bare_of(what)
            left = done[bare].fastest / now.fastest if now.share is None and bare in done else now.share
            share = f"{left:.0%} of {bare}" if left is not None and what != bare else ""
            memory = f"{(now.device_bytes or now.process_bytes) / 2**30:.1f} GiB"
            rate = num_worlds * flags.steps / now.fastest
            print(f"| {num_worlds} | {what} | {rate:,.0f} | {share} | {now.first:.1f} s | {memory} |", flush=True)
        for acting, both in (("state-policy", "state-ppo"), ("pixel-policy", "pixel-ppo")):
            if acting in done and both in done:
                seconds = done[both].fastest - done[acting].fastest
                if seconds <= 0:  # less than the noise
                    continue
                samples = num_worlds * flags.steps * Config().n_epochs / seconds
                share = f"{seconds / done[both].fastest:.0%} of {both}"
                print(f"| {num_worlds} | {both}: update | {samples:,.0f} samples/s | {share} | | |")
    return status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
