"""How a policy holds what it carries: when an object counts as lifted, and what a teacher of known grips is said to do."""

from pathlib import Path

import numpy as np
import pytest

from aloha_jax.config import ConfigError
from benchmarks import grips

PRETRAINED = Path(__file__).parents[1] / "pretrained"


def test_an_object_is_lifted_once_it_has_lain_and_is_up_in_a_hand() -> None:
    falls_and_is_lifted = [0.03, 0.0, 0.005, 0.02, 0.03]
    never_lay = [0.03, 0.03, 0.03, 0.03, 0.03]
    thrown = [0.0, 0.02, 0.02, 0.0, 0.02]
    height = np.array([falls_and_is_lifted, never_lay, thrown, falls_and_is_lifted])
    in_hand = np.array([[True] * 5, [True] * 5, [False] * 4 + [True], [True] * 5])
    lengths = np.array([5, 5, 5, 3])  # the last one ends before
    assert grips.lift_offs(height, in_hand, lengths).tolist() == [3, -1, 4, -1]


def test_a_teacher_of_one_grip_holds_both_objects_where_it_was_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    """`insertion-state-scratch` learned with --grip-tolerance 0.008: 30 mm behind the centre, 4 mm over it (`NOMINAL_GRIP`)."""
    grips.main(grips.Flags(model_path=str(PRETRAINED / "insertion-state-scratch"), n_episodes=4))
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == "inserted in 100% of 4 within 120 steps"
    cells = {tuple(row.split(" | ")[:2]): row.strip("| ").split(" | ")[2:] for row in rows[2:]}
    for name in grips.ARMS:
        held, along, height, roll, _pitch = cells[f"| {name}", "0"]
        assert held == "100%"
        assert float(along.split()[0]) == pytest.approx(-30, abs=4)
        assert float(height.split()[0]) == pytest.approx(4, abs=3)
        assert abs(float(roll.split()[0])) < 8


def test_nonsense_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="n-episodes"):
        grips.main(grips.Flags(model_path=str(PRETRAINED / "insertion-state"), n_episodes=0))
