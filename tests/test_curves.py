"""Learning curves: the right numbers, one line per label, mean and band over its runs, in a picture."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.lines import Line2D
from PIL import Image

from docs import curves


def write(path: Path, columns: str, *rows: tuple[float | str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])


def evaluated(run: Path, *rows: tuple[float, ...]) -> Path:
    write(run / "eval" / "evaluations.csv", "env_steps seconds success_rate level_3", *rows)
    return run


def points(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xydata(), float)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    evaluated(tmp_path / "a" / "0", (0, 0, 0.0, 0.0), (100_000, 60, 0.2, 0.4), (200_000, 120, 0.6, 0.8))
    evaluated(tmp_path / "a" / "1", (0, 0, 0.0, 0.2), (200_000, 240, 0.8, 1.0), (300_000, 300, 1.0, 1.0))
    columns = "env_steps seconds rollout/success_rate"
    write(tmp_path / "b" / "progress.csv", columns, (8192, 30, ""), (16_384, 60, 0.5), (24_576, 90, 0.75))
    return tmp_path


def test_runs_of_one_label_are_merged_over_env_steps(runs: Path) -> None:
    line = curves.lines_of((f"a={runs}/a/*",))["a"]
    np.testing.assert_allclose(line.env_steps, [0, 100_000, 200_000])  # as far as both go
    np.testing.assert_allclose(line.minutes, [0, (1 + 2) / 2, (2 + 4) / 2])
    np.testing.assert_allclose(line.shares["success"], [[0, 0.2, 0.6], [0, 0.4, 0.8]])
    np.testing.assert_allclose(line.shares["level 3"], [[0, 0.4, 0.8], [0.2, 0.6, 1.0]])
    one_by_one = curves.lines_of((f"a={runs}/a/0", f"a={runs}/a/1"))["a"]
    np.testing.assert_array_equal(one_by_one.shares["success"], line.shares["success"])


def test_a_run_without_evaluations_shows_its_training_episodes(runs: Path) -> None:
    lines = curves.lines_of((f"x={runs}/b", f"x={runs}/a/0"))
    assert list(lines) == ["x (training episodes)", "x"]
    line = lines["x (training episodes)"]
    np.testing.assert_allclose(line.env_steps, [16_384, 24_576])  # before that no episode had ended
    np.testing.assert_allclose(line.minutes, [1, 1.5])
    assert list(line.shares) == ["success"]
    np.testing.assert_allclose(line.shares["success"], [[0.5, 0.75]])


def test_stages_of_one_training_are_joined(runs: Path) -> None:
    line = curves.lines_of((f"x={runs}/a/0,{runs}/a/1",))["x"]
    np.testing.assert_allclose(line.env_steps, [0, 100_000, 200_000, 200_001, 400_000, 500_000])
    np.testing.assert_allclose(line.minutes, [0, 1, 2, 2, 6, 7])
    np.testing.assert_allclose(line.shares["success"], [[0, 0.2, 0.6, 0, 0.8, 1.0]])
    both = curves.lines_of((f"x={runs}/a/*,{runs}/a/*",))["x"]
    np.testing.assert_allclose(both.env_steps[-1], 400_000)
    np.testing.assert_allclose(
        both.shares["level 3"][:, -1], [0.8, 0.6], atol=1e-5
    )  # the longer one is in its second stage's midst
    mixed = curves.lines_of((f"x={runs}/a/0,{runs}/b",))
    assert list(mixed) == ["x (training episodes)"]
    assert list(mixed["x (training episodes)"].shares) == ["success"]
    with pytest.raises(SystemExit, match="as many runs must match in each stage"):
        curves.lines_of((f"x={runs}/a/*,{runs}/b",))


def test_panels_have_mean_and_band_over_steps_and_minutes(runs: Path) -> None:
    figure = curves.draw(curves.lines_of((f"a={runs}/a/*", f"b={runs}/b")))
    success, success_minutes, level, level_minutes = figure.axes
    mean, training = success.get_lines()
    np.testing.assert_allclose(points(mean), [[0.0, 0.0], [0.1, 0.3], [0.2, 0.7]])
    np.testing.assert_allclose(points(training), [[0.016384, 0.5], [0.024576, 0.75]])
    assert (mean.get_linestyle(), training.get_linestyle()) == ("-", "--")
    np.testing.assert_allclose(points(success_minutes.get_lines()[0]), [[0.0, 0.0], [1.5, 0.3], [3.0, 0.7]])
    np.testing.assert_allclose(points(level.get_lines()[0]), [[0.0, 0.1], [0.1, 0.5], [0.2, 0.9]])
    assert len(level.get_lines()) == len(level_minutes.get_lines()) == 1
    (band,) = success.collections  # a single run has none
    outline = np.asarray(band.get_paths()[0].vertices)
    assert {(0.1, 0.2), (0.1, 0.4), (0.2, 0.6), (0.2, 0.8)} <= {(round(x, 6), round(y, 6)) for x, y in outline.tolist()}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b (training episodes)"]
    plt.close(figure)


@pytest.mark.parametrize("length", [3, 30, 60])
def test_the_legend_is_no_wider_than_the_figure(runs: Path, length: int) -> None:
    labels = [f"{i}{'x' * length}" for i in range(4)]
    figure = curves.draw(curves.lines_of(tuple(f"{label}={runs}/a/*" for label in labels)))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    assert legend.get_window_extent().width <= figure.bbox.width
    plt.close(figure)


def test_without_minutes_there_is_a_panel_for_each_share(runs: Path) -> None:
    figure = curves.draw(curves.lines_of((f"a={runs}/a/*",)), minutes=False)
    success, level = figure.axes
    np.testing.assert_allclose(points(success.get_lines()[0]), [[0.0, 0.0], [0.1, 0.3], [0.2, 0.7]])
    np.testing.assert_allclose(points(level.get_lines()[0]), [[0.0, 0.1], [0.1, 0.5], [0.2, 0.9]])
    assert {axis.get_xlabel() for axis in figure.axes} == {"environment steps, millions"}
    plt.close(figure)


def test_the_table_says_when_success_was_first_reached(tmp_path: Path) -> None:
    evaluated(tmp_path / "0", (0, 0, 0.0, 0.0), (100_000, 60, 0.5, 1.0), (200_000, 120, 0.4, 1.0), (300_000, 180, 0.92, 1.0))
    evaluated(tmp_path / "1", (0, 0, 0.0, 0.0), (100_000, 120, 0.4, 1.0), (200_000, 240, 0.7, 1.0), (300_000, 300, 0.9, 1.0))
    rows = curves.table(curves.lines_of((f"one={tmp_path}/0", f"both={tmp_path}/*"))).splitlines()
    assert rows[0] == "| success | 50% | 90% | 95% |"
    assert rows[2] == "| one | 0.10 M, 1 min | 0.30 M, 3 min | not by 0.30 M |"
    assert rows[3] == "| both | 0.20 M, 3 min | 0.30 M, 4 min | not by 0.30 M |"
    evaluated(tmp_path / "2", (0, 0, 0.0, 0.0))  # one that has just begun: nothing is known of three beyond that
    rows = curves.table(curves.lines_of((f"all={tmp_path}/*",)), minutes=False).splitlines()
    assert rows[2] == "| all | not by 0.00 M | not by 0.00 M | not by 0.00 M |"
    assert curves.table(curves.lines_of((f"one={tmp_path}/0",)), minutes=False).endswith(
        "| one | 0.10 M | 0.30 M | not by 0.30 M |"
    )


def test_it_draws_a_picture(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "images" / "curves.png"
    curves.main(curves.Flags(runs=(f"a={runs}/a/0", f"a={runs}/a/1"), out=out))
    with Image.open(out) as image:
        assert image.width > 1000
    assert "| a | 0.20 M, 3 min | not by 0.20 M | not by 0.20 M |" in capsys.readouterr().out
    curves.main(curves.Flags(runs=(f"b={runs}/b",), out=out))  # no level 3: one row
    with Image.open(out) as image:
        assert image.height < 500
    assert plt.get_fignums() == []


def test_what_cannot_be_drawn_is_said_in_a_line(runs: Path) -> None:
    (runs / "empty").mkdir()
    write(runs / "young" / "progress.csv", "env_steps seconds rollout/success_rate", (8192, 30, ""))
    for word in (str(runs / "a" / "0"), f"a={runs}/nowhere"):
        with pytest.raises(SystemExit, match="must be LABEL=DIRECTORY of a run that is there"):
            curves.lines_of((word,))
    for name in ("empty", "young"):
        with pytest.raises(
            SystemExit, match=rf"{name} has neither eval/evaluations\.csv nor progress\.csv, or nothing in them yet"
        ):
            curves.lines_of((f"a={runs}/{name}",))
