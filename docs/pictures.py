"""Draws docs/images/rollout.png: what the camera sees and what the policy sees, along the scripted expert's insertion.

uv run docs/pictures.py
"""

from pathlib import Path

import jax
import numpy as np
from PIL import Image

import aloha_jax
from aloha_jax import expert
from aloha_jax.pixels import frame_to_observation, make_renderer
from aloha_jax.presets import PRESETS
from aloha_jax.video import compose

SEED = 7
STEPS = (0, 90, 150, 234)  # start, grasp, lift, insertion


def main() -> None:
    env = aloha_jax.make("insertion", physics="exact", action="absolute", reward="sparse", autoreset=False)
    start = env.task.start_from_seed(SEED)
    actions = expert.plan_from_qpos(start)
    step = jax.jit(env.step)
    states = []
    state = env.reset_from(start[None])
    for action in actions[: STEPS[-1] + 1]:
        state = step(state, action[None])
        states.append((np.asarray(state.qpos[0]), int(state.level[0])))
    with make_renderer("egl", "insertion", 480, 640, None, quality="exact") as renderer:
        frames = renderer.render(np.stack([states[i][0] for i in STEPS]))
    cpu = PRESETS["cpu"]
    best = np.maximum.accumulate([level for _, level in states])
    pictures = []
    for frame, i in zip(frames, STEPS, strict=True):
        view = frame_to_observation(frame, cpu.image_height, cpu.image_width, cpu.crop)
        pictures.append(compose(frame, view, i + 1, states[i][1], int(best[i])))
    rows = [np.concatenate(pictures[i : i + 2], axis=1) for i in (0, 2)]
    sheet = Image.fromarray(np.concatenate(rows))
    path = Path(__file__).parent / "images" / "rollout.png"
    path.parent.mkdir(exist_ok=True)
    sheet.resize((sheet.width * 2 // 3, sheet.height * 2 // 3), Image.Resampling.LANCZOS).save(path, optimize=True)


if __name__ == "__main__":
    main()
