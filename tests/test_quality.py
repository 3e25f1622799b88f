"""Clean insertions: poses whose tilt, depth and overlap are known by construction."""

import numpy as np
import pytest
from gym_aloha.constants import START_ARM_POSE

from aloha_jax import quality
from aloha_jax.quality import Quality, measure

SOCKET = np.array([-0.05, 0.5, 0.3])


def pose(depth: float = 0.0, sideways: float = 0.0, tilt: float = 0.0) -> np.ndarray:
    """[30]: the peg's tip `depth` mm inside the mouth and `sideways` mm off the axis, turned by `tilt` degrees about its tip."""
    tip = SOCKET + [0.06 - 1e-3 * depth, 1e-3 * sideways, 0.0]
    angle = np.radians(tilt)
    centre = tip + 0.06 * np.array([np.cos(angle), np.sin(angle), 0.0])
    peg = [*centre, np.cos(angle / 2), 0, 0, np.sin(angle / 2)]
    return np.array([*START_ARM_POSE, *peg, *SOCKET, 1, 0, 0, 0])


def test_a_straight_insertion_is_clean() -> None:
    found = measure(np.stack([pose(-20), pose(0), pose(20)]))
    assert found == pytest.approx((0.0, 20.0, 0.0), abs=1e-6)
    assert measure(pose(20.5)[None]).penetration == pytest.approx(0.5)  # the pin is 20 mm inside
    assert measure(pose(20.5)[None]).clean


@pytest.mark.parametrize("tilt", [-20.0, 5.0, 90.0])
def test_tilt_and_depth(tilt: float) -> None:
    found = measure(pose(depth=-30, tilt=tilt)[None])
    assert found.tilt == pytest.approx(abs(tilt))
    assert found.depth == pytest.approx(-30.0 + 10 * np.sin(np.radians(abs(tilt))))  # a corner is ahead of the centre


def test_the_deepest_overlap_of_the_episode_counts() -> None:
    # The wall's inner face is 18 mm off the axis, the peg's side 10 mm.
    through_the_wall = measure(np.stack([pose(-10), pose(5, sideways=10), pose(20)]))
    assert through_the_wall.penetration == pytest.approx(2.0, abs=0.01)
    assert not through_the_wall.clean


@pytest.mark.parametrize(
    ("found", "clean"),
    [
        (Quality(15.0, 20.0, 1.0), True),
        (Quality(15.1, 20.0, 1.0), False),
        (Quality(15.0, 19.8, 1.0), False),
        (Quality(15.0, 20.0, 1.1), False),
    ],
)
def test_the_limits(found: Quality, clean: bool) -> None:
    assert found.clean is clean


def test_jerk_of_a_cubic_is_constant() -> None:
    time = 0.02 * np.arange(50)
    targets = np.zeros((50, 14))
    targets[:, 3] = 2.0 * time**3  # third derivative 12
    targets[:, 6] = np.random.default_rng(0).normal(size=50)  # a gripper does not count
    assert quality.jerk(targets) == pytest.approx(12 / 12)
    assert quality.jerk(targets[:3]) == 0.0
