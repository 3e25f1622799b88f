"""What is probably not meant, told before a run starts, with what to do about it."""

import os

from aloha_jax.config import Config
from aloha_jax.presets import PRESETS
from aloha_jax.scene import WHOLE_FRAME
from aloha_jax.settings import WORK_AREA
from aloha_jax.visual import Crop

MIRROR_SLACK = 16  # pixels of the frame by which the arms' views may be apart: a network does not mind two of its own
OF_PPO = ("reward", "action_cost", "action_change_cost", "gamma", "gae_lambda", "clip_range", "ent_coef")


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
    preset = PRESETS.get(config.preset)
    changed = [name for name in OF_PPO if preset is not None and getattr(config, name) != getattr(preset, name)]
    if config.ppo_coef > 0 or not changed:
        return None
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in changed)
    return (
        f"with --ppo-coef 0 the policy imitates its teacher, and {flags} change only what the critic learns: "
        "--preset pixels-ppo or state learns by reward"
    )


def _centre(crop: Crop) -> tuple[float, float]:
    top, left, height, width = crop
    return top + height / 2, left + width / 2
