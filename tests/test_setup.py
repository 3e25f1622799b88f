"""What a user installs is what is locked."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
UV = os.environ.get("UV") or shutil.which("uv")  # `uv run`, and so `make test`, sets UV
REGISTRY_HOST = re.compile(r"(pypi|pythonhosted)\.(org|python\.org)", re.IGNORECASE)


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def pins(requirements: str, python: str, platform: str) -> set[str]:
    """What a requirements file installs for one Python (such as 3.12) on one `sys.platform`."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform}
    lines = (Requirement(line) for line in requirements.splitlines() if not line.startswith("#"))
    return {f"{line.name}{line.specifier}" for line in lines if line.marker is None or line.marker.evaluate(environment)}


@pytest.mark.skipif(UV is None, reason="uv is not installed")
@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_requirements_are_those_of_the_lock(python: str, platform: str) -> None:
    flags = "--locked --offline --no-dev --no-emit-project --no-hashes --no-annotate --no-header"
    locked = run(str(UV), "export", *flags.split())
    assert pins((ROOT / "requirements.txt").read_text(), python, platform) == pins(locked, python, platform)


def test_pins_heed_markers() -> None:
    requirements = "# a comment\na==1 ; python_full_version < '3.12'\na==2 ; python_full_version >= '3.12'\nb==1"
    assert pins(requirements, "3.11", "linux") == {"a==1", "b==1"}
    assert pins(requirements, "3.12", "linux") == {"a==2", "b==1"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_only_the_lock_names_a_registry() -> None:
    tracked_text_files = run("git", "grep", "--files-with-matches", "-I", "-e", "").splitlines()
    assert [name for name in tracked_text_files if REGISTRY_HOST.search((ROOT / name).read_text())] == ["uv.lock"]
