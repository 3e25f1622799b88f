"""What is probably not meant, told before a run starts, with what to do about it."""

import os
from collections.abc import Sequence

from aloha_jax.config import Config
from aloha_jax.presets import PRESETS
from aloha_jax.scene import WHOLE_FRAME
from aloha_jax.settings import WORK_AREA
from aloha_jax.visual import Crop

MIRROR_SLACK = 16  # pixels of the frame by which the arms' views may be apart: a network does not mind two of its own
OF_THE_CRITIC = ("reward", "action_cost", "action_change_cost", "grip_height_tolerance", "gamma", "gae_lambda", "clip_range_vf")
OF_PPO = ("clip_range", "ent_coef", "normalize_advantage", "advantage_bins")
OF_THE_DENSE_REWARD = ("action_cost", "action_change_cost", "grip_height_tolerance")
OF_PICTURES = ("renderer", "render_quality", "image_height", "image_width", "crop", "conv", "features_dim")


def idle_gpu(config: Config, platform: str, gpus: int) -> str | None:
    """If JAX computes on the CPU of a machine that has GPUs, and nobody asked for that."""
    if platform != "cpu" or gpus == 0 or config.device == "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    return (
        "JAX computes on the CPU although there is a GPU: its CUDA build is not installed (`uv sync --extra cuda`, or "
        "`pip install 'jax[cuda13]'`), or the driver is older than R580; --device cpu if that is meant"
    )


def physics_on_cpu(config: Config, platform: str) -> str | None:
    """If MJX, which is for accelerators, runs on the CPU."""
    if platform != "cpu" or config.engine != "mjx":
        return None
    return "JAX sees no accelerator, and MJX simulates on the CPU, far slower than --engine c; --preset cpu is for such machines"


def software_opengl(gl_renderer: str, gpus: int) -> str | None:
    """If pictures are drawn on the CPU of a machine that has GPUs."""
    software = any(name in gl_renderer.lower() for name in ("llvmpipe", "softpipe", "swrast"))
    if not software or gpus == 0:
        return None
    return (
        f"OpenGL draws in software ({gl_renderer}) although there is a GPU: "
        "set __EGL_VENDOR_LIBRARY_FILENAMES to the driver's 10_nvidia.json, or use --renderer warp"
    )


def lopsided_crop(config: Config) -> str | None:
    """If both arms share a network, but a half turn of the picture does not exchange them."""
    if config.network != "mirrored" or not config.has_pixels:
        return None
    (row, column), (wanted_row, wanted_column) = _centre(config.crop or WHOLE_FRAME), _centre(WORK_AREA)
    rows, columns = 2 * abs(row - wanted_row), 2 * abs(column - wanted_column)
    if max(rows, columns) <= MIRROR_SLACK:
        return None
    return (
        "--network mirrored turns the picture for the right arm, and this crop is not centred between the arms: its view is "
        f"shifted by {rows:.0f} rows and {columns:.0f} columns of the frame; "
        f"a crop around row {wanted_row:.0f}, column {wanted_column:.0f} has both alike"
    )


def silent_teacher(config: Config) -> str | None:
    """If there is a teacher and nothing listens to it."""
    if config.teacher is None or config.learns_from_teacher:
        return None
    return "--teacher has no say: neither --distill-coef nor --teacher-mix is positive"


def unheard_reward(config: Config) -> str | None:
    """If what PPO learns by was changed, and the policy imitates only."""
    changed = _changed(config, OF_THE_CRITIC)
    if config.ppo_coef > 0 or not changed:
        return None
    return (
        f"with --ppo-coef 0 the policy imitates its teacher, and {changed} change only what the critic learns: "
        "--preset pixels-ppo or state learns by reward"
    )


def idle_settings(config: Config) -> str | None:
    """If settings were changed that, under the others, nothing reads."""
    rules = (
        (config.start_states == "task", ("start_share",), "--start-states task"),
        (config.reward != "dense", OF_THE_DENSE_REWARD, f"--reward {config.reward}"),
        (not config.has_pixels, OF_PICTURES, "--obs state"),
        (config.ppo_coef == 0, OF_PPO, "--ppo-coef 0"),
        (bool(config.init_from) and config.log_std_final is None, ("log_std_init",), "--init-from and no --log-std-final"),
    )
    idle = [f"{changed} with {why}" for holds, names, why in rules if holds and (changed := _changed(config, names))]
    return f"without effect: {'; '.join(idle)}" if idle else None


def _changed(config: Config, names: Sequence[str]) -> str:
    """Flags of those settings that are not the preset's, in words."""
    preset = PRESETS.get(config.preset, config)
    changed = [name for name in names if getattr(config, name) != getattr(preset, name)]
    return " and ".join(f"--{name.replace('_', '-')}" for name in changed)


def _centre(crop: Crop) -> tuple[float, float]:
    top, left, height, width = crop
    return top + height / 2, left + width / 2
