"""PPO against numbers worked out by hand; the arithmetic stands beside them.

What takes `jit` runs twice: compiled, and operation by operation.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aloha_jax import ppo
from aloha_jax.networks import ActorCritic, Gaussian
from aloha_jax.ppo import Batch, Coefficients, Hyperparameters, Transition

LOG_SQRT_2PI = 0.9189385  # minus the log density of a standard normal at 0


@pytest.fixture(params=["jitted", "eager"])
def jit(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """`jax.jit`, then nothing in its place and every operation on its own."""
    if request.param == "jitted":
        yield jax.jit
    else:
        with jax.disable_jit():
            yield lambda function: function


# --- Advantages ----------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """One world, five steps, and the advantages at gamma = lambda = 1/2; `next_value` is V where a step led, before a reset."""

    next_value: list[float]
    terminated: list[int]
    truncated: list[int]
    advantage: list[float]


REWARD = [1.0, 2.0, 3.0, 4.0, 5.0]
VALUE = [2.0, 4.0, 8.0, 4.0, 2.0]  # and 6 for the observation after the last step

# delta_t = reward + 1/2 next_value - value, without the middle term where terminated; advantage_t = delta_t + 1/4 advantage_t+1,
# without the latter where an episode ends.
ROLLOUTS = {
    # delta = 1+2-2, 2+4-4, 3+2-8, 4+1-4, 5+3-2 = 1, 2, -3, 1, 6
    # advantage, from the last: 6; 1 + 6/4 = 2.5; -3 + 2.5/4 = -2.375; 2 - 2.375/4 = 1.40625; 1 + 1.40625/4 = 1.3515625
    "endless": Rollout([4, 8, 4, 2, 6], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1.3515625, 1.40625, -2.375, 2.5, 6]),
    # delta_1 = 2 - 4 = -2 and nothing after it: 6; 2.5; -2.375; -2; 1 - 2/4 = 0.5
    "terminated": Rollout([4, 8, 4, 2, 6], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0.5, -2, -2.375, 2.5, 6]),
    # The final observation is worth 10: delta_1 = 2+5-4 = 3 and nothing after it: 6; 2.5; -2.375; 3; 1 + 3/4 = 1.75
    "truncated": Rollout([4, 10, 4, 2, 6], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1.75, 3, -2.375, 2.5, 6]),
    # Terminated at 1, truncated at 3 where V is 12: delta_3 = 4+6-4 = 6: 6; 6; -3 + 6/4 = -1.5; -2; 0.5
    "both": Rollout([4, 8, 4, 12, 6], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0.5, -2, -1.5, 6, 6]),
    # Terminated on the last step: what follows is worth nothing. delta_4 = 5 - 2 = 3: 3; 1 + 3/4 = 1.75; -3 + 1.75/4 = -2.5625;
    # 2 - 2.5625/4 = 1.359375; 1 + 1.359375/4 = 1.33984375
    "terminated last": Rollout([4, 8, 4, 2, 6], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1.33984375, 1.359375, -2.5625, 1.75, 3]),
    # Truncated on the last step, where V is 4: delta_4 = 5+2-2 = 5: 5; 1 + 5/4 = 2.25; -3 + 2.25/4 = -2.4375;
    # 2 - 2.4375/4 = 1.390625; 1 + 1.390625/4 = 1.34765625
    "truncated last": Rollout([4, 8, 4, 2, 4], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1.34765625, 1.390625, -2.4375, 2.25, 5]),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_gae_by_hand(jit: Callable, name: str) -> None:
    rollout = ROLLOUTS[name]
    advantage = jit(ppo.gae)(
        jnp.array(REWARD),
        jnp.array(VALUE),
        jnp.array(rollout.next_value, float),
        jnp.array(rollout.terminated, bool),
        jnp.array(rollout.truncated, bool),
        0.5,
        0.5,
    )
    np.testing.assert_allclose(advantage, rollout.advantage, rtol=1e-6)


def test_termination_wins_over_truncation_in_the_same_step(jit: Callable) -> None:
    args = (jnp.array([1.0]), jnp.array([2.0]), jnp.array([100.0]), jnp.array([True]), jnp.array([True]))
    np.testing.assert_allclose(jit(ppo.gae)(*args, 0.5, 0.5), [1 - 2])


def transitions(rollouts: list[Rollout], reward, value) -> Transition:
    """Worlds side by side, [T, N]; the value after a truncation is in `final_value`, everywhere else that holds nonsense."""
    t, n = len(REWARD), len(rollouts)
    terminated = jnp.array([r.terminated for r in rollouts], bool).T
    truncated = jnp.array([r.truncated for r in rollouts], bool).T
    final_value = jnp.where(truncated, jnp.array([r.next_value for r in rollouts], float).T, 1e6)
    if value.ndim == 3:
        final_value = jnp.stack([final_value, jnp.where(truncated, 8.0, 1e6)], axis=2)
    nothing = jnp.zeros((t, n))
    return Transition({}, nothing[..., None], nothing, value, final_value, reward, terminated, truncated)


def test_a_batch_of_worlds_takes_the_final_value_only_where_truncated(jit: Callable) -> None:
    rollouts = list(ROLLOUTS.values())
    reward, value = (jnp.tile(jnp.array(x)[:, None], (1, len(rollouts))) for x in (REWARD, VALUE))
    last_value = jnp.full(len(rollouts), 6.0)
    batch = jit(ppo.make_batch)(transitions(rollouts, reward, value), last_value, 0.5, 0.5)
    expected = np.array([r.advantage for r in rollouts]).T
    np.testing.assert_allclose(batch.advantage, expected, rtol=1e-6)
    np.testing.assert_allclose(batch.target_value, expected + np.array(VALUE)[:, None], rtol=1e-6)


def test_agents_share_the_ends_of_episodes_and_nothing_else(jit: Callable) -> None:
    """The second agent is never rewarded and values everything at 0, except 8 for a final observation."""
    rollouts = [ROLLOUTS[name] for name in ("endless", "terminated", "truncated")]
    reward, value = (jnp.zeros((5, 3, 2)).at[:, :, 0].set(jnp.array(x)[:, None]) for x in (REWARD, VALUE))
    last_value = jnp.tile(jnp.array([[6.0, 0.0]]), (3, 1))
    batch = jit(ppo.make_batch)(transitions(rollouts, reward, value), last_value, 0.5, 0.5)
    np.testing.assert_allclose(batch.advantage[..., 0], np.array([r.advantage for r in rollouts]).T, rtol=1e-6)
    # Truncated at 1: delta_1 = 0 + 8/2 - 0 = 4, advantage_0 = 4/4.
    second = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 4, 0, 0, 0]]).T
    np.testing.assert_allclose(batch.advantage[..., 1], second, rtol=1e-6)


def test_lambda_0_is_one_step_and_lambda_1_the_whole_return(jit: Callable) -> None:
    """Without ends, T=3: reward 1, 2, 3, value 2, 4, 8 and 4 after it, gamma 1/2."""
    never = jnp.zeros(3, bool)
    args = (jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 4.0, 8.0]), jnp.array([4.0, 8.0, 4.0]), never, never, 0.5)
    # 1+2-2, 2+4-4, 3+2-8
    np.testing.assert_allclose(jit(ppo.gae)(*args, 0.0), [1, 2, -3])
    # returns 3 + 4/2 = 5, 2 + 5/2 = 4.5, 1 + 4.5/2 = 3.25; less the values
    np.testing.assert_allclose(jit(ppo.gae)(*args, 1.0), [3.25 - 2, 4.5 - 4, 5 - 8])


# --- The loss ------------------------------------------------------------------------------------------------------------------


def table(params, inputs) -> tuple[Gaussian, jax.Array]:
    """A network that looks everything up: its parameters are the mean, log standard deviation and value of each sample."""
    return Gaussian(params["mean"], params["log_std"]), params["value"]


# Probability ratio, advantage A, min(ratio A, clip(ratio, 0.8, 1.2) A), and its slope by the log ratio: ratio A, or 0 if clipped.
OBJECTIVES = [
    (1.1, 2.0, 2.2, 2.2),
    (1.1, -2.0, -2.2, -2.2),
    (1.5, 2.0, 2.4, 0.0),  # better already than the clip rewards
    (1.5, -2.0, -3.0, -3.0),
    (0.5, 2.0, 1.0, 1.0),
    (0.5, -2.0, -1.6, 0.0),
]


def lookup_batch(ratio: list[float], advantage: list[float]) -> tuple[dict[str, jax.Array], Batch]:
    """Parameters of `table` (standard normals, value 0) and samples with action 1 and the given probability ratios."""
    size = len(ratio)
    params = {"mean": jnp.zeros((size, 1)), "log_std": jnp.zeros((size, 1)), "value": jnp.zeros(size)}
    log_prob = -LOG_SQRT_2PI - 0.5 - jnp.log(jnp.array(ratio))  # log N(1; 0, 1) less log ratio
    batch = Batch({}, jnp.ones((size, 1)), log_prob, jnp.zeros(size), jnp.array(advantage), jnp.zeros(size))
    return params, batch


@pytest.mark.parametrize(("ratio", "advantage", "objective", "slope"), OBJECTIVES)
def test_clipped_objective_by_hand(jit: Callable, ratio: float, advantage: float, objective: float, slope: float) -> None:
    params, batch = lookup_batch([ratio], [advantage])
    hp = Hyperparameters(clip_range=0.2, vf_coef=0.0)
    loss = jit(lambda params: ppo.loss(params, table, batch, hp))
    gradient, metrics = jax.grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(metrics["policy_loss"], -objective, rtol=1e-5)
    # By the mean, d log N(a; mean, 1) = a - mean = 1; by log_std, (a - mean)^2 - 1 = 0.
    np.testing.assert_allclose(gradient["mean"], [[-slope]], rtol=1e-5)
    np.testing.assert_allclose(gradient["log_std"], [[0.0]], atol=1e-6)


def test_the_loss_is_a_mean_and_so_are_its_diagnostics(jit: Callable) -> None:
    ratio, advantage, _, slope = zip(*OBJECTIVES, strict=True)
    params, batch = lookup_batch(list(ratio), list(advantage))
    hp = Hyperparameters(clip_range=0.2, vf_coef=0.0)
    gradient, metrics = jit(lambda params: jax.grad(ppo.loss, has_aux=True)(params, table, batch, hp))(params)
    np.testing.assert_allclose(metrics["policy_loss"], 1.2 / 6, rtol=1e-5)  # -(2.2 - 2.2 + 2.4 - 3 + 1 - 1.6) / 6
    np.testing.assert_allclose(gradient["mean"][:, 0], -np.array(slope) / 6, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], 4 / 6, rtol=1e-6)  # 1.5 and 0.5, twice each
    # ratio - 1 - log ratio: 0.1 - 0.0953102 = 0.0046898, 0.5 - 0.4054651 = 0.0945349, -0.5 + 0.6931472 = 0.1931472
    np.testing.assert_allclose(metrics["approx_kl"], (0.0046898 + 0.0945349 + 0.1931472) / 3, rtol=1e-5)


def test_imitation_by_hand(jit: Callable) -> None:
    params, batch = lookup_batch([1.0, 1.0], [0.0, 0.0])
    batch = batch._replace(own=jnp.array([True, True]), teacher_action=jnp.array([[3.0], [-1.0]]))
    gradients = jit(lambda params, coef: jax.grad(ppo.loss, has_aux=True)(params, table, batch, Hyperparameters(), coef))
    gradient, metrics = gradients(params, Coefficients(ppo=0.0, distill=0.5))
    np.testing.assert_allclose(metrics["distill_loss"], (4.5 + 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient["mean"], [[0.5 * -3 / 2], [0.5 * 1 / 2]], rtol=1e-6)
    np.testing.assert_array_equal(gradient["log_std"], 0.0)
    np.testing.assert_array_equal(gradients(params, Coefficients(ppo=0.0, distill=0.0))[0]["mean"], 0.0)


def test_predicting_the_state_adds_its_error_by_its_weight(jit: Callable) -> None:
    params, batch = lookup_batch([1.1, 1.1], [2.0, 2.0])

    def with_error(params: Any, inputs: Any) -> Any:
        return *table(params, inputs), params["error"]

    params["error"] = jnp.array([3.0, 5.0])
    hp = Hyperparameters(vf_coef=0.0)
    gradient, metrics = jit(
        lambda params: jax.grad(ppo.loss, has_aux=True)(params, with_error, batch, hp, Coefficients(state=0.5))
    )(params)
    np.testing.assert_allclose(metrics["state_loss"], 4.0, rtol=1e-6)
    np.testing.assert_allclose(gradient["error"], [0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(gradient["mean"], [[-1.1], [-1.1]], rtol=1e-5)


def test_the_two_objectives_add_up_by_their_weights(jit: Callable) -> None:
    params, batch = lookup_batch([1.1], [2.0])
    batch = batch._replace(teacher_action=jnp.array([[3.0]]))
    gradient = jit(
        lambda params: jax.grad(ppo.loss, has_aux=True)(params, table, batch, Hyperparameters(), Coefficients(0.25, 0.5))[0]
    )(params)
    np.testing.assert_allclose(gradient["mean"], [[0.25 * -2.2 + 0.5 * -3]], rtol=1e-5)


def test_what_the_teacher_did_is_no_evidence_for_ppo(jit: Callable) -> None:
    """Two samples of which one is the policy's own: objective and diagnostics are those of that one alone."""
    params, batch = lookup_batch([1.1, 0.9], [2.0, 2.0])
    batch = batch._replace(own=jnp.array([True, False]))
    hp = Hyperparameters(normalize_advantage=False)
    gradient, metrics = jit(lambda params: ppo.minibatch_gradient(params, table, batch, hp))(params)
    np.testing.assert_allclose(gradient["mean"], [[-2.2], [0.0]], rtol=1e-5)
    np.testing.assert_allclose(metrics["policy_loss"], -2.2, rtol=1e-5)
    np.testing.assert_allclose(metrics["approx_kl"], 0.0046898, rtol=1e-4)
    np.testing.assert_allclose(metrics["clip_fraction"], 0.0)


@pytest.mark.parametrize(
    ("clip_range_vf", "new", "value_loss", "slope"),
    [
        (None, 5.0, 4.0, 4.0),  # (5 - 3)^2, 2 (5 - 3)
        (0.5, 4.25, 1.5625, 2.5),  # moved by 0.25 from 4: (4.25 - 3)^2, 2 (4.25 - 3)
        (0.5, 5.0, 2.25, 0.0),  # moved too far: (4.5 - 3)^2
        (0.5, 2.0, 0.25, 0.0),  # (3.5 - 3)^2
    ],
)
def test_value_loss_by_hand(jit: Callable, clip_range_vf: float | None, new: float, value_loss: float, slope: float) -> None:
    """The value was 4 and should be 3."""
    params, batch = lookup_batch([1.0], [0.0])
    params["value"], batch = jnp.array([new]), batch._replace(value=jnp.array([4.0]), target_value=jnp.array([3.0]))
    hp = Hyperparameters(clip_range_vf=clip_range_vf, vf_coef=0.25)
    gradient, metrics = jit(lambda params: jax.grad(ppo.loss, has_aux=True)(params, table, batch, hp))(params)
    np.testing.assert_allclose(metrics["value_loss"], value_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient["value"], [0.25 * slope], rtol=1e-6)


def test_entropy_bonus_by_hand(jit: Callable) -> None:
    """Two actions of standard deviation 1 and e: 2 (1/2 log 2 pi e) + 1."""
    params, batch = lookup_batch([1.0], [0.0])
    params = {**params, "mean": jnp.zeros((1, 2)), "log_std": jnp.array([[0.0, 1.0]])}
    batch = batch._replace(action=jnp.zeros((1, 2)), log_prob=jnp.array([-2 * LOG_SQRT_2PI - 1.0]))
    hp = Hyperparameters(ent_coef=0.5)
    gradients = jit(lambda params, coef: jax.grad(ppo.loss, has_aux=True)(params, table, batch, hp, coef))
    gradient, metrics = gradients(params, Coefficients())
    np.testing.assert_allclose(metrics["entropy_loss"], -(math.log(2 * math.pi * math.e) + 1), rtol=1e-6)
    np.testing.assert_allclose(gradient["log_std"], [[-0.5, -0.5]], rtol=1e-6)
    imitation = gradients(params, Coefficients(ppo=0.0))[0]  # in which nothing would hold exploration back
    np.testing.assert_array_equal(imitation["log_std"], 0.0)


def test_the_total_weighs_its_terms(jit: Callable) -> None:
    """Policy -(1.1 x 2), value (0 - 3)^2 x 0.25, entropy -1.4189385 x 0.1."""
    params, batch = lookup_batch([1.1], [2.0])
    hp = Hyperparameters(vf_coef=0.25, ent_coef=0.1)
    total, _ = jit(lambda params: ppo.loss(params, table, batch._replace(target_value=jnp.array([3.0])), hp))(params)
    np.testing.assert_allclose(total, -2.2 + 2.25 - 0.14189385, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1.0, 2.0, 3.0], 1.0),
        ([2.0, 2.0, 2.0], 0.0),
        ([3.0, 2.0, 1.0], -3.0),  # residuals -2, 0, 2: 1 - (8/3) / (2/3)
        ([11.0, 12.0, 13.0], 1.0),  # blind to an offset
    ],
)
def test_explained_variance_by_hand(value: list[float], expected: float) -> None:
    got = jax.jit(ppo.explained_variance)(jnp.array(value), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(got, expected, atol=1e-6)


# --- Minibatches -------------------------------------------------------------------------------------------------------------


def test_advantages_are_whitened_per_minibatch() -> None:
    """1 and 3 become -1 and 1; at ratio 1 the gradient by each mean is -advantage / 2."""
    params, batch = lookup_batch([1.0, 1.0], [1.0, 3.0])
    gradient, _ = jax.jit(lambda params: ppo.minibatch_gradient(params, table, batch, Hyperparameters(vf_coef=0.0)))(params)
    np.testing.assert_allclose(gradient["mean"], [[0.5], [-0.5]], rtol=1e-4)
    raw = Hyperparameters(vf_coef=0.0, normalize_advantage=False)
    gradient, _ = jax.jit(lambda params: ppo.minibatch_gradient(params, table, batch, raw))(params)
    np.testing.assert_allclose(gradient["mean"], [[-0.5], [-1.5]], rtol=1e-5)


def test_advantages_are_whitened_among_samples_of_like_value() -> None:
    """Low values have advantages 1 and 3, high ones 100 and 500: -1 and 1 of each, in whatever order they come."""
    value, advantage = jnp.array([[9.0, 1.0], [2.0, 8.0]]), jnp.array([[500.0, 1.0], [3.0, 100.0]])
    np.testing.assert_allclose(ppo.whitened(advantage, value, bins=2), [[1.0, -1.0], [1.0, -1.0]], rtol=1e-5)
    together = ppo.whitened(advantage, value)
    np.testing.assert_allclose(together, (advantage - 151.0) / np.std(advantage), rtol=1e-5)


@pytest.mark.parametrize("bins", [1, 2])
def test_only_what_the_policy_did_itself_is_whitened(bins: int) -> None:
    """Per arm; what the teacher did, with advantages of a hundred, neither shifts nor scales the rest."""
    advantage = jnp.array([[1.0, 5.0], [100.0, 100.0], [3.0, 9.0], [100.0, 100.0]])
    value = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    own = jnp.array([[True], [False], [True], [False]])
    expected = ppo.whitened(advantage[::2], value[::2], bins)
    np.testing.assert_allclose(ppo.whitened(advantage, value, bins, own)[::2], expected, rtol=1e-5)
    np.testing.assert_array_equal(ppo.whitened(advantage, value, bins, own)[1::2], 0.0)
    np.testing.assert_array_equal(ppo.whitened(advantage, value, bins, jnp.zeros_like(own)), 0.0)


def test_a_minibatch_is_whitened_in_as_many_bins_as_asked_for() -> None:
    params, batch = lookup_batch([1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 100.0, 500.0])
    batch = batch._replace(value=jnp.arange(4.0))
    hp = Hyperparameters(vf_coef=0.0, advantage_bins=2)
    gradient, _ = jax.jit(lambda params: ppo.minibatch_gradient(params, table, batch, hp))(params)
    np.testing.assert_allclose(gradient["mean"], [[0.25], [-0.25], [0.25], [-0.25]], rtol=1e-4)


def random_rollout(t: int, n: int, network: ActorCritic) -> tuple[Any, Batch]:
    """Parameters, and a batch [T, N] that was sampled from others, so that some ratios are clipped."""
    rng = np.random.default_rng(0)
    inputs = {"state": jnp.asarray(rng.normal(size=(t, n, 3)), jnp.float32)}
    params = network.init(jax.random.key(0), jax.tree.map(lambda x: x[0], inputs))
    action = jnp.asarray(rng.normal(size=(t, n, network.action_size)), jnp.float32)
    log_prob, value, advantage, target = jnp.asarray(rng.normal(size=(4, t, n)), jnp.float32)
    log_prob = log_prob - (LOG_SQRT_2PI + 0.5) * network.action_size
    return params, Batch(inputs, action, log_prob, value, advantage, target)


@pytest.mark.parametrize("own", [None, [True, False, False] * 3 + [True] * 3], ids=["alone", "with a teacher"])
@pytest.mark.parametrize("microbatch_size", [1, 4, 12])
def test_microbatches_add_up_to_the_minibatch(microbatch_size: int, own: list[bool] | None) -> None:
    network = ActorCritic(hidden_sizes=(8,), action_size=2)
    params, batch = random_rollout(3, 4, network)
    batch = jax.tree.map(lambda x: x.reshape(12, *x.shape[2:]), batch)
    batch = batch._replace(own=None if own is None else jnp.array(own))

    def gradient(microbatch_size):
        hp = Hyperparameters(microbatch_size=microbatch_size, ent_coef=0.01, clip_range_vf=0.5)
        return jax.jit(lambda params: ppo.minibatch_gradient(params, network.apply, batch, hp))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient(microbatch_size), gradient(None))


# --- The update ----------------------------------------------------------------------------------------------------------------


def recorder(num_minibatches: int) -> optax.GradientTransformation:
    """An optimizer that moves nothing and keeps every gradient, leaf by leaf [minibatch, ...]."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.zeros((num_minibatches, *x.shape)), params)

    def update(gradient, state, params=None):
        step, record = state
        record = jax.tree.map(lambda kept, x: kept.at[step].set(x), record, gradient)
        return jax.tree.map(jnp.zeros_like, gradient), (step + 1, record)

    return optax.GradientTransformation(init, update)


def test_every_sample_is_used_once_per_epoch_in_a_new_order() -> None:
    """Sample i has a value of its own, w_i = 0: a minibatch of 4 with i in it has the gradient -target_i / 4, any other 0."""
    t, n, epochs, batch_size = 3, 4, 2, 4
    index, target = jnp.arange(t * n).reshape(t, n), 1.0 + jnp.arange(t * n, dtype=float).reshape(t, n)
    nothing = jnp.zeros((t, n))
    batch = Batch({"index": index}, nothing[..., None], nothing - LOG_SQRT_2PI, nothing, nothing, target)

    def apply(params, inputs):
        i = inputs["index"]
        return Gaussian(jnp.zeros((*i.shape, 1)), jnp.zeros((*i.shape, 1))), params[i]

    params = jnp.zeros(t * n)
    optimizer = recorder(epochs * t * n // batch_size)
    hp = Hyperparameters(n_epochs=epochs, batch_size=batch_size, vf_coef=0.5)
    update = jax.jit(lambda params, state, key: ppo.update(params, state, batch, key, apply, optimizer, hp))
    _, (_, gradients), metrics = update(params, optimizer.init(params), jax.random.key(0))

    gradients = np.asarray(gradients).reshape(epochs, t * n // batch_size, t * n)
    assert ((gradients != 0).sum(axis=2) == batch_size).all()
    assert ((gradients != 0).sum(axis=1) == 1).all()
    np.testing.assert_allclose(gradients.sum(axis=1), np.broadcast_to(-np.ravel(target) / batch_size, (epochs, t * n)), rtol=1e-6)
    assert (gradients[0] != gradients[1]).any()
    np.testing.assert_allclose(metrics["value_loss"], (np.arange(1, 13) ** 2).mean(), rtol=1e-6)
    assert metrics["update_share"] == 1


def shared_mean(params, inputs) -> tuple[Gaussian, jax.Array]:
    """A network whose only parameter is the mean; standard deviation 1, value 0."""
    size = inputs["state"].shape[0]
    return Gaussian(jnp.broadcast_to(params, (size, 1)), jnp.zeros((size, 1))), jnp.zeros(size)


def update_shared_mean(jit: Callable, log_prob: list[float], hp: Hyperparameters):
    """`ppo.update` by SGD 0.5 from mean 0, one step of worlds with action 1 and advantage 1: the mean after it, and metrics."""
    ones = jnp.ones((1, len(log_prob)))
    batch = Batch({"state": ones[..., None]}, ones[..., None], jnp.array([log_prob]), 0 * ones, ones, 0 * ones)
    hp = hp._replace(batch_size=1, clip_range=10.0, normalize_advantage=False)
    sgd = optax.sgd(0.5)
    update = jit(lambda params, state, key: ppo.update(params, state, batch, key, shared_mean, sgd, hp))
    mean, _, metrics = update(jnp.zeros(()), sgd.init(jnp.zeros(())), jax.random.key(0))
    return mean, metrics


@pytest.mark.parametrize(("target_kl", "share", "mean"), [(None, 1, 0.8637479), (0.06, 1, 0.8637479), (0.05, 0.5, 0.5)])
def test_the_update_stops_beyond_1_5_times_the_target_kl(
    jit: Callable, target_kl: float | None, share: float, mean: float
) -> None:
    """One sample, used twice. The objective is its ratio, whose slope by the mean is ratio (action - mean).

    First 1 x 1: a step of 0.5 leads to 0.5. There the log ratio is 1/2 - 0.5^2 / 2 = 0.375 and the divergence
    e^0.375 - 1 - 0.375 = 0.0799914: below 1.5 x 0.06 = 0.09, above 1.5 x 0.05 = 0.075. The second slope is
    e^0.375 x 0.5 = 0.7274957, and half of it leads to 0.8637479.
    """
    got, metrics = update_shared_mean(jit, [-LOG_SQRT_2PI - 0.5], Hyperparameters(n_epochs=2, target_kl=target_kl))
    np.testing.assert_allclose(got, mean, rtol=1e-5)
    assert metrics["update_share"] == share
    np.testing.assert_allclose(metrics["approx_kl"], 0.0 if share < 1 else 0.0799914 / 2, rtol=1e-4, atol=1e-7)


def test_once_stopped_an_update_stays_stopped() -> None:
    """Of two samples, used one by one in 4 epochs, one is far off policy (log ratio 3): at most the other comes before it."""
    near, far = -LOG_SQRT_2PI - 0.5, -LOG_SQRT_2PI - 3.5
    mean, metrics = update_shared_mean(jax.jit, [near, far], Hyperparameters(n_epochs=4, target_kl=0.5))
    assert metrics["update_share"] <= 1 / 8
    np.testing.assert_allclose(mean, 0.5 * 8 * metrics["update_share"])


@pytest.mark.parametrize("target_kl", [None, 10.0])
def test_a_minibatch_whose_gradient_is_not_finite_is_skipped_and_counted(jit: Callable, target_kl: float | None) -> None:
    """Two samples, used one by one; one has no log-probability. The other makes the first step of the test above: to 0.5."""
    good = -LOG_SQRT_2PI - 0.5
    mean, metrics = update_shared_mean(jit, [good, math.nan], Hyperparameters(n_epochs=1, target_kl=target_kl))
    np.testing.assert_allclose(mean, 0.5)
    assert (metrics["skipped_minibatches"], metrics["update_share"]) == (1, 0.5)
    np.testing.assert_allclose(metrics["grad_norm"], 1.0, rtol=1e-5)  # the mean over those that were used
    mean, metrics = update_shared_mean(jit, [math.nan, -math.inf], Hyperparameters(n_epochs=1, target_kl=target_kl))
    assert mean == 0
    assert metrics["skipped_minibatches"] == 2
    assert np.isnan(metrics["approx_kl"])  # nothing was measured: an adaptive learning rate stays what it is
