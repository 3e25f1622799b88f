"""What the dense reward of the insertion pays for, term by term: potentials of where fingers and objects are (docs/learning.md).

Pure functions of `Geometry`, in which both arms look alike; N worlds at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aloha_jax.config import Config
from aloha_jax.scene import HALF_LENGTH, HALF_WIDTH

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
        action_cost: what it takes for the squared action, per unit of `actions.DELTA_SCALE`.
        action_change_cost: what it takes for the squared change of the action.
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
    """float32[N, 2]: near (0..1) + grip (0..1) + 3 lift (0..3) + 4 carry (0..6) + join (0..14).

    All but `join` ask of an arm what does not depend on the other one. Half of the grip is for fingers that touch the object and
    are told to close, `squeeze`, float32[N, 2] in 0..1: from leaning against an object to a hold there was no slope, since an
    open hand that begins to squeeze stays off its middle until it has closed (experiment 45).
    """
    held = hold(geometry, grasp)
    lifted = lift(geometry, held) * levelness(geometry)
    if shaping.grip_height_tolerance is not None:
        lifted = lifted * likeness(geometry, shaping.grip_height_tolerance)
    near = 0.7 * reach(geometry) + 0.3 * opening(geometry)
    grip = 0.5 * (held + grasp * squeeze)
    return near + grip + 3.0 * lifted + 4.0 * lifted * carry(geometry) + join(geometry, lifted)[:, None]


def success_bonus(geometry: Geometry, potential: jax.Array) -> jax.Array:
    """float32[N, 2], what an insertion pays either arm: 15, and up to 20 more for a straight one, as far as it was brought about.

    On the way in a peg that is a few millimetres off pushes against the rim, and now and then objects slip in the hands or are
    lost, and with them what they had earned. A policy from pixels tries it only if it pays much (docs/experiments.md, 39). But
    whoever pushes objects together on the table is paid as well, and learns no more to lift them (40). So an arm gets as large a
    part of it as its `potential`, float32[N, 2], is of the highest. Likewise official levels 2 and 3 pay nothing: a wrist bent
    up lifts an object off the table, too, and objects that are pushed together are at each other (37).
    """
    _, tilt, _ = mating_error(geometry)
    straight = jnp.clip(1.0 - tilt / 0.04, 0.0, 1.0)[:, None]  # 0 from 20 degrees
    return (15.0 + 20.0 * straight) * potential / HIGHEST


def reach(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1: fingertips on either side of the object, 3 cm toward its outer end and 4 mm up, wrist over them.

    A third point, 20 cm behind the fingertips in the hand, counts as much as each of them. It is where it should be if the hand
    comes from over the object's outer end, 45 degrees down: fingers alone are reached as well with the wrist bent up (experiment
    32). And it is the hand that is to be there, open: fingertips count where they would be if nothing pushed them aside, as those
    of a hand that leans against its object are (44), and if they were no further apart than is asked for. That leaves 3 mm on
    either side, and who comes from pixels is 13 mm off (45).
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
    """float32[N, 2] in 0..1: how far fingers are apart, of what they are while they hold the object.

    From afar, and from on top of the object, fingertips that part come hardly nearer to its sides. So policies that kept them
    closed, as they start, where a target that is lower yet changes nothing, stayed on top of it (experiment 43).
    """
    apart = jnp.linalg.norm(geometry.fingertips[:, :, 0] - geometry.fingertips[:, :, 1], axis=-1)
    return jnp.clip(apart / (2.0 * jnp.array(HALF_WIDTH)[None] - 0.002), 0.0, 1.0)  # 2 mm: pads and objects give way


def hold(geometry: Geometry, grasp: jax.Array) -> jax.Array:
    """float32[N, 2] in 0..1: a grasp, half of it where the fingers' middle is 8 mm off the hand's, until the object is up.

    Fingers that squeeze an object centre it, their motors being equally strong. But both touch it, too, where an open hand leans
    against it sideways and one finger gives way. That was paid like a grasp, and lifted nothing (experiment 43).
    From 2 cm over its rest on it counts more, at 6 cm all of it: hardly anything is up that is not held, and there it is the
    rim of a socket that pushes fingers aside, on the way in (experiment 45).
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
    """float32[N, 2] in 0..1: the object's height, as far as the point near the wrist has risen, too, and it is held.

    The wrist's counts from 12 cm under where it is in a nominal grip to 6 cm over that. The quickest way to lift is to bend the
    wrist up, to its limit, from where policies found no way to the other arm (experiment 32): shoulder and elbow are to lift
    (35). From 12 cm under, since hands come down with the wrist as low as 5 cm under, and lift by bending it with the wrist at 9;
    from both the next centimetre up is to be paid (45 to 47).
    """
    nominal = jnp.array(HALF_WIDTH)[None] + NOMINAL_GRIP[1] + WRIST * APPROACH[2]
    wrist = _wrist(geometry)[..., 2] - nominal
    return raised(geometry) * grasp * jnp.clip((wrist + 0.12) / 0.18, 0.0, 1.0)


def likeness(geometry: Geometry, tolerance: float) -> jax.Array:
    """float32[N, 2] in 0..1: an object is held where fingers on the table take it, half where `tolerance` metres over or under.

    What is held at one height meets the other at one height. A policy from pixels neither sees from above at which it holds an
    object nor feels it in its joints, and misses where peg and socket meet 8 mm too high or low (experiments 44 and 45). The
    table makes the height: it stops every hand that comes down on it at the same one.
    """
    middle = geometry.fingertips.mean(axis=2) - geometry.position
    height = jnp.einsum("nai,nai->na", middle, geometry.rotation[..., 2])
    off = height - (GRIP_OVER_TABLE - jnp.array(HALF_WIDTH))[None]
    return 1.0 / (1.0 + jnp.square(off / tolerance))


def levelness(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1: whether an object is held as it lay, half where it is tilted by 17 degrees, either way."""
    return 1.0 / (1.0 + jnp.square(geometry.rotation[..., 2, :2] / 0.3).sum(axis=-1))


def carry(geometry: Geometry) -> jax.Array:
    """float32[N, 2] in 0..1.5: an object is where it is to meet the other one (1, by its ends), and points there (0.5).

    It leaves to `join` how far along the line they are in each other: asked to be all the way there, they came to lie side by
    side, and it would have cost them to go back (docs/experiments.md, 36). By its ends alone 60 % would be paid for an object
    turned by 50 degrees (29).
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
    """float32[N] in 0..14: align (6) and insert (8), counted as far as both objects are lifted.

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
    half_turn = jnp.array([[-1.0, -1.0, 1.0]])
    peg_centre = geometry.position[:, 1] * half_turn  # into the left arm's frame
    peg_axis = geometry.rotation[:, 1, :, 0] * half_turn
    relative = jnp.stack([peg_centre + HALF_LENGTH * peg_axis, peg_centre - HALF_LENGTH * peg_axis], axis=1)
    relative = relative - geometry.position[:, 0][:, None]
    tip, tail = jnp.moveaxis(jnp.einsum("nei,nij->nej", relative, geometry.rotation[:, 0]), 1, 0)
    return tip, tail
