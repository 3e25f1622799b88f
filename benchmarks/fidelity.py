"""Is every engine the same task, and every renderer the same picture? Measured against gym_aloha itself.

Engines replay the scripted expert's actions from gym_aloha's own starts; renderers draw frames along an insertion. Prints the
tables of docs/fidelity.md and writes pictures side by side.

    uv run -m benchmarks.fidelity
    uv run -m benchmarks.fidelity --engines mjx-warp --mjx-seeds 64     # on a GPU
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("MUJOCO_GL", "egl")  # before dm_control looks for a display

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from dm_control import mujoco as dm_mujoco
from dm_control.rl import control
from gym_aloha.constants import DT
from gym_aloha.tasks import sim
from gym_aloha.utils import sample_insertion_pose
from PIL import Image
from skimage.metrics import structural_similarity

import aloha_jax
from aloha_jax import expert, scene
from aloha_jax.env import EnvState
from aloha_jax.judge import Trajectory
from aloha_jax.pixels import frame_to_observation, make_renderer

Engine = Literal["c-exact", "c-fast", "mjx-warp", "mjx-warp-exact", "mjx-jax"]
ENGINES: dict[str, dict[str, str]] = {  # arguments of `aloha_jax.make`
    "c-exact": {"engine": "c", "physics": "exact"},
    "c-fast": {"engine": "c"},
    "mjx-warp": {"engine": "mjx", "impl": "warp"},
    "mjx-warp-exact": {"engine": "mjx", "impl": "warp", "physics": "exact"},
    "mjx-jax": {"engine": "mjx", "impl": "jax"},
}
SIZES = ((64, 64), (84, 84), (120, 160))
RENDERERS = (("egl", "fast"), ("egl", "shadows"), ("warp", "fast"), ("warp", "shadows"))
EPISODE = 245  # control steps; the expert inserts before 240
CHUNK = 35  # steps per call, so that compilation is paid once and progress shows


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to measure."""

    engines: tuple[Engine, ...] = ("c-exact", "c-fast", "mjx-warp", "mjx-warp-exact", "mjx-jax")
    """Engines to compare with gym_aloha's own simulation."""
    c_seeds: int = 40
    """Starts for the C engine."""
    mjx_seeds: int = 8
    """Starts for MJX."""
    frames: int = 8
    """Frames along an insertion for the renderers; 0 measures none."""
    pictures: Path = Path("docs/images/fidelity.png")
    """Where the side-by-side pictures go."""


class BlindInsertion(sim.InsertionTask):
    """gym_aloha's task without its observation: rendering three cameras takes a hundred times as long as the physics."""

    def get_observation(self, physics: Any) -> dict[str, Any]:
        return {}


def judge(seeds: range, plans: np.ndarray) -> list[Trajectory]:
    """The episodes in gym_aloha's own simulation, which ends them at level 4; `plans` is float32[T, N, 14]."""
    physics = dm_mujoco.Physics.from_xml_path(str(scene.ASSETS / scene.TASK_SCENES["insertion"].xml))
    simulation = control.Environment(physics, BlindInsertion(), time_limit=float("inf"), control_timestep=DT)
    trajectories = []
    for i, seed in enumerate(seeds):
        sim.BOX_POSE[0] = np.concatenate(sample_insertion_pose(seed))
        simulation.reset()
        levels, qpos = [], []
        for action in plans[:, i]:
            levels.append(simulation.step(action).reward)
            qpos.append(physics.data.qpos.copy())
            if levels[-1] == 4:
                break
        trajectories.append(Trajectory(seed, np.array(levels), np.array(qpos), plans[: len(levels), i]))
    return trajectories


def replay(arguments: dict[str, str], seeds: range, plans: np.ndarray) -> list[Trajectory]:
    """The same episodes in one of our engines, as one batch, cut at level 4 too."""
    make: Any = aloha_jax.make
    env = make("insertion", len(seeds), obs="state", reward="sparse", autoreset=False, **arguments)
    starts = jnp.asarray(np.stack([env.task.start_from_seed(seed) for seed in seeds]), jnp.float32)

    def step(state: EnvState, action: jax.Array) -> tuple[EnvState, tuple[jax.Array, jax.Array]]:
        state = env.step(state, action)
        return state, (state.level, state.qpos)

    run = jax.jit(lambda state, actions: jax.lax.scan(step, state, actions))
    state, chunks = jax.jit(env.reset_from)(starts), []
    for first in range(0, len(plans), CHUNK):
        state, chunk = run(state, jnp.asarray(plans[first : first + CHUNK]))
        chunks.append(jax.device_get(chunk))
    if complaint := env.engine.complaint(state.physics):
        print(complaint)
    levels, qpos = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    done = levels == 4
    ends = np.where(done.any(axis=0), done.argmax(axis=0) + 1, len(levels))
    return [
        Trajectory(seed, levels[:end, i], qpos[:end, i], plans[:end, i])
        for i, (seed, end) in enumerate(zip(seeds, ends, strict=True))
    ]


class Agreement(NamedTuple):
    """How alike two sets of episodes are.

    Attributes:
        success: episodes that reached level 4.
        same_level: share of steps with the same level, until the first of the two has ended.
        later: control steps by which an episode ends later, least and most.
        final: float[N], metres between where an object is at the end of either, whichever object is farther off.
        farthest: float[N], the same at any step until the first of the two has ended, or at the end.
    """

    success: int
    same_level: float
    later: tuple[int, int]
    final: np.ndarray
    farthest: np.ndarray


def object_distances(a: Trajectory, b: Trajectory) -> np.ndarray:
    """[steps] metres between where peg or socket is, whichever is farther off, until the first of the two has ended.

    The last one compares the ends, wherever they are.
    """
    steps = min(len(a.qpos), len(b.qpos))
    apart = np.concatenate([a.qpos[: steps - 1] - b.qpos[: steps - 1], a.qpos[-1:] - b.qpos[-1:]])
    return np.max([np.linalg.norm(apart[:, where][:, :3], axis=1) for where in (scene.PEG_QPOS, scene.SOCKET_QPOS)], axis=0)


def compare(ours: list[Trajectory], theirs: list[Trajectory]) -> Agreement:
    pairs = list(zip(ours, theirs, strict=True))
    same = np.concatenate([a.levels[: len(b.levels)] == b.levels[: len(a.levels)] for a, b in pairs])
    apart = [object_distances(a, b) for a, b in pairs]
    final, farthest = np.array([x[-1] for x in apart]), np.array([x.max() for x in apart])
    later = [len(a.levels) - len(b.levels) for a, b in pairs]
    return Agreement(sum(a.levels[-1] == 4 for a in ours), float(same.mean()), (min(later), max(later)), final, farthest)


def compare_engines(flags: Flags) -> None:
    num_seeds = max(flags.c_seeds, flags.mjx_seeds)
    seeds = range(num_seeds)
    plans = np.stack([expert.plan(*sample_insertion_pose(seed)) for seed in seeds], axis=1)[:EPISODE]
    judged = judge(seeds, plans)
    print("| engine | success | same level, % of steps | later by, steps | objects apart at the end, mm: mean | max | seconds |")
    print("|---|---|---|---|---|---|---|")
    print(f"| gym_aloha | {sum(r.levels[-1] == 4 for r in judged)} of {num_seeds} | | | | | |", flush=True)
    for name in flags.engines:
        count = flags.c_seeds if name.startswith("c-") else flags.mjx_seeds
        start = time.perf_counter()
        result = compare(replay(ENGINES[name], range(count), plans[:, :count]), judged[:count])
        seconds = time.perf_counter() - start
        mean, largest = 1e3 * result.final.mean(), 1e3 * result.final.max()
        least, most = result.later
        print(
            f"| {name} | {result.success} of {count} | {100 * result.same_level:.1f} | {least} to {most} | "
            f"{mean:.3f} | {largest:.3f} | {seconds:.0f} |",
            flush=True,
        )


def expert_poses(count: int) -> np.ndarray:
    """float64[count, 30]: joint positions spread over a scripted insertion, grasp and insertion included."""
    plan = expert.plan(*sample_insertion_pose(0))[:240, None]
    episode = judge(range(1), plan)[0].qpos
    return episode[np.linspace(0, len(episode) - 1, count).astype(int)]


def compare_renderers(flags: Flags) -> None:
    poses = expert_poses(flags.frames)
    with make_renderer("egl", "insertion", *scene.FRAME_SHAPE, quality="exact") as renderer:
        frames = renderer.render(poses)  # gym_aloha's own, to the bit (tests/test_pixels.py)
    print("| picture | renderer | quality | SSIM min | SSIM mean | mean absolute error (of 255) |\n|---|---|---|---|---|---|")
    rows = []
    for height, width in SIZES:
        expected = np.array([frame_to_observation(frame, height, width) for frame in frames])
        row = [expected]
        for name, quality in RENDERERS:
            with make_renderer(name, "insertion", height, width, quality=quality) as renderer:
                drawn = renderer.render(poses)
            row.append(drawn)
            likeness = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(drawn, expected, strict=True)]
            error = np.abs(drawn.astype(float) - expected).mean()
            columns = (f"{height}×{width}", name, quality, f"{min(likeness):.3f}", f"{np.mean(likeness):.3f}", f"{error:.2f}")
            print("|", " | ".join(columns), "|", flush=True)
        rows.append(row)
    write_pictures(rows[SIZES.index((120, 160))], flags.pictures)


def write_pictures(row: list[np.ndarray], path: Path) -> None:
    """gym_aloha's frames and each renderer's, left to right; top to bottom the start, the grasp, and the insertion."""
    moments = [0, len(row[0]) // 2, -1]
    sheet = np.concatenate([np.concatenate([pictures[i] for pictures in row], axis=1) for i in moments])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(path)


def main(flags: Flags) -> None:
    if flags.engines:
        compare_engines(flags)
    if flags.frames:
        compare_renderers(flags)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
