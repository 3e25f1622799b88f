"""What the dense reward of the insertion pays for, term by term: potentials of where fingers and objects are (docs/learning.md).

Pure functions of `Geometry`, in which both arms look alike; N worlds at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aloha_jax.config import Config
from aloha_jax.scene import HALF_LENGTH, HALF_WIDTH

HALF_TURN = (-1.0, -1.0, 1.0)  # about z: what it does to a vector takes it from either arm's frame to the other's
MOUTH, PIN_FACE = 0.06, 0.04  # along the socket's axis from its centre
NOMINAL_GRIP = (-0.03, 0.004)  # of the fingertips' midpoint from the object's centre: along its axis and upward, metres
# Where each arm is to bring its object's centre, in its own frame: along the line on which the two meet, from where the peg is
# 4 cm short of the socket's mouth to where they are as deep in each other as if inserted.
MEETING_X = (-0.08, -0.049)
MEETING_HEIGHT = 0.13
GRIP_OVER_TABLE = 0.011  # fingertips' height where the table stops a hand that comes 45 degrees down, metres
BEFORE = 0.075  # depth, as `mating_error` has it, at which the peg may be moved aside: 1.5 cm short of the mouth, metres
# Near the wrist: how far behind the fingertips that point is, metres, and where from them it is to lie, in the object's frame:
# as far up as out, so that the hand comes 45 degrees down.
WRIST = 0.2
APPROACH = (-(0.5**0.5), 0.0, 0.5**0.5)
HIGHEST = 25.0  # the most that either arm's potential can be, with the peg inserted
LEVEL_1_BONUS = 0.5  # what reaching official level 1 pays, once in an episode


class Shaping(NamedTuple):
    """What the dense reward asks beyond an insertion.

    Attributes:
        action_cost: what it takes, halved as all of it is, for the squared action, per unit of `actions.DELTA_SCALE`.
        action_change_cost: the same for the squared change of the action.
        grip_tolerance: metres; how far from the nominal grip the fingers may hold an object before the hold counts for little.
            None: any hold near the object's centre counts in full.
        grip_height_tolerance: metres; lifting counts half where an object is held that far over or under where fingers on the
            table take it. None: at any height in full.
    """

    action_cost: float = 0.0005
    action_change_cost: float = 0.0
    grip_tolerance: float | None = None
    grip_height_tolerance: float | None = None

    @classmethod
    def of(cls, config: Config) -> "Shaping":
        """What a run's configuration says."""
        return cls(*(getattr(config, name) for name in cls._fields))


class Geometry(NamedTuple):
    """Poses in the arms' own frames; axis 1 is the arm (left: socket, right: peg). Lengths in metres.

    Attributes:
        fingertips: float32[N, 2, 2, 3], inner sides of the left and the right finger.
        gripper: float32[N, 2, 3, 3], rotation of the gripper.
        position: float32[N, 2, 3], centre of the arm's object.
        rotation: float32[N, 2, 3, 3], rotation of the arm's object; its first column points to the mating end.
        off_centre: float32[N, 2], how far the fingers' middle is from the hand's, along `gripper`'s second column.
    """

    fingertips: jax.Array
    gripper: jax.Array
    position: jax.Array
    rotation: jax.Array
    off_centre: jax.Array


def total(shaping: Shaping, geometry: Geometry, grasp: jax.Array, squeeze: jax.Array) -> jax.Array:
    """float32[N, 2]: 0.7 reach + 0.3 opening + ½ (hold + grasp · squeeze) + 3 lift + 4 lift · carry + join, 0..25.

    With lift · levelness (· likeness) for lift. All but `join` ask of an arm what does not depend on the other one. `squeeze`,
    float32[N, 2] in 0..1, is how far fingers are told to close: from leaning against an object to a hold, `hold` has no slope
    (experiment 45).
    """
    held = hold(geometry, grasp)
    lifted = lift(geometry, held) * levelness(geometry)
    if shaping.grip_height_tolerance is not None:
        lifted = lifted * likeness(geometry, shaping.grip_height_tolerance)
    near = 0.7 * reach(geometry) + 0.3 * opening(geometry)
    grip = 0.5 * (held + grasp * squeeze)
    return near + grip + 3.0 * lifted + 4.0 * lifted * carry(geometry) + join(geometry, lifted)[:, None]


def success_bonus(geometry: Geometry, potential: jax.Array) -> jax.Array:
    """float32[N, 2], what an insertion pays either arm: (15 + 20 (1 - tilt / 4 cm)) · potential / highest.

    Much, for pegs that meet the rim now and then cost what was earned, and a policy from pixels tries it only if it pays
    (docs/experiments.md, 39). As far as it was brought about, float32[N, 2] `potential`, for whoever pushes objects together on
    the table would have it, too, and learn no more to lift them (40).
    """
    _, tilt, _ = mating_error(geometry)
    straight = jnp.clip(1.0 - tilt / 0.04, 0.0, 1.0)[:, None]  # 0 from 20 degrees
    return (15.0 + 20.0 * straight) * potential / HIGHEST


def reach(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1: 1 - ½ tanh(4 d) - ½ tanh(20 d), d the mean distance of three points from where they should be.

    They are the fingertips, on either side of the object, 3 cm toward its outer end and 4 mm up, and a point 20 cm behind them in
    the hand, 45 degrees up and out: fingers alone get there with the wrist bent up as well (experiment 32). Fingertips count as
    if nothing pushed them aside (44) and they were no further apart than asked for: hands may come open wide (45).
    """
    half_width = jnp.array(HALF_WIDTH) + 0.003
    hand = geometry._replace(fingertips=_hand(geometry, half_width))
    side = jnp.array([1.0, -1.0])[None, :] * half_width[:, None]  # [arm, finger]
    along, height = NOMINAL_GRIP
    local = jnp.stack([jnp.full_like(side, along), side, jnp.full_like(side, height)], axis=-1)
    targets = geometry.position[:, :, None] + jnp.einsum("naij,afj->nafi", geometry.rotation, local)
    wrist_target = targets.mean(axis=2) + jnp.einsum("naij,j->nai", geometry.rotation, WRIST * jnp.array(APPROACH))
    fingertips = jnp.linalg.norm(hand.fingertips - targets, axis=-1)
    wrist = jnp.linalg.norm(_wrist(hand) - wrist_target, axis=-1, keepdims=True)
    distance = jnp.concatenate([fingertips, wrist], axis=-1).mean(axis=-1)
    return 1.0 - 0.5 * jnp.tanh(4 * distance) - 0.5 * jnp.tanh(20 * distance)


def opening(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1: the fingertips' distance, as a share of what it is while they hold the object.

    `reach` hardly has a slope toward open hands from on top of the object, where those that stayed closed waited (experiment 43).
    """
    apart = jnp.linalg.norm(geometry.fingertips[:, :, 0] - geometry.fingertips[:, :, 1], axis=-1)
    return jnp.clip(apart / (2.0 * jnp.array(HALF_WIDTH)[None] - 0.002), 0.0, 1.0)  # 2 mm: pads and objects give way


def hold(geometry: Geometry, grasp: jax.Array) -> jax.Array:
    """float32[N, 2] in 0..1: grasp / (1 + (m / 8 mm)²), m how far the fingers' middle is from the hand's; less so once it is up.

    Fingers that squeeze an object centre it, their motors being equally strong; of an open hand that leans against it one finger
    gives way (experiment 43). From 2 cm over the object's rest on at least a share of `grasp` counts that is all of it at 6 cm:
    what is up is held, and a rim pushes fingers aside on the way in (45).
    """
    centred = 1.0 / (1.0 + jnp.square(geometry.off_centre / 0.008))
    return grasp * jnp.maximum(centred, jnp.clip(1.5 * raised(geometry) - 0.5, 0.0, 1.0))


def _hand(geometry: Geometry, half_width: jax.Array) -> jax.Array:
    """float32[N, 2, 2, 3], fingertips as far apart as they are, at most twice `half_width`, float32[2], in the hand's middle."""
    aside = geometry.off_centre[..., None] * geometry.gripper[..., 1]
    middle = geometry.fingertips.mean(axis=2, keepdims=True)
    half = jnp.linalg.norm(geometry.fingertips[:, :, :1] - middle, axis=-1, keepdims=True)
    limit = half_width[None, :, None, None]
    return middle - aside[:, :, None] + (geometry.fingertips - middle) * limit / jnp.maximum(half, limit)


def _wrist(geometry: Geometry) -> jax.Array:
    """float32[N, 2, 3], the point near the wrist."""
    return geometry.fingertips.mean(axis=2) - WRIST * geometry.gripper[..., 0]


def raised(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1: the object's height over its rest, 1 from 6 cm on."""
    return jnp.clip((geometry.position[..., 2] - jnp.array(HALF_WIDTH)[None]) / 0.06, 0.0, 1.0)


def lift(geometry: Geometry, grasp: jax.Array) -> jax.Array:
    """float32[N, 2] in 0..1: raised · grasp · (w + 12 cm) / 18 cm, w the wrist point's height over that in a nominal grip.

    The last factor within 0..1. Shoulder and elbow are to lift: the wrist alone does so, too, up to its limit, and no way leads
    on from there (experiments 32 and 35). It counts from where hands come down and first lift by bending it (45 to 47).
    """
    nominal = jnp.array(HALF_WIDTH)[None] + NOMINAL_GRIP[1] + WRIST * APPROACH[2]
    wrist = _wrist(geometry)[..., 2] - nominal
    return raised(geometry) * grasp * jnp.clip((wrist + 0.12) / 0.18, 0.0, 1.0)


def likeness(geometry: Geometry, tolerance: float) -> jax.Array:
    """float32[N, 2] in 0..1: 1 / (1 + (h / tolerance)²), h how far over or under where fingers on the table take it it is held.

    In metres, as `tolerance`. From above a policy sees as little at which height it holds an object as its joints feel it, and
    8 mm make it miss (experiments 44 and 45). The table makes that height: it stops every hand at the same one.
    """
    middle = geometry.fingertips.mean(axis=2) - geometry.position
    height = jnp.einsum("nai,nai->na", middle, geometry.rotation[..., 2])
    off = height - (GRIP_OVER_TABLE - jnp.array(HALF_WIDTH))[None]
    return 1.0 / (1.0 + jnp.square(off / tolerance))


def levelness(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1: 1 / (1 + (sin ε / 0.3)²), ε the object's tilt from how it lay; half at 17 degrees."""
    return 1.0 / (1.0 + jnp.square(geometry.rotation[..., 2, :2] / 0.3).sum(axis=-1))


def carry(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1.5: 1 - ½ tanh(3 d) - ½ tanh(15 d), and half of 1 - ½ tanh(1.5 e) - ½ tanh(6 e).

    d is the mean distance (m) of the object's ends from where they are when the arms meet, e that of the unit vectors of where it
    points and of where it should: by d alone 60 % would be paid for an object turned by 50 degrees (experiment 29). How far along
    the line the two are in each other is `join`'s: asked to be there, they came to lie side by side (36).
    """
    x = jnp.clip(geometry.position[..., 0], *MEETING_X)
    goal = jnp.stack([x, jnp.zeros_like(x), jnp.full_like(x, MEETING_HEIGHT)], axis=-1)
    forward = jnp.array([[[1.0, 0.0, 0.0]]])
    turned = geometry.rotation[..., 0] - forward
    # Half of the object's length times the difference of the directions is what its ends are off beside its centre.
    offset = (geometry.position - goal)[:, :, None] + HALF_LENGTH * jnp.stack([turned, -turned], axis=2)
    distance = jnp.linalg.norm(offset, axis=-1).mean(axis=-1)
    place = 0.5 * (1.0 - jnp.tanh(3.0 * distance)) + 0.5 * (1.0 - jnp.tanh(15.0 * distance))
    angle = jnp.linalg.norm(turned, axis=-1)
    pointing = 0.5 * (1.0 - jnp.tanh(1.5 * angle)) + 0.5 * (1.0 - jnp.tanh(6.0 * angle))
    return place + 0.5 * pointing


def join(geometry: Geometry, lifted: jax.Array) -> jax.Array:
    """float32[N] in 0..14: the smaller lift · (6 align + 8 insert).

    No step of the way costs something. Who aligns the peg at the mouth is not charged for not being inside, and a peg beside the
    socket, held off by its wall, earns by drawing back (docs/experiments.md, 36). Going in pays, already where the peg would meet
    the rim, and more than what is risked there: or whoever aligns it to within a centimetre only, as from pixels, waits at the
    door (38, 39).
    """
    lateral, tilt, depth = mating_error(geometry)
    # The peg has 8 mm to either side of it; held off by the wall's outer face it would be 32 mm aside.
    aligned = jnp.clip((0.026 - lateral) / 0.016, 0.0, 1.0)
    beside = jnp.maximum(BEFORE - depth, 0.0) * (1.0 - aligned)
    error = lateral + 0.7 * tilt + jnp.maximum(depth - BEFORE, 0.0) + 2.0 * beside
    insert = jnp.clip((BEFORE - depth) / (BEFORE - PIN_FACE), 0.0, 1.0) * aligned
    return lifted.min(axis=1) * (6.0 * _align(error) + 8.0 * insert)


def _align(error: jax.Array) -> jax.Array:
    """float32[N] in 0..1, from an error float32[N] in metres: a slope from afar, and one for the last millimetres."""
    return jnp.mean(1.0 - jnp.tanh(jnp.array([[3.0, 15.0, 40.0]]) * error[:, None]), axis=1)


def mating_error(geometry: Geometry) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How the peg stands to the socket, each float32[N] in metres.

    Returns:
        lateral: distance of the peg's tip from the socket's axis.
        tilt: distance between the lateral positions of the peg's tail and tip.
        depth: the tip's coordinate along the socket's axis; the mouth is at 0.06, the pin's face at 0.04.
    """
    tip, tail = peg_in_socket(geometry)
    lateral = jnp.linalg.norm(tip[:, 1:], axis=1)
    tilt = jnp.linalg.norm(tail[:, 1:] - tip[:, 1:], axis=1)
    return lateral, tilt, tip[:, 0]


def peg_in_socket(geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """The peg's tip and tail in the socket's frame, each float32[N, 3]: along its axis from its centre, sideways, up; metres."""
    half_turn = jnp.array([HALF_TURN])
    peg_centre = geometry.position[:, 1] * half_turn  # into the left arm's frame
    peg_axis = geometry.rotation[:, 1, :, 0] * half_turn
    relative = jnp.stack([peg_centre + HALF_LENGTH * peg_axis, peg_centre - HALF_LENGTH * peg_axis], axis=1)
    relative = relative - geometry.position[:, 0][:, None]
    tip, tail = jnp.moveaxis(jnp.einsum("nei,nij->nej", relative, geometry.rotation[:, 0]), 1, 0)
    return tip, tail
