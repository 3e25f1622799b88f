"""Train a policy: `uv run train.py --help`."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as any program, without the traceback of some import

from aloha_jax import startup

startup.require_opengl()
startup.remember_compilations()

from aloha_jax import cli, launch, run_directory  # noqa: E402 - these import MuJoCo


def main(args: list[str]) -> None:
    """Parse, train, judge, report."""
    config, given = cli.parse_config(args)
    resume = config.resume is not None
    if config.resume is not None:
        config = run_directory.resumed_config(Path(config.resume), config, given)
    cli.choose_device(config.device)
    launch.execute(config, resume=resume)


if __name__ == "__main__":
    with cli.user_errors(trains=True):
        main(sys.argv[1:])
