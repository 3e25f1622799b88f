"""How a policy holds what it carries: when an object counts as lifted, and what a teacher of known grips is said to do."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from aloha_jax.config import ConfigError
from aloha_jax.scene import HALF_LENGTH
from aloha_jax.tasks.potentials import Geometry
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
    grip_table, mouth_table = capsys.readouterr().out.split("\n\n")
    first, *rows = grip_table.splitlines()
    assert first == "inserted in 100% of 4 within 120 steps"
    cells = {tuple(row.split(" | ")[:2]): row.strip("| ").split(" | ")[2:] for row in rows[2:]}
    for name in grips.ARMS:
        held, along, height, roll, _pitch = cells[f"| {name}", "0"]
        assert held == "100%"
        assert float(along.split()[0]) == pytest.approx(-30, abs=4)
        assert float(height.split()[0]) == pytest.approx(4, abs=3)
        assert abs(float(roll.split()[0])) < 8
    came = [row.strip("| ").split(" | ") for row in mouth_table.splitlines()[2:]]
    assert sum(int(row[1]) for row in came) == 4
    assert {row[2] for row in came if row[1] != "0"} == {"100%"}


def test_the_tips_height_is_that_of_the_moment_when_it_comes_to_the_mouth() -> None:
    depth, up = np.array([0.10, 0.065, 0.05]), np.array([0.02, 0.007, 0.001])
    still = np.zeros(3)
    peg = np.stack([-depth - HALF_LENGTH, still, up], axis=-1)  # in the right arm's frame, from where it comes
    level = jnp.broadcast_to(jnp.eye(3), (3, 3, 2, 3, 3))
    geometry = Geometry(
        fingertips=jnp.zeros((3, 3, 2, 2, 3)),
        gripper=level,
        position=jnp.broadcast_to(np.stack([np.zeros((3, 3)), peg], axis=1), (3, 3, 2, 3)),
        rotation=level,
        off_centre=jnp.zeros((3, 3, 2)),
    )
    # The second episode has ended before. The third is beside the mouth, first.
    geometry = geometry._replace(position=geometry.position.at[2, 1, 1, 2].set(0.05))
    np.testing.assert_allclose(grips.heights_at_mouth(geometry, np.array([3, 1, 3])), [7.0, np.nan, 1.0], rtol=1e-4)


def test_nonsense_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="n-episodes"):
        grips.main(grips.Flags(model_path=str(PRETRAINED / "insertion-state"), n_episodes=0))
