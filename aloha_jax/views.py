"""What a policy gets to see of the worlds, now and, where an episode has just ended, before their reset."""

from typing import Any

import jax
import jax.numpy as jnp

from aloha_jax import history
from aloha_jax.env_state import Moment, Observation
from aloha_jax.pixels import DeviceRenderer, Renderer
from aloha_jax.pixels.ahead import Ahead
from aloha_jax.pixels.ended import render_now_and_ended


class Views:
    """Makes observations.

    Attributes:
        lags: control steps that they look back.
        draws_ahead: whether pictures come from the host, so that something else can be done until they are there.
    """

    def __init__(self, task: Any, obs: str, renderer: Renderer | None, observe_target: bool, lags: tuple[int, ...]):
        self._task, self._obs, self._renderer = task, obs, renderer
        self._observe_target = observe_target
        self.lags = lags if obs != "state" else ()
        on_host = obs != "state" and not isinstance(renderer, DeviceRenderer)
        self._ahead = Ahead(renderer) if renderer is not None and on_host else None
        self.draws_ahead = self._ahead is not None

    def now(self, moment: Moment) -> Observation:
        """Observations of worlds of which none has ended."""
        return self.now_and_ended(moment, moment, jnp.zeros(moment.target.shape[0], bool))[0]

    def now_and_ended(self, now: Moment, final: Moment, ended: jax.Array) -> tuple[Observation, Observation]:
        """Observations now and before any reset; the two moments differ only where bool[N] `ended`."""
        if self._obs == "state":
            return now.privileged, final.privileged
        assert self._renderer is not None
        pixels, final_pixels = render_now_and_ended(self._renderer, _poses(now), _poses(final), ended)
        return _with_pixels(pixels, self._vectors(now)), _with_pixels(final_pixels, self._vectors(final))

    def ask(self, now: Moment, final: Moment, ended: jax.Array) -> tuple[Observation, Observation, jax.Array]:
        """The observations but for their pixels, which are being drawn, and a ticket int32[] for those."""
        assert self._ahead is not None
        ticket = self._ahead.ask(_poses(now), _poses(final), ended)
        return self._vectors(now), self._vectors(final), ticket

    def receive(
        self, vectors: Observation, final_vectors: Observation, ticket: jax.Array, num_worlds: int, after: jax.Array
    ) -> tuple[Observation, Observation]:
        """The observations with their pixels, once those are drawn and the array `after` has been computed."""
        assert self._ahead is not None
        pixels, final_pixels = self._ahead.receive(ticket, num_worlds, after)
        return _with_pixels(pixels, vectors), _with_pixels(final_pixels, final_vectors)

    def _vectors(self, moment: Moment) -> dict[str, jax.Array]:
        agent_pos = self._task.agent_pos(moment.physics)
        return vectors_beside_pixels(self._obs, self._observe_target, self.lags, agent_pos, moment.target, moment.history)


def vectors_beside_pixels(
    obs: str, observe_target: bool, lags: tuple[int, ...], agent_pos: jax.Array, target: jax.Array, memory: jax.Array | None
) -> dict[str, jax.Array]:
    """What an observation holds besides pixels, by name, float32[N, size] each: in training, before the judge, anywhere.

    Args:
        obs: `pixels` or `pixels_agent_pos`.
        observe_target: whether the last targets are seen.
        lags: control steps that the policy looks back.
        agent_pos: measured joint positions, [N, 14].
        target: the targets in force, [N, 14].
        memory: as of `history.start` and `history.push`; None if there are no lags.
    """
    seen = {"agent_pos": agent_pos} if obs == "pixels_agent_pos" else {}
    if observe_target:
        seen["target"] = target
    if memory is not None:
        seen["history"] = history.recall(memory, lags)
    return seen


def _poses(moment: Moment) -> jax.Array:
    """What a renderer wants."""
    qpos = moment.physics.qpos
    return qpos if moment.camera is None else jnp.concatenate([qpos, moment.camera], axis=1)


def _with_pixels(pixels: jax.Array, vectors: Observation) -> Observation:
    assert isinstance(vectors, dict)
    return {"pixels": pixels, **vectors} if vectors else pixels
