"""The soak test: a training that fails, or whose speed nobody saw, was not flat."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(path: Path, speed: float) -> None:
    with path.open("w", newline="") as file:
        rows = [[10 * i, 500, 3, 40, 100 * i, speed] for i in range(16)]
        csv.writer(file).writerows([soak.COLUMNS, *rows])


def test_a_record_is_judged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(here / "soak.csv", 400)
    assert soak.main(soak.Flags(), []) == 0
    assert "speed: flat  400 -> 400 steps/s" in capsys.readouterr().out


def test_a_speed_that_nobody_saw_is_not_flat(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(here / "soak.csv", float("nan"))
    assert soak.main(soak.Flags(), []) == 0
    assert soak.main(soak.Flags(run=here / "typo"), []) == 1
    assert "speed: NOT FLAT  " in capsys.readouterr().out


def test_a_training_that_fails_is_not_flat(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "train.py").write_text("import time\ntime.sleep(1.5)\nraise SystemExit(2)\n")
    assert soak.main(soak.Flags(every=0.05), ["--preset", "cpu"]) == 1
    assert "the training ended by itself with exit status 2" in capsys.readouterr().out


def test_an_earlier_record_stays(here: Path) -> None:
    record(here / "soak.csv", 400)
    before = (here / "soak.csv").read_bytes()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process, pytest.raises(SystemExit, match=r"--out soak\.csv exists"):
        soak.main(soak.Flags(pid=process.pid), [])
    assert (here / "soak.csv").read_bytes() == before


def test_a_record_that_is_not_there_is_named(here: Path) -> None:
    with pytest.raises(SystemExit, match=r"--out soak\.csv: there is no such record"):
        soak.main(soak.Flags(run=here / "x"), [])
