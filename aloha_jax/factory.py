"""Environments by the names of their parts, or as a run's configuration describes them."""

import math
import numbers
import typing
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aloha_jax.config import (
    MAX_CAMERA_SHIFT,
    MAX_DYNAMICS_FACTOR,
    MAX_LAG,
    MAX_POSE_NOISE,
    MAX_START_SHIFT,
    Config,
    require_single_precision,
)
from aloha_jax.engines import Engine, make_engine
from aloha_jax.engines.c import CEngine
from aloha_jax.env import EPISODE_LENGTH, Env
from aloha_jax.pixels import Renderer, make_renderer
from aloha_jax.scene import FRAME_SHAPE
from aloha_jax.tasks.insertion import StartRange
from aloha_jax.tasks.potentials import Shaping

MAX_COUNT = 2**31 - 1  # JAX counts in 32 bits
MAX_SEED = 2**32 - 1
PARTS = frozenset({"engine", "renderer"})  # which may be given instead of named


def make(
    task: str = "insertion",
    num_envs: int = 1,
    *,
    engine: str | Engine = "c",
    impl: str = "auto",
    physics: str = "fast",
    obs: str = "state",
    action: str = "absolute",
    reward: str = "sparse",
    image_height: int = 64,
    image_width: int = 64,
    crop: tuple[int, int, int, int] | None = None,
    renderer: str | Renderer = "auto",
    render_quality: str = "fast",
    autoreset: bool = True,
    episode_length: int = EPISODE_LENGTH,
    start_states: str = "task",
    start_share: float = 0.5,
    seed: int = 0,
    observe_target: bool = False,
    history: tuple[int, ...] = (),
    shaping: Shaping | None = None,
    start_range: StartRange | None = None,
    camera_shift: float = 0.0,
    delay_share: float = 0.0,
    pose_noise: float = 0.0,
    friction_factor: float = 1.0,
    mass_factor: float = 1.0,
) -> Env:
    """Build a batched environment.

    Args:
        task: `insertion`.
        num_envs: number of worlds, N.
        engine: `c` (C MuJoCo on a thread pool), `mjx` (on JAX's device), or `auto`: `c`, on every machine. Or one that
            is there already, with its own physics.
        impl: implementation of the `mjx` engine, `auto`, `warp` or `jax`; unused by `c`.
        physics: `exact` (gym_aloha's 10 x 0.002 s) or `fast` (4 x 0.005 s, capped solver; mjx's `jax` has its own).
        obs: `pixels`, `pixels_agent_pos` or `state`.
        action: `absolute` (gym_aloha's meaning) or `delta` (`delta_target`).
        reward: `sparse` (gym_aloha's level), `shaped` (the guide's) or `dense`.
        image_height: height of the pixels, 1..480.
        image_width: width of the pixels, 1..640.
        crop: (top, left, height, width) in gym_aloha's 480x640 frame, resized to the image; the whole frame if None.
        renderer: `egl` (OpenGL), `warp` (ray tracing on JAX's device), or `auto`: where the worlds are, else what works here.
            Or one that is there already, to be shared.
        render_quality: `fast` (for training), `shadows`, or `exact` (gym_aloha's shadows and antialiasing).
        autoreset: whether an ended episode is followed by a new one in the same step.
        episode_length: control steps after which an episode is truncated.
        start_states: where episodes after the first start: as the `task` does, or a `start_share` of them in states of the
            scripted `expert` or in states that were reached before (`archive`).
        start_share: see `start_states`.
        seed: of the expert's episodes.
        observe_target: whether pixels come with the control targets as well.
        history: control steps that are looked back: pixels come with what was known so many steps ago as well, which is the joint
            positions (`pixels_agent_pos`) or the control targets (`pixels`).
        shaping: what the dense reward asks beyond an insertion.
        start_range: by how much the task's starts exceed gym_aloha's.
        camera_shift: metres, along x and y, by which the camera may be off its place, each episode anew.
        delay_share: share of the episodes in which actions take effect one control step late.
        pose_noise: with `state`, metres that objects seem off their place, the standard deviation along each axis, each episode
            anew; they seem turned, too, by a degree per millimetre.
        friction_factor: with the engine `c`, worlds differ in friction, by factors in 1/f..f.
        mass_factor: with the engine `c`, worlds differ in mass and inertia of peg and socket, by factors in 1/f..f.

    Raises:
        ValueError: an argument is not one of its choices, or lies outside its range.
        ConfigError: `impl` and `physics` do not go together, `mjx` is asked for worlds that differ, or JAX computes with 64 bits.
        RendererUnavailable: this machine has no such renderer.
    """
    require_single_precision()
    start_range = StartRange() if start_range is None else start_range
    shaping = Shaping() if shaping is None else shaping
    _require_kinds(start_range=(start_range, StartRange), shaping=(shaping, Shaping), history=(history, Sequence))
    _require_choices(task=task, engine=engine, impl=impl, physics=physics, obs=obs, action=action, reward=reward)
    _require_choices(renderer=renderer, render_quality=render_quality, start_states=start_states)
    _require_whole(num_envs, 1, MAX_COUNT, "num_envs")
    _require_whole(episode_length, 1, MAX_COUNT, "episode_length")
    _require_whole(image_height, 1, FRAME_SHAPE[0], "image_height")
    _require_whole(image_width, 1, FRAME_SHAPE[1], "image_width")
    _require_whole(seed, 0, MAX_SEED, "seed")
    for lag in history:
        _require_whole(lag, 1, MAX_LAG, "history")
    if crop is not None and np.shape(crop) != (4,):
        raise ValueError(f"crop is (top, left, height, width), not {crop}")
    limits = (
        ("start_share", start_share, 0, 1),
        ("delay_share", delay_share, 0, 1),
        ("pose_noise", pose_noise, 0, MAX_POSE_NOISE),  # metres
        ("friction_factor", friction_factor, 1, MAX_DYNAMICS_FACTOR),
        ("mass_factor", mass_factor, 1, MAX_DYNAMICS_FACTOR),
        ("camera_shift", camera_shift, 0, MAX_CAMERA_SHIFT),  # metres
        ("start_range.yaw", start_range.yaw, 0, math.pi),
        ("start_range.shift", start_range.shift, 0, MAX_START_SHIFT),  # metres
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise ValueError(f"{name} lies in {low}..{high}, not {value}")
    _require_shaping(shaping)
    _require_seen(obs, "pixels", history=history, observe_target=observe_target, camera_shift=camera_shift)
    _require_seen(obs, "state", pose_noise=pose_noise)
    if not isinstance(engine, str) and (friction_factor, mass_factor) != (1.0, 1.0):
        raise ValueError("friction_factor and mass_factor are for an engine that is made here, not for one that is given")
    if isinstance(engine, str):
        factors = {"friction_factor": friction_factor, "mass_factor": mass_factor}
        engine = make_engine("c" if engine == "auto" else engine, task, physics, impl, **factors)
    if obs != "state" and isinstance(renderer, str):
        on_gpu = not isinstance(engine, CEngine) and jax.default_backend() == "gpu"
        renderer = make_renderer(renderer, task, image_height, image_width, crop, quality=render_quality, on_gpu=on_gpu)
    return Env(
        engine,
        task,
        num_envs,
        None if isinstance(renderer, str) or obs == "state" else renderer,
        obs=obs,
        action=action,
        reward=reward,
        autoreset=autoreset,
        episode_length=episode_length,
        start_states=start_states,
        start_share=start_share,
        seed=seed,
        observe_target=observe_target,
        history=history,
        shaping=shaping,
        start_range=start_range,
        camera_shift=camera_shift,
        delay_share=delay_share,
        pose_noise=pose_noise,
    )


def _require_choices(**chosen: Any) -> None:
    """Names are among those that the settings of the same name allow; what is no name is a part, and there already."""
    hints = typing.get_type_hints(Config)
    for name, choice in chosen.items():
        is_part = name in PARTS and choice is not None and not isinstance(choice, str)
        if not is_part and choice not in (allowed := typing.get_args(hints[name])):
            raise ValueError(f"{name} is one of {', '.join(allowed)}; not {choice!r}")


def _require_kinds(**values: tuple[Any, type]) -> None:
    for name, (value, kind) in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {kind.__name__}, not {value!r}")


def _require_shaping(shaping: Shaping) -> None:
    for name, value in shaping._asdict().items():
        tolerance = name.endswith("tolerance")  # in metres, and divided by
        if value is not None and not (0 <= value < math.inf and (value or not tolerance)):
            raise ValueError(f"shaping.{name} is finite and {'above 0' if tolerance else 'at least 0'}, not {value}")


def _require_whole(value: Any, low: int, high: int, name: str) -> None:
    if not isinstance(value, numbers.Integral):  # NumPy's are
        raise ValueError(f"{name} is a whole number, not {value!r}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} lies in {low}..{high}, not {value}")


def _require_seen(obs: str, needed: str, **asked: Any) -> None:
    """What is asked of pixels, or of the state, needs these to be seen."""
    for name, value in asked.items():
        if value and (needed == "state") != (obs == "state"):
            raise ValueError(f"{name} needs {needed} to be seen, not obs={obs!r}")


def make_from_config(
    config: Config,
    num_envs: int | None = None,
    *,
    autoreset: bool = True,
    engine: Engine | None = None,
    renderer: Renderer | None = None,
) -> Env:
    """The environment that a run's configuration describes, by another `engine` or `renderer` if they are given."""
    return make(
        config.task,
        num_envs or config.n_envs,
        engine=engine or config.engine,
        impl=config.impl,
        physics=config.physics,
        obs=config.obs,
        action=config.action,
        reward=config.reward,
        image_height=config.image_height,
        image_width=config.image_width,
        crop=config.crop,
        renderer=renderer or config.renderer,
        render_quality=config.render_quality,
        autoreset=autoreset,
        episode_length=config.episode_length,
        start_states=config.start_states if autoreset else "task",
        start_share=config.start_share,
        seed=config.seed,
        observe_target=config.observe_target,
        history=config.history,
        shaping=Shaping.of(config),
        start_range=StartRange.of(config) if autoreset else None,
        camera_shift=config.camera_shift if autoreset else 0.0,
        delay_share=config.delay_share if autoreset else 0.0,
        pose_noise=config.pose_noise if autoreset else 0.0,
        friction_factor=config.friction_factor if autoreset else 1.0,
        mass_factor=config.mass_factor if autoreset else 1.0,
    )
