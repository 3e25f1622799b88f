"""What documents tell people to type is understood, and gives what they say; what they refer to is there."""

import dataclasses
import pathlib
import re
import shlex
import subprocess
from typing import Any

import pytest

from aloha_jax import cli
from aloha_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
PRETRAINED = ROOT / "pretrained"
FOLDERS = (".", "docs", "pretrained", "benchmarks")
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
MODELS = sorted(path.name for path in PRETRAINED.iterdir() if path.is_dir())

# What a published configuration does not keep as it was in training, or what does not reach the parameters.
INCIDENTAL = (
    *("preset", "log_dir", "teacher", "init_from", "checkpoint_freq", "device", "final_eval_episodes", "final_video"),
    *("keep_period", "renderer"),  # the latter is what `auto` found
)
# A command says nothing of it: it comes from the teacher.
OF_THE_TEACHER = ("grip_tolerance",)


def blocks(document: str, language: str = "") -> list[str]:
    """The fenced code of a document in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


def trainings(script: str) -> list[list[str]]:
    """The flags of each `uv run train.py` in a shell script, as a shell hands them over; nothing is run."""
    silent = " ".join(f"{name}() {{ :; }};" for name in ("git", "tar", "mkdir", "make"))
    said = f'uv() {{ printf "%s\\n" "$*"; }}; {silent}\n{script}'
    output = subprocess.run(["bash", "-euc", said], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    lines = [shlex.split(line) for line in output.splitlines()]
    return [line[line.index("train.py") + 1 :] for line in lines if line[0] == "run" and "train.py" in line]


def section(document: str, title: str) -> str:
    return document.split(f"\n## {title}\n")[1].split("\n## ")[0]


def anchors(document: str) -> set[str]:
    """What a link into a document can name: its headings, as GitHub spells them, and anchors of its own."""
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    spelled = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return spelled | set(re.findall(r'<a id="([^"]+)">', document))


def readme_trainings() -> list[list[str]]:
    scripts = blocks((ROOT / "README.md").read_text(), "sh")
    return [flags for script in scripts if "train.py" in script for flags in trainings(script) if flags != ["--help"]]


def test_there_is_something_to_test() -> None:
    said = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("uv run") and " train.py " in line]
    assert len(readme_trainings()) == len(said) - 1 >= 12  # `--help` trains nothing
    assert MODELS


@pytest.mark.parametrize("flags", readme_trainings(), ids=" ".join)
def test_the_commands_of_the_readme_are_understood(flags: list[str]) -> None:
    config, _ = cli.parse_config(flags)
    if config.resume is not None:  # what is resumed there was trained above, by `make train` if not by name
        others = [c for c, _ in map(cli.parse_config, readme_trainings()) if c.resume is None] + [Config()]
        [first] = [c for c in others if c.log_dir == config.resume]
        assert "--total-timesteps" not in flags or config.total_timesteps > first.total_timesteps


@pytest.mark.parametrize("model", MODELS)
def test_a_published_policy_has_the_settings_of_the_commands_that_made_it(model: str) -> None:
    [script] = blocks(section((PRETRAINED / "README.md").read_text(), model))
    *_, last = trainings(script)
    told, _ = cli.parse_config(last)
    published = Config.load(PRETRAINED / model / "config.json")
    left_out = INCIDENTAL + (OF_THE_TEACHER if published.teacher else ())
    if published.start_states == "task":
        left_out += ("start_share",)  # of no other states
    names = [field.name for field in dataclasses.fields(Config) if field.name not in left_out]
    assert {name: getattr(told, name) for name in names} == {name: getattr(published, name) for name in names}


def test_the_python_of_the_readme_inserts_a_peg(monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = blocks((ROOT / "README.md").read_text(), "python")
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["state"].level.max() == 4
    assert scope["state"].terminated.any()


def test_the_python_about_the_environment_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds, judged = blocks((ROOT / "docs" / "environment.md").read_text(), "python")
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {}
    exec(worlds, scope)
    state = scope["state"]
    assert state.obs["pixels"].shape == (4, 72, 120, 3)
    assert not state.done.any()
    exec(judged, scope)
    assert scope["reward"] == 4


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_refers_to_what_is_there(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other.read_text()), target
