"""What the current policy does in the worlds, as data to learn from."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aloha_jax import networks
from aloha_jax.augmentation import augmented
from aloha_jax.config import Config
from aloha_jax.env import Env, EnvState, Observation
from aloha_jax.networks import ActorCritic, RunningStats, as_inputs, normalize_inputs, vector_inputs
from aloha_jax.policy import Policy, act, clip_action
from aloha_jax.ppo import Transition
from aloha_jax.tasks.insertion import MAX_LEVEL


class Rollout(NamedTuple):
    """What `Collector.rollout` collected.

    Attributes:
        env: the worlds after it.
        transitions: [T, N, ...].
        last_value: V of the last observation, [N] or, per arm, [N, 2].
        vectors: the vector inputs before normalisation, float32[T, N, size] each.
        episodes: sums over the episodes that ended.
    """

    env: EnvState
    transitions: Transition
    last_value: jax.Array
    vectors: dict[str, jax.Array]
    episodes: dict[str, jax.Array]


class Decision(NamedTuple):
    """What was done in N worlds, and why; most of a `Transition`.

    Attributes:
        vectors: the vector inputs before normalisation.
        inputs: what the networks saw.
        action: as sampled.
        log_prob: of that action.
        value: of what was seen.
        executed: what the arms were told: the action within its limits, or the teacher's.
        own: bool[N], whether it was the policy's; None without a teacher.
        teacher_action: what the teacher would have done; None without one.
    """

    vectors: dict[str, jax.Array]
    inputs: dict[str, jax.Array]
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    executed: jax.Array
    own: jax.Array | None
    teacher_action: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Collector:
    """A policy in an environment.

    Attributes:
        config: of the run.
        env: the worlds.
        network: `ActorCritic`.
        params: its parameters.
        stats: statistics that vector inputs are normalised by.
        teacher: sees the privileged observation and takes a share of the actions.
        teacher_mix: that share, 0..1.
    """

    config: Config
    env: Env
    network: ActorCritic
    params: Any
    stats: dict[str, RunningStats]
    teacher: Policy | None = None
    teacher_mix: jax.Array | float = 0.0

    def rollout(self, state: EnvState, key: jax.Array) -> Rollout:
        """`config.n_steps` steps of every world."""
        keys = jax.random.split(key, self.config.n_steps)
        return self._collected(*jax.lax.scan(self._step, state, keys))

    def _collected(self, state: EnvState, outcomes: Any) -> Rollout:
        """The worlds after all steps, and `_outcome` of each."""
        transitions, vectors, episodes = outcomes
        sums = jax.tree.map(lambda x: x.sum(axis=0), episodes)
        return Rollout(state, transitions, self._value_of(state.obs, state.privileged), vectors, sums)

    def _step(self, state: EnvState, key: jax.Array) -> tuple[EnvState, Any]:
        decision = self._decide(state, key)
        after = self.env.step(state, decision.executed)
        return after, self._outcome(decision, after)

    def _decide(self, state: EnvState, key: jax.Array) -> Decision:
        seen = inputs_of(self.config, state.obs, state.privileged)
        action_key, mix_key, view_key = jax.random.split(key, 3)
        raw = augmented(seen, view_key, self.config.random_shift, self.config.color_jitter)
        inputs = normalize_inputs(raw, self.stats)
        apply: Any = self.network.apply
        distribution, value = apply(self.params, inputs)
        action = networks.sample(distribution, action_key)
        log_prob = networks.log_prob(distribution, action)
        executed, own, teacher_action = clip_action(self.config, action), None, None
        if self.teacher is not None:
            teacher_action = act(self.teacher.config, self.teacher.params, self.teacher.stats, state.privileged, None)
            own = jax.random.uniform(mix_key, state.clock.shape) >= self.teacher_mix
            executed = jnp.where(own[:, None], executed, teacher_action)
        return Decision(vector_inputs(raw), inputs, action, log_prob, value, executed, own, teacher_action)

    def _outcome(self, decision: Decision, after: EnvState) -> Any:
        """The transition, the vectors it was decided by, and sums over the episodes that ended in it."""
        d = decision
        # Only truncated episodes need the value of where they ended; once episodes end in success, most steps truncate none.
        final_value = jax.lax.cond(
            after.truncated.any(),
            lambda: self._value_of(after.final_obs, after.final_privileged),
            lambda: jnp.zeros_like(d.value),
        )
        reward = after.arm_reward if d.value.ndim == 2 else after.reward
        ends = (after.terminated, after.truncated)
        transition = Transition(d.inputs, d.action, d.log_prob, d.value, final_value, reward, *ends, d.own, d.teacher_action)
        return transition, d.vectors, _episode_sums(after)

    def _value_of(self, obs: Observation, privileged: jax.Array) -> jax.Array:
        """Values of observations as they are: for a critic that sees pixels, without `_decide`'s augmentation."""
        inputs = normalize_inputs(inputs_of(self.config, obs, privileged), self.stats)
        apply: Any = self.network.apply
        return apply(self.params, inputs, method="value")


class PipelinedCollector(Collector):
    """The same in two halves of the worlds: while one half's pictures are drawn, the other half decides and moves.

    Only for an environment that draws on the host (`Env.draws_ahead`), an even number of worlds, and an archive, if any, that
    does not change.
    """

    def rollout(self, state: EnvState, key: jax.Array) -> Rollout:
        first, second = (_half(state, i) for i in range(2))
        ahead_key, *keys = jax.random.split(key, 3)
        first_keys, second_keys = (jax.random.split(k, self.config.n_steps) for k in keys)
        last = jnp.arange(self.config.n_steps) == self.config.n_steps - 1

        def step(carry: Any, x: Any) -> Any:
            first, ahead, _ = carry
            first_key, second_key, is_last = x
            begun = self._begin(first, first_key)
            second, second_outcome = self._end(ahead, after=begun)
            # A step ahead, the second half has taken its last one already.
            ahead = jax.lax.cond(is_last, lambda: ahead, lambda: self._begin(second, second_key))
            first, first_outcome = self._end(begun, after=ahead)
            (a_transition, a_vectors, a_sums), (b_transition, b_vectors, b_sums) = first_outcome, second_outcome
            join = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (a_transition, a_vectors), (b_transition, b_vectors))
            return (first, ahead, (second.obs, second.final_obs)), (*join, jax.tree.map(jnp.add, a_sums, b_sums))

        carry = (first, self._begin(second, ahead_key), (second.obs, second.final_obs))
        (first, (_, second, _), (obs, final_obs)), outcomes = jax.lax.scan(step, carry, (first_keys, second_keys, last))
        return self._collected(_whole(first, second._replace(obs=obs, final_obs=final_obs)), outcomes)

    def _begin(self, state: EnvState, key: jax.Array) -> tuple[Decision, EnvState, jax.Array]:
        decision = self._decide(state, key)
        return decision, *self.env.begin_step(state, decision.executed)

    def _end(self, begun: tuple[Decision, EnvState, jax.Array], after: tuple[Decision, EnvState, jax.Array]) -> Any:
        decision, state, ticket = begun
        state = self.env.end_step(state, ticket, after[2])
        return state, self._outcome(decision, state)


def _half(state: EnvState, index: int) -> EnvState:
    """Half of the worlds; the archive is not theirs but everybody's."""
    size = state.clock.shape[0] // 2
    worlds = state._replace(archive=None)
    return jax.tree.map(lambda x: x[index * size : (index + 1) * size], worlds)._replace(archive=state.archive)


def _whole(first: EnvState, second: EnvState) -> EnvState:
    worlds = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first._replace(archive=None), second._replace(archive=None))
    return worlds._replace(archive=first.archive)


def inputs_of(config: Config, obs: Observation, privileged: jax.Array) -> dict[str, jax.Array]:
    """What the networks see: the observation, and, for a privileged critic, the simulator's state."""
    return as_inputs(obs, privileged if config.privileged_critic else None)


def _episode_sums(state: EnvState) -> dict[str, jax.Array]:
    """Sums over the worlds whose episode from a start of the task has just ended, for means over any number of steps."""
    ended = state.done & state.task_start
    sums = {
        "episodes": ended,
        "episode_reward": ended * state.episode.total_reward,
        "episode_length": ended * state.episode.length,
        "episode_level": ended * state.episode.best_level,
        "episode_success": ended * (state.level == MAX_LEVEL),
        "invalid_worlds": state.invalid,
    }
    return {name: x.sum().astype(jnp.float32) for name, x in sums.items()}
