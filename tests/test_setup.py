"""What a user installs is what is locked."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

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


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.timeout(1800)
def test_readme_without_uv(tmp_path: pathlib.Path) -> None:
    """What README says for pip, with the smallest training. Downloads every package that pip has not cached."""
    (line,) = re.findall(r"^Without uv: `(.*?)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    copy = tmp_path / "aloha_jax"
    for name in run("git", "ls-files").splitlines():
        if not name.startswith("pretrained/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    python = tmp_path / "python3"  # the Python that runs this test, without its packages
    python.symlink_to(pathlib.Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    subprocess.run(f"{line} --preset smoke", shell=True, cwd=copy, check=True, env=environment)
    assert (copy / "runs" / "insertion" / "final_model").is_dir()


def test_pins_heed_markers() -> None:
    requirements = "# a comment\na==1 ; python_full_version < '3.12'\na==2 ; python_full_version >= '3.12'\nb==1"
    assert pins(requirements, "3.11", "linux") == {"a==1", "b==1"}
    assert pins(requirements, "3.12", "linux") == {"a==2", "b==1"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_only_the_lock_names_a_registry() -> None:
    tracked_text_files = run("git", "grep", "--files-with-matches", "-I", "-e", "").splitlines()
    assert [name for name in tracked_text_files if REGISTRY_HOST.search((ROOT / name).read_text())] == ["uv.lock"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("driver", "cuda", "warns"),
    [
        ("580.95.05", True, False),
        ("590.1", True, False),
        ("535.161.08\n535.161.08", False, True),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", False, False),
        (None, False, False),
    ],
)
def test_cuda_is_installed_where_the_driver_can_run_it(
    driver: str | None, cuda: bool, warns: bool, tmp_path: pathlib.Path
) -> None:
    tools = {"uv": "exit 0"} | ({"nvidia-smi": f"cat <<'END'\n{driver}\nEND"} if driver else {})
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    made = subprocess.run(["make", "-n", "train"], cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
    assert ("--extra cuda" in made.stdout) is cuda
    assert ("R580" in made.stderr) is warns
