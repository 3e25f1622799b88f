"""Judge a policy: `uv run eval.py --help`."""

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as any program, without the traceback of some import

from aloha_jax import startup

startup.require_opengl()
startup.remember_compilations()

from aloha_jax import checkpoints, cli, evaluation  # noqa: E402 - these import MuJoCo
from aloha_jax.config import ConfigError  # noqa: E402
from aloha_jax.metrics import judging, make_console, print_report  # noqa: E402


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to judge, and where."""

    model_path: str
    """A run (its best_model, else its final_model, else its newest checkpoint), one of these, or one checkpoints/<step>."""
    n_episodes: int = 10
    """Number of episodes."""
    sim: Literal["gym_aloha", "c", "mjx"] = "gym_aloha"
    """The original gym_aloha environment, or one of our own engines under the policy's own physics and pictures."""
    seed: int = 0
    """Episode i starts from seed + i, as env.reset(seed=...) in gym_aloha."""
    save_video: bool = False
    """Film the first episode."""
    video_path: str | None = None
    """Where to; by default eval/videos in the run, or videos in the folder of a model without one."""
    stochastic: bool = False
    """Sample actions instead of taking their mean."""
    json: str | None = None
    """Write the report to this file."""
    num_workers: int = 1
    """Processes that run gym_aloha side by side."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the policy runs."""


def main(args: list[str]) -> None:
    """Parse, judge, report."""
    flags = cli.parse(Flags, args, description="Judge a policy in gym_aloha or in our own engines.")
    cli.choose_device(flags.device)
    cli.require_episodes(flags.n_episodes, flags.seed, flags.num_workers)
    if flags.num_workers > 1 and flags.sim != "gym_aloha":
        raise ConfigError(f"--num-workers is for gym_aloha: --sim {flags.sim} runs its episodes as one batch")
    for flag, file in (("--json", flags.json), ("--video-path", flags.video_path)):
        if file is not None:
            cli.require_writable(flag, Path(file), in_place=flag == "--json")
    policy = checkpoints.load_policy(flags.model_path)
    video = video_path(flags) if flags.save_video or flags.video_path else None
    if video is not None:
        video.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"stochastic": flags.stochastic, "video": video, "num_workers": flags.num_workers}
    reports: list[evaluation.Report] = []
    filmed: dict[str, Path] = {}
    options |= {"on_report": reports.append}
    try:
        with judging(make_console(stderr=True), flags.n_episodes) as show:
            evaluation.evaluate(policy, flags.sim, flags.n_episodes, flags.seed, on_episode=show, **options)
        filmed |= {"video": video} if video else {}
    finally:  # a film that fails does not take the judging with it
        for report in reports:
            if flags.json is not None:
                report.write(Path(flags.json))
            print_report(report, filmed)


def video_path(flags: Flags) -> Path:
    """`--video-path`, or a name that tells the model, the simulator and the seed."""
    if flags.video_path is not None:
        return Path(flags.video_path)
    model = Path(flags.model_path).absolute()
    run = checkpoints.run_of(model)
    folder = run / "eval" / "videos" if run else model / "videos"
    return folder / f"{model.name}-{flags.sim}-seed{flags.seed}.mp4"


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
