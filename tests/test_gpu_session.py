"""benchmarks/gpu_session.sh: a machine with a GPU is a rare guest, and no time to find a mistyped flag."""

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

import eval
from aloha_jax import cli

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_session.sh"


def session(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *args], text=True, capture_output=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[int, list[str]]]:
    """Name -> seconds and command, of every part."""
    rows = [shlex.split(line) for line in session("list").stdout.splitlines()]
    assert len({name for name, *_ in rows}) == len(rows) > 20
    return {name: (int(seconds), command) for name, seconds, *command in rows}


def test_every_command_is_one_that_its_program_takes(parts: dict[str, tuple[int, list[str]]]) -> None:
    understood = set()
    for name, (_, command) in parts.items():
        program = next(i for i, word in enumerate(command) if word in ("train.py", "eval.py", "-m"))
        args = command[program + 1 :]
        if command[program] == "train.py":
            cli.parse_config(args)
        elif command[program] == "eval.py":
            cli.parse(eval.Flags, args, description="")
        elif args[0] != "pytest":
            tyro.cli(importlib.import_module(args[0]).Flags, args=args[1:])
        understood.add(name)
    assert understood == set(parts)


def test_what_a_part_reads_is_there_by_then(parts: dict[str, tuple[int, list[str]]]) -> None:
    """A model that a part reads is one that an earlier part writes, or that the repository holds."""
    written: set[str] = set()
    for _, command in parts.values():
        for flag in ("--init-from", "--model-path", "--teacher"):
            if flag in command:
                path = command[command.index(flag) + 1]
                there = str(Path(path).parent) in written or (SCRIPT.parents[1] / path).is_dir()
                assert there or path == "None", path
        if "--log-dir" in command:
            written.add(command[command.index("--log-dir") + 1])


def test_a_part_that_does_not_exist_is_named(tmp_path: Path) -> None:
    refused = session(str(tmp_path / "out"), "train_state", "nonsense")
    assert refused.returncode == 2
    assert "there is no part nonsense" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_in_the_folders_place_is_refused() -> None:
    refused = session("train_state")
    assert refused.returncode == 2
    assert "train_state is a part: name a folder first" in refused.stderr


def test_a_part_that_fails_leaves_nothing_of_an_earlier_session(tmp_path: Path) -> None:
    """Nothing that a later part would judge as its own."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    (out / "polish" / "final_model").mkdir(parents=True)
    (out / "polish.json").touch()
    (out / "state").mkdir()
    ended = subprocess.run(
        ["bash", str(SCRIPT), str(out), "train_polish", "judge_polish"],
        text=True,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHON": str(python)},
    )
    assert ended.returncode == 1
    assert ended.stdout.count("exit 3, last lines:") == 2
    assert not (out / "polish").exists()
    assert not (out / "polish.json").exists()
    assert (out / "state").is_dir()
