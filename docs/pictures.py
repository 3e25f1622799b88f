"""Draws a policy's insertion in gym_aloha, as the camera and (inset) the policy see it.

uv run docs/pictures.py --model-path pretrained/insertion-pixels-ppo --seed 8
uv run docs/pictures.py --model-path pretrained/insertion-state-robust --seed 4000003 \
  --condition "start: yaw up to 30 degrees" --out docs/images/turned.png
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from aloha_jax import checkpoints, cli, judge
from aloha_jax.config import ConfigError
from aloha_jax.pixels import frame_to_observation
from aloha_jax.tasks.insertion import MAX_LEVEL
from aloha_jax.video import compose
from benchmarks.robustness import CONDITIONS, VISUAL_CONDITIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Whose insertion, and from where."""

    model_path: str = "pretrained/insertion-pixels"
    """The policy."""
    seed: int = 8
    """Of the episode, which must succeed."""
    condition: str = "as it is"
    """One of those of `benchmarks/robustness.py`."""
    out: Path = Path(__file__).parent / "images" / "rollout.png"
    """The picture."""


def main(flags: Flags) -> None:
    cli.require_episodes(1, flags.seed)
    cli.require_writable("--out", flags.out)
    policy = checkpoints.load_policy(flags.model_path)
    known = CONDITIONS | VISUAL_CONDITIONS
    if flags.condition not in known:
        raise ConfigError(f"--condition is one of {'; '.join(known)}; not {flags.condition!r}")
    condition = known[flags.condition]
    trajectory = next(judge.gym_aloha_episodes(policy, [flags.seed], keep_frames=1, conditions=[condition]))
    levels, config = trajectory.levels, policy.config
    if levels.max() < MAX_LEVEL or trajectory.frames is None:
        raise ConfigError(f"--seed {flags.seed} reached level {levels.max()} only: choose another")
    best = np.maximum.accumulate(levels)
    lifted, end = int(np.argmax(levels >= 2)), len(levels) - 1
    pictures = []
    for step in (0, lifted, (lifted + end) // 2, end):  # start, grasp, carry, insertion
        frame = trajectory.frames[step]
        view = frame_to_observation(frame, config.image_height, config.image_width, config.crop) if config.has_pixels else None
        pictures.append(compose(frame, view, step + 1, int(levels[step]), int(best[step])))
    sheet = Image.fromarray(np.concatenate([np.concatenate(pictures[i : i + 2], axis=1) for i in (0, 2)]))
    sheet.resize((sheet.width * 2 // 3, sheet.height * 2 // 3), Image.Resampling.LANCZOS).save(flags.out, optimize=True)


if __name__ == "__main__":
    with cli.user_errors():
        main(tyro.cli(Flags))
