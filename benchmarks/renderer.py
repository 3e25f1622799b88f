"""Frames per second of the EGL pool, and likeness (SSIM) to gym_aloha's own frames, for every quality and a few sizes.

uv run benchmarks/renderer.py
"""

import dataclasses
import time

import jax
import numpy as np
import tyro
from skimage.metrics import structural_similarity

import aloha_jax
from aloha_jax import expert
from aloha_jax.pixels import frame_to_observation, make_renderer
from aloha_jax.settings import WORK_AREA
from aloha_jax.visual import QUALITIES


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to measure."""

    worlds: int = 64
    """Worlds per batch."""
    batches: int = 6
    """Batches per measurement; the fastest counts."""
    workers: int | None = None
    """Drawing processes; by default one per core."""


def expert_poses(count: int) -> np.ndarray:
    """float32[count, 30]: joint positions spread over a scripted insertion, grasp and insertion included."""
    env = aloha_jax.make("insertion", physics="exact", autoreset=False)
    start = env.task.start_from_seed(0)
    step = jax.jit(env.step)
    state, poses = env.reset_from(start[None]), []
    for action in expert.plan_from_qpos(start)[:240]:
        state = step(state, action[None])
        poses.append(np.asarray(state.qpos[0]))
    return np.stack([poses[i] for i in np.linspace(0, 239, count).astype(int)])


def main(flags: Flags) -> None:
    poses = expert_poses(flags.worlds)
    judged = poses[:: max(1, flags.worlds // 8)]
    with make_renderer("egl", "insertion", 480, 640, quality="exact") as renderer:
        frames = renderer.render(judged)  # gym_aloha's own, to the bit (tests/test_pixels.py)
    print("| size, crop | quality | frames/s | SSIM min | SSIM mean |\n|---|---|---|---|---|")
    for height, width, crop in ((64, 64, None), (84, 84, None), (120, 160, None), (48, 80, WORK_AREA), (72, 120, WORK_AREA)):
        expected = [frame_to_observation(frame, height, width, crop) for frame in frames]
        for quality in QUALITIES:
            with make_renderer("egl", "insertion", height, width, crop, flags.workers, quality) as renderer:
                drawn = renderer.render(judged)
                seconds = []
                for _ in range(flags.batches if quality != "exact" else 1):
                    start = time.perf_counter()
                    renderer.render(poses)
                    seconds.append(time.perf_counter() - start)
            likeness = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(drawn, expected, strict=True)]
            area = "whole frame" if crop is None else "table"
            rate = flags.worlds / min(seconds)
            columns = (f"{height}×{width} {area}", quality, f"{rate:.0f}", f"{min(likeness):.3f}", f"{np.mean(likeness):.3f}")
            print("|", " | ".join(columns), "|", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
