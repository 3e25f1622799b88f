"""Train a policy: `uv run train.py --help`."""

import sys
from pathlib import Path

from aloha_jax import startup

if __name__ == "__main__":
    startup.end_at_once_when_interrupted()
startup.require_opengl()
startup.remember_compilations()

from aloha_jax import cli, run, run_directory  # noqa: E402 - these import MuJoCo


def main(args: list[str]) -> None:
    """Parse, train, judge, report."""
    config, given = cli.parse_config(args)
    resume = config.resume is not None
    if config.resume is not None:
        config = run_directory.resumed_config(Path(config.resume), config, given)
    cli.choose_device(config.device)
    run.execute(config, resume=resume)


if __name__ == "__main__":
    with cli.user_errors(trains=True):
        main(sys.argv[1:])
