"""Proximal policy optimisation (Schulman et al. 2017) as pure functions.

Shapes: T steps, N worlds, B samples of a minibatch. A policy of several agents (one per arm, say) gives `log_prob`, `value` and
`reward` one more axis, and splits `action`, [..., 2, 7] for two arms; nothing here depends on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aloha_jax.networks import entropy, log_prob

Params = Any
Apply = Callable[..., Any]  # (params, inputs) -> (Gaussian, values), or (Gaussian, values, errors of a predicted state)


class Transition(NamedTuple):
    """One step of N worlds; stacked over time, [T, N, ...].

    Attributes:
        inputs: network inputs before the step, normalised; pixels as uint8.
        action: float32[..., 14] or, per arm, [..., 2, 7], as the policy sampled it; executed where `own`.
        log_prob: float32[...], of the action when it was sampled.
        value: float32[...], before the step.
        final_value: float32[...], value of the final observation; meaningful only where `truncated`.
        reward: float32[...].
        terminated: bool[...], the episode ended and nothing follows.
        truncated: bool[...], the episode was cut and would have gone on.
        own: bool[...], whether the policy's action was executed, not the teacher's; None without a teacher.
        teacher_action: float32[..., 14], what the teacher would have done; None without a teacher.
    """

    inputs: dict[str, jax.Array]
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    final_value: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    own: jax.Array | None = None
    teacher_action: jax.Array | None = None


class Batch(NamedTuple):
    """What the loss reads, [B, ...] or [T, N, ...]; the names are those of `Transition`.

    In the loss `own` may be a weight, float32[B], whose mean over a minibatch is 1 (`minibatch_gradient`).
    """

    inputs: dict[str, jax.Array]
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    advantage: jax.Array
    target_value: jax.Array
    own: jax.Array | None = None
    teacher_action: jax.Array | None = None


class Coefficients(NamedTuple):
    """Weights of PPO's policy objective, of imitating a teacher, and of predicting the state: float32[], may change in a run."""

    ppo: jax.Array | float = 1.0
    distill: jax.Array | float = 0.0
    state: jax.Array | float = 0.0


PPO_ALONE = Coefficients()


class Hyperparameters(NamedTuple):
    """Constants of the update.

    Attributes:
        n_epochs: passes over the batch.
        batch_size: samples of a minibatch.
        microbatch_size: samples whose gradients are computed at a time; summed to the minibatch's gradient. Bounds memory only.
        clip_range: epsilon of the clipped objective (equation 7).
        clip_range_vf: clips the change of the value, as Stable-Baselines3 does, without the maximum of the two losses; None: not.
        vf_coef: weight of the value loss (c1 of equation 9).
        ent_coef: weight of the entropy bonus (c2 of equation 9).
        target_kl: the update stops when the approximate KL divergence exceeds 1.5 times this; None: never.
        normalize_advantage: whether advantages are whitened per minibatch.
        advantage_bins: they are whitened among samples of like value, in so many bins of equally many.
    """

    n_epochs: int = 10
    batch_size: int = 64
    microbatch_size: int | None = None
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    target_kl: float | None = None
    normalize_advantage: bool = True
    advantage_bins: int = 1


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float,
    gae_lambda: float,
) -> jax.Array:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), float32[T, ...].

    Args:
        reward: r_t, [T, ...].
        value: v_t = V(s_t), [T, ...].
        next_value: V of the state that step t led to, before any autoreset, [T, ...]. Termination makes it worth nothing;
            truncation does not: the episode would have gone on from there.
        terminated: bool[T, ...].
        truncated: bool[T, ...]. Like termination it ends the sum: what follows belongs to another episode.
        gamma: discount.
        gae_lambda: decay of the sum over temporal differences.
    """
    delta = reward + gamma * next_value * ~terminated - value
    decay = gamma * gae_lambda * ~(terminated | truncated)

    def accumulate(advantage: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta_t, decay_t = step
        advantage = delta_t + decay_t * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(accumulate, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantages


def make_batch(transitions: Transition, last_value: jax.Array, gamma: float, gae_lambda: float) -> Batch:
    """Advantages and value targets of a rollout [T, N, ...]; `last_value` is V of the observation after it, [N, ...]."""
    t = transitions
    extra = (1,) * (t.reward.ndim - t.terminated.ndim)  # an agent axis, if any
    terminated = t.terminated.reshape(t.terminated.shape + extra)
    truncated = t.truncated.reshape(t.truncated.shape + extra)
    next_value = jnp.concatenate([t.value[1:], last_value[None]])
    next_value = jnp.where(truncated, t.final_value, next_value)
    advantage = gae(t.reward, t.value, next_value, terminated, truncated, gamma, gae_lambda)
    return Batch(t.inputs, t.action, t.log_prob, t.value, advantage, advantage + t.value, t.own, t.teacher_action)


def loss(
    params: Params, apply: Apply, batch: Batch, hp: Hyperparameters, coef: Coefficients = PPO_ALONE
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped objective, value loss and entropy bonus (equation 9), to be minimised; means over the batch [B, ...].

    With a teacher, half the squared distance to its action is added: the KL divergence from it up to the (fixed) variance, whose
    minimisation on states that the learner visits is DAgger (Ross et al. 2011).

    What the teacher did says nothing about the policy's own choices: its objective and how far it moved are means over its own
    samples.

    `batch.advantage` and `batch.own` are taken as they are: normalisation belongs to the minibatch, this may see a part of it.
    """
    distribution, value, *state_error = apply(params, batch.inputs)
    log_ratio = log_prob(distribution, batch.action) - batch.log_prob
    weight: jax.Array | float = 1.0
    if batch.own is not None:
        weight = _beside(batch.own.astype(jnp.float32), log_ratio)
        log_ratio = jnp.where(weight > 0, log_ratio, 0.0)  # else a ratio may overflow there, and 0 times that is no number
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - hp.clip_range, 1 + hp.clip_range)
    policy_loss = -(weight * jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)).mean()

    if hp.clip_range_vf is not None:
        value = batch.value + jnp.clip(value - batch.value, -hp.clip_range_vf, hp.clip_range_vf)
    value_loss = jnp.square(value - batch.target_value).mean()
    entropy_loss = -entropy(distribution).mean()

    # The bonus goes with the objective: without that nothing would hold exploration back.
    total = coef.ppo * (policy_loss + hp.ent_coef * entropy_loss) + hp.vf_coef * value_loss
    auxiliary = {}
    if state_error:
        auxiliary["state_loss"] = state_error[0].mean()
        total += coef.state * auxiliary["state_loss"]
    if batch.teacher_action is not None:
        difference = distribution.mean - batch.teacher_action.reshape(distribution.mean.shape)
        auxiliary["distill_loss"] = 0.5 * jnp.square(difference).sum(axis=-1).mean()
        total += coef.distill * auxiliary["distill_loss"]
    return total, auxiliary | {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy_loss": entropy_loss,
        # Schulman's low-variance estimator, http://joschu.net/blog/kl-approx.html
        "approx_kl": (weight * (ratio - 1 - log_ratio)).mean(),
        "clip_fraction": (weight * (jnp.abs(ratio - 1) > hp.clip_range)).mean(),
    }


def _beside(x: jax.Array, samples: jax.Array) -> jax.Array:
    """`x`, [B], with axes added until it broadcasts against [B, ...]."""
    return x.reshape(x.shape + (1,) * (samples.ndim - x.ndim))


def explained_variance(value: jax.Array, target_value: jax.Array) -> jax.Array:
    """1 - Var[target - value] / Var[target]; 1 is a perfect critic, 0 one that knows the mean."""
    return 1 - jnp.var(target_value - value) / (jnp.var(target_value) + 1e-8)


def whitened(advantage: jax.Array, value: jax.Array, bins: int = 1, own: jax.Array | None = None) -> jax.Array:
    """Advantages with mean 0 and standard deviation 1 in each of `bins` equal parts of the samples, ordered by their value.

    Late in an episode, where much is at stake, advantages are many times as large as where it begins, and whitened together with
    them the early ones are lost in their noise. Which of two actions is better in a state does not depend on a factor and a
    baseline that the state has to itself. Multi-task learners scale tasks likewise (Hessel et al. 2019).

    Where bool `own`, which broadcasts against them, is given, those outside it are 0 and do not count.
    """
    counts = None if own is None else jnp.broadcast_to(own, advantage.shape)
    if bins == 1:
        centred = (advantage - advantage.mean(where=counts)) / (advantage.std(where=counts) + 1e-8)
        return centred if counts is None else jnp.where(counts, centred, 0.0)
    order = jnp.argsort(value.ravel())
    parts = advantage.ravel()[order].reshape(bins, -1)
    counted = None if counts is None else counts.ravel()[order].reshape(bins, -1)
    parts = parts - parts.mean(axis=1, keepdims=True, where=counted)
    parts = parts / (parts.std(axis=1, keepdims=True, where=counted) + 1e-8)
    parts = parts if counted is None else jnp.where(counted, parts, 0.0)
    return jnp.zeros(advantage.size).at[order].set(parts.ravel(), unique_indices=True).reshape(advantage.shape)


def minibatch_gradient(
    params: Params, apply: Apply, batch: Batch, hp: Hyperparameters, coef: Coefficients = PPO_ALONE
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient and metrics of one minibatch, computed microbatch by microbatch."""
    if hp.normalize_advantage:
        own = None if batch.own is None else _beside(batch.own, batch.advantage)
        batch = batch._replace(advantage=whitened(batch.advantage, batch.value, hp.advantage_bins, own))
    if batch.own is not None:  # a mean over all samples, so weighted, is one over those that are the policy's own
        own = batch.own.astype(jnp.float32)
        batch = batch._replace(own=own / jnp.maximum(own.mean(), 1e-6))
    gradient = jax.grad(loss, has_aux=True)
    size, micro = batch.action.shape[0], hp.microbatch_size
    if micro is None or micro >= size:
        return gradient(params, apply, batch, hp, coef)
    parts = jax.tree.map(lambda x: x.reshape(size // micro, micro, *x.shape[1:]), batch)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, apply, part, hp, coef)), None

    shapes = jax.eval_shape(lambda: gradient(params, apply, jax.tree.map(lambda x: x[0], parts), hp, coef))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x * (micro / size), total)


def update(
    params: Params,
    opt_state: optax.OptState,
    batch: Batch,
    key: jax.Array,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    hp: Hyperparameters,
    coef: Coefficients = PPO_ALONE,
) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
    """`hp.n_epochs` passes over a rollout [T, N, ...] in minibatches shuffled over T x N.

    `batch_size` must divide T x N, `microbatch_size` must divide `batch_size` (`config.Config` checks both).

    Returns:
        Parameters, optimizer state, and metrics averaged over the minibatches that were used. A minibatch whose gradient is not
        finite is skipped and counted (`skipped_minibatches`).
    """
    t, n = batch.action.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(t * n, *x.shape[2:]), batch)

    def minibatch_step(carry: Any, indices: jax.Array) -> tuple[Any, Any]:
        params, opt_state, stopped = carry
        # Gathered here rather than shuffled at once: a second copy of all pixels would double the memory.
        minibatch = jax.tree.map(lambda x: x[indices], flat)
        gradient, metrics = minibatch_gradient(params, apply, minibatch, hp, coef)
        if hp.target_kl is not None:
            stopped = stopped | (metrics["approx_kl"] > 1.5 * hp.target_kl)
        updates, new_opt_state = optimizer.update(gradient, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        broken = ~jnp.isfinite(metrics["grad_norm"])
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(stopped | broken, a, b), (params, opt_state), new)
        return (params, opt_state, stopped), (metrics, ~(stopped | broken), broken & ~stopped)

    orders = jax.vmap(lambda key: jax.random.permutation(key, t * n))(jax.random.split(key, hp.n_epochs))
    indices = orders.reshape(-1, hp.batch_size)
    carry = (params, opt_state, jnp.zeros((), bool))
    (params, opt_state, _), (metrics, used, broken) = jax.lax.scan(minibatch_step, carry, indices)
    count = jnp.where(used.any(), used.sum(), jnp.nan)  # of nothing there is no mean
    metrics = {name: jnp.where(used, x, 0.0).sum() / count for name, x in metrics.items()}
    metrics["update_share"] = used.mean()
    metrics["skipped_minibatches"] = broken.sum()
    metrics["explained_variance"] = explained_variance(batch.value, batch.target_value)
    return params, opt_state, metrics
