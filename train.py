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
    cli.choose_device(config.device)
    if config.resume is not None:
        directory = Path(config.resume)
        run.execute(run_directory.resumed_config(directory, config, given), resume=True)
    else:
        run.execute(config)


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
