"""Networks against arithmetic, SciPy and NumPy."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]

from aloha_jax import networks
from aloha_jax.networks import (
    ActorCritic,
    Gaussian,
    MirroredActorCritic,
    RunningStats,
    as_inputs,
    normalize_inputs,
    num_parameters,
)
from aloha_jax.policy import example_inputs, make_network
from aloha_jax.presets import PRESETS

SQRT_2 = math.sqrt(2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- Modules -----------------------------------------------------------------------------------------------------------------


def test_the_guides_network_has_the_guides_size() -> None:
    config = PRESETS["guide"]
    params = jax.eval_shape(make_network(config).init, jax.random.key(0), example_inputs(config))["params"]

    # Without padding a side of n shrinks to (n - kernel) // stride + 1:
    # 480 -> (480-8)//4+1 = 119 -> (119-4)//2+1 = 58 -> (58-3)//1+1 = 56
    # 640 -> (640-8)//4+1 = 159 -> (159-4)//2+1 = 78 -> (78-3)//1+1 = 76
    first_dense = params["encoder"]["Dense_0"]
    assert first_dense["kernel"].shape == (56 * 76 * 64, 512)  # 272 384 features of the last convolution
    assert num_parameters(first_dense) == 272_384 * 512 + 512 == 139_461_120

    convolutions = (8 * 8 * 3 + 1) * 32 + (4 * 4 * 32 + 1) * 64 + (3 * 3 * 64 + 1) * 64
    assert num_parameters(params["encoder"]) == convolutions + 139_461_120
    hidden = (512 + 1) * 256 + (256 + 1) * 256
    assert num_parameters(params["policy_head"]) == hidden + (256 + 1) * 14
    assert num_parameters(params["value_head"]) == hidden + (256 + 1) * 1
    assert params["log_std"].shape == (14,)
    total = 6_176 + 32_832 + 36_928 + 139_461_120 + 2 * 197_120 + 3_598 + 257 + 14
    assert num_parameters(params) == total == 139_935_165


SMALL = ActorCritic(conv=((4, 4, 2), (8, 3, 1)), features_dim=16, hidden_sizes=(16, 12), log_std_init=-0.5)


def apply(network: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    """`network.apply`, compiled."""
    return compiled(network, method)(params, *args)


@functools.cache
def compiled(network: nn.Module, method: str | None) -> Any:
    return jax.jit(functools.partial(network.apply, method=method))


@functools.cache
def initial(network: ActorCritic) -> Any:
    """Its first parameters."""
    shapes = {"pixels": (1, 12, 14, 3), "agent_pos": (1, 14), "privileged": (1, 20)}
    inputs = {name: jnp.zeros(shape, jnp.uint8 if name == "pixels" else jnp.float32) for name, shape in shapes.items()}
    return jax.jit(network.init)(jax.random.key(0), inputs)


@pytest.fixture
def inputs(rng: np.random.Generator) -> dict[str, jax.Array]:
    """Three observations; `privileged` is there to be used or ignored."""
    pixels = rng.integers(0, 256, (3, 12, 14, 3), dtype=np.uint8)
    agent_pos, privileged = rng.normal(size=(3, 14)), rng.normal(size=(3, 20))
    return {name: jnp.asarray(x) for name, x in (("pixels", pixels), ("agent_pos", agent_pos), ("privileged", privileged))}


def gain(kernel: jax.Array) -> float:
    """The gain of an orthogonal kernel [..., inputs, outputs], whose columns or rows are orthogonal and of that length."""
    matrix = np.asarray(kernel).reshape(-1, kernel.shape[-1])
    matrix = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    gram = matrix.T @ matrix
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(len(gram)), atol=1e-5)
    return math.sqrt(gram[0, 0])


def test_initial_weights_are_orthogonal_and_the_first_actions_and_values_small() -> None:
    params = initial(SMALL)["params"]
    encoder, policy, value = params["encoder"], params["policy_head"], params["value_head"]
    inside = [encoder["Conv_0"], encoder["Conv_1"], encoder["Dense_0"]]
    inside += [head[layer] for head in (policy, value) for layer in ("Dense_0", "Dense_1")]
    for layer in inside:
        assert gain(layer["kernel"]) == pytest.approx(SQRT_2, rel=1e-5)
    assert gain(policy["Dense_2"]["kernel"]) == pytest.approx(0.01, rel=1e-4)
    assert gain(value["Dense_2"]["kernel"]) == pytest.approx(0.01, rel=1e-4)
    for layer in [*inside, policy["Dense_2"], value["Dense_2"]]:
        assert (layer["bias"] == 0).all()
    assert (params["log_std"] == -0.5).all()


def test_shapes_and_that_the_parts_agree_with_the_whole(inputs: dict[str, jax.Array]) -> None:
    params = initial(SMALL)
    distribution, value = apply(SMALL, params, inputs)
    assert distribution.mean.shape == distribution.log_std.shape == (3, 14)
    assert value.shape == (3,)
    alone = apply(SMALL, params, inputs, method="policy"), apply(SMALL, params, inputs, method="value")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), alone, (distribution, value))


@pytest.mark.parametrize(
    ("height", "width", "kernel_size", "stride"),
    [(7, 9, 3, 1), (12, 12, 4, 2), (13, 11, 4, 2), (21, 18, 8, 4), (11, 12, 3, 2), (3, 3, 3, 1), (9, 9, 1, 4), (8, 12, 4, 4)],
)
@pytest.mark.parametrize("conv", [networks.conv_by_slices, networks.conv_on_cpu])
def test_convolution_is_scipys(
    rng: np.random.Generator, conv: Callable, height: int, width: int, kernel_size: int, stride: int
) -> None:
    """Strides that divide the kernel and others, sides that leave a rest; the gradient is XLA's."""
    images, filters = rng.normal(size=(4, height, width, 3)), rng.normal(size=(kernel_size, kernel_size, 3, 5))
    dense = [[scipy.signal.correlate(image, filters[..., i], "valid")[..., 0] for i in range(5)] for image in images]
    expected = np.moveaxis(np.array(dense), 1, -1)[:, ::stride, ::stride]
    x, kernel = jnp.asarray(images, jnp.float32), jnp.asarray(filters, jnp.float32)
    np.testing.assert_allclose(jax.jit(conv, static_argnums=2)(x, kernel, stride), expected, rtol=1e-4, atol=1e-4)
    weights = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)

    def gradient(conv):
        return jax.jit(jax.grad(lambda x, kernel: (weights * conv(x, kernel, stride)).sum(), argnums=(0, 1)))(x, kernel)

    ours, theirs = gradient(conv), gradient(networks.conv_by_xla)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_pixels_are_scaled_to_one() -> None:
    """A white picture is all ones: a convolution gives the sum of its kernel everywhere, of 5 x 6 places here."""
    encoder = networks.PixelEncoder(conv=((4, 4, 2),), features_dim=8)
    white = jnp.full((1, 12, 14, 3), 255, jnp.uint8)
    params = encoder.init(jax.random.key(0), white)
    kernel, dense = (np.asarray(params["params"][layer]["kernel"]) for layer in ("Conv_0", "Dense_0"))
    features = np.tile(np.maximum(kernel.sum(axis=(0, 1, 2)), 0), 5 * 6)
    np.testing.assert_allclose(apply(encoder, params, white), np.maximum(features @ dense, 0)[None], rtol=1e-4, atol=1e-5)


def value_and_gradient(network: ActorCritic, inputs: dict[str, jax.Array], params) -> tuple[jax.Array, dict]:
    gradient = jax.jit(jax.grad(lambda params: apply(network, params, inputs)[1].sum()))(params)
    return apply(network, params, inputs)[1], gradient["params"]


def test_both_heads_share_the_encoder(inputs: dict[str, jax.Array]) -> None:
    params = initial(SMALL)
    dark = {**inputs, "pixels": inputs["pixels"] // 4}
    value, gradient = value_and_gradient(SMALL, inputs, params)
    assert (value != apply(SMALL, params, dark)[1]).all()
    assert all((x != 0).any() for x in jax.tree.leaves(gradient["encoder"]))
    assert all((x == 0).all() for x in jax.tree.leaves((gradient["policy_head"], gradient["log_std"])))


def test_a_privileged_critic_has_no_part_in_the_encoder(inputs: dict[str, jax.Array]) -> None:
    network = SMALL.clone(privileged_critic=True)
    params = initial(network)
    value, gradient = value_and_gradient(network, inputs, params)
    assert all((x == 0).all() for x in jax.tree.leaves(gradient["encoder"]))
    assert all((x != 0).any() for x in jax.tree.leaves(gradient["value_head"]))

    dark = {**inputs, "pixels": inputs["pixels"] // 4, "agent_pos": inputs["agent_pos"] + 1}
    np.testing.assert_array_equal(value, apply(network, params, dark)[1])
    alone = apply(network, params, {"privileged": inputs["privileged"]}, method="value")
    np.testing.assert_allclose(alone, value, rtol=1e-5)
    elsewhere = {**inputs, "privileged": inputs["privileged"] + 1}
    assert (value != apply(network, params, elsewhere)[1]).all()


def test_the_state_is_predicted_from_what_the_policy_sees(inputs: dict[str, jax.Array]) -> None:
    network = SMALL.clone(privileged_critic=True, state_size=18)  # the last two of `privileged` are not asked for
    params = initial(network)
    distribution, value, error = apply(network, params, inputs, method="with_state_error")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), (distribution, value), apply(network, params, inputs))
    # A head that says the same of every observation is off by what there is to say.
    head = jax.tree.map(jnp.zeros_like, params["params"]["state_head"])
    head["Dense_1"]["bias"] = jnp.arange(18.0)
    constant = {"params": {**params["params"], "state_head": head}}
    expected = np.square(np.asarray(inputs["privileged"])[:, :18] - np.arange(18)).mean(axis=1)
    np.testing.assert_allclose(apply(network, constant, inputs, method="with_state_error")[2], expected, rtol=1e-5)

    def loss(params: Any) -> jax.Array:
        return apply(network, params, inputs, method="with_state_error")[2].mean()

    gradient = jax.jit(jax.grad(loss))(params)["params"]
    assert all((x != 0).any() for name in ("encoder", "state_head") for x in jax.tree.leaves(gradient[name]))
    assert all((x == 0).all() for name in ("policy_head", "value_head", "log_std") for x in jax.tree.leaves(gradient[name]))
    assert error.shape == (3,)
    assert "state_head" not in initial(SMALL)["params"]


@pytest.mark.parametrize("kind", [ActorCritic, MirroredActorCritic])
def test_the_policy_acts_on_the_state_that_it_predicts(kind: type[ActorCritic], rng: np.random.Generator) -> None:
    """As on a measurement: what is predicted changes the action, the action does not change what is predicted."""
    network = kind(privileged_critic=True, hidden_sizes=(8,), state_size=142)
    inputs = {"agent_pos": jnp.asarray(rng.normal(size=(2, 14))), "privileged": jnp.asarray(rng.normal(size=(2, 142)))}
    params = jax.jit(network.init)(jax.random.key(0), inputs)
    other = jax.tree.map(jnp.copy, params)
    other["params"]["state_head"]["Dense_1"]["bias"] += 1.0
    before, after = (apply(network, x, inputs, method="policy").mean for x in (params, other))
    assert (before != after).all()

    def moved(params: Any) -> jax.Array:
        return apply(network, params, inputs, method="policy").mean.sum()

    gradient = jax.jit(jax.grad(moved))(params)["params"]
    assert all((x == 0).all() for x in jax.tree.leaves(gradient["state_head"]))
    assert all((x != 0).any() for x in jax.tree.leaves(gradient["policy_head"]))


def test_each_arm_predicts_the_state_as_it_sees_it(rng: np.random.Generator) -> None:
    """Its own block first, then the other arm's, then what both share: the left arm's order is not the right one's."""
    network = MirroredActorCritic(privileged_critic=True, hidden_sizes=(8,), state_size=142)
    joints, state = rng.normal(size=(2, 14)), rng.normal(size=(2, 142))
    inputs = {"agent_pos": jnp.asarray(joints), "privileged": jnp.asarray(state)}
    params = jax.jit(network.init)(jax.random.key(0), inputs)
    params["params"]["state_head"] = jax.tree.map(jnp.zeros_like, params["params"]["state_head"])
    left_of = np.concatenate([state[:, :68], state[:, 68:136], state[:, 136:]], axis=1)
    params["params"]["state_head"]["Dense_1"]["bias"] = jnp.asarray(left_of[0])
    error = apply(network, params, inputs, method="with_state_error")[2]
    assert error.shape == (2, 2)
    np.testing.assert_allclose(error[0, 0], 0.0, atol=1e-12)
    right_of = np.concatenate([state[:, 68:136], state[:, :68], state[:, 136:]], axis=1)
    np.testing.assert_allclose(error[0, 1], np.square(right_of[0] - left_of[0]).mean(), rtol=1e-5)


@pytest.mark.parametrize("privileged_critic", [False, True])
def test_the_policy_never_sees_privileged_inputs(inputs: dict[str, jax.Array], privileged_critic: bool) -> None:
    network = SMALL.clone(privileged_critic=privileged_critic)
    params = initial(network)
    policy = apply(network, params, inputs)[0]
    elsewhere = {**inputs, "privileged": inputs["privileged"] + 1}
    jax.tree.map(np.testing.assert_array_equal, policy, apply(network, params, elsewhere)[0])
    observed = {name: inputs[name] for name in ("pixels", "agent_pos")}
    alone = apply(network, params, observed, method="policy")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), alone, policy)
    for name in observed:
        changed = {**inputs, name: inputs[name] // 4 if name == "pixels" else inputs[name] + 1}
        assert (policy.mean != apply(network, params, changed)[0].mean).any(axis=1).all()


@pytest.mark.parametrize("privileged_critic", [False, True])
def test_mirrored_arms_swap_roles_when_the_scene_makes_a_half_turn(rng: np.random.Generator, privileged_critic: bool) -> None:
    """Blocks of the vectors swapped and the picture turned by 180 degrees, each arm acts and values as the other did.

    But for the flag that says which arm it is: its weights, those of the last two inputs, are set to zero, then not.
    """
    network = MirroredActorCritic(conv=((4, 4, 2),), features_dim=16, hidden_sizes=(16,), privileged_critic=privileged_critic)
    own, other, shared = (jnp.asarray(rng.normal(size=(3, size)), jnp.float32) for size in (68, 68, 7))
    left, right = (jnp.asarray(rng.normal(size=(3, 7)), jnp.float32) for _ in range(2))
    pixels = jnp.asarray(rng.integers(0, 256, (3, 12, 14, 3), dtype=np.uint8))
    scene = {
        "pixels": pixels,
        "agent_pos": jnp.concatenate([left, right], 1),
        "privileged": jnp.concatenate([own, other, shared], 1),
    }
    turned = {
        "pixels": jnp.rot90(pixels, 2, axes=(1, 2)),
        "agent_pos": jnp.concatenate([right, left], 1),
        "privileged": jnp.concatenate([other, own, shared], 1),
    }
    params = jax.jit(network.init)(jax.random.key(0), scene)
    distribution, value = apply(network, params, scene)
    assert distribution.mean.shape == distribution.log_std.shape == (3, 2, 7)
    assert value.shape == (3, 2)

    def without_flag(path: Any, x: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        return x.at[-2:].set(0) if names[1] != "encoder" and names[2:] == ["Dense_0", "kernel"] else x

    blind = jax.tree_util.tree_map_with_path(without_flag, params)
    here, there = apply(network, blind, scene), apply(network, blind, turned)
    assert (jnp.abs(here[0].mean[:, 0] - here[0].mean[:, 1]) > 1e-4).any()
    np.testing.assert_allclose(there[0].mean, here[0].mean[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(there[1], here[1][:, ::-1], atol=1e-5)
    assert (jnp.abs(apply(network, params, turned)[1] - value[:, ::-1]) > 1e-3).any(), "the flag counts"


# --- The Gaussian policy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gaussian(rng: np.random.Generator) -> Gaussian:
    return Gaussian(*jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32))


def test_log_prob_is_scipys(gaussian: Gaussian, rng: np.random.Generator) -> None:
    action = rng.normal(size=(5, 3)).astype(np.float32)
    expected = scipy.stats.norm(gaussian.mean, np.exp(gaussian.log_std)).logpdf(action).sum(axis=1)
    np.testing.assert_allclose(networks.log_prob(gaussian, jnp.asarray(action)), expected, rtol=1e-4)


def test_entropy_is_scipys(gaussian: Gaussian) -> None:
    expected = scipy.stats.norm(gaussian.mean, np.exp(gaussian.log_std)).entropy().sum(axis=1)
    np.testing.assert_allclose(networks.entropy(gaussian), expected, rtol=1e-5)


def test_samples_follow_the_distribution(gaussian: Gaussian) -> None:
    """Kolmogorov and Smirnov, for each of 15 components; and components are independent."""
    keys = jax.random.split(jax.random.key(0), 2000)
    samples = np.asarray(jax.vmap(networks.sample, in_axes=(None, 0))(gaussian, keys))
    whitened = ((samples - np.asarray(gaussian.mean)) / np.exp(gaussian.log_std)).reshape(2000, 15)
    assert min(scipy.stats.kstest(column, "norm").pvalue for column in whitened.T) > 1e-3
    correlation = np.corrcoef(whitened.T) - np.eye(15)
    assert np.abs(correlation).max() < 5 / math.sqrt(2000)


# --- Observations as network inputs --------------------------------------------------------------------------------------------


def test_running_stats_are_those_of_all_vectors_together(rng: np.random.Generator) -> None:
    """Batches of unequal sizes, shapes and means; the last is far away."""
    shapes = [(1,), (7, 5), (2,), (3, 4, 2), (100,)]
    batches = [rng.normal(loc=10 * i, scale=1 + i, size=(*shape, 3)) for i, shape in enumerate(shapes)]
    stats = RunningStats.create(3)
    for i, batch in enumerate(batches):
        stats = stats.update(jnp.asarray(batch, jnp.float32))
        seen = np.concatenate([b.reshape(-1, 3) for b in batches[: i + 1]])
        np.testing.assert_allclose(stats.mean, seen.mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose(stats.variance, seen.var(axis=0), rtol=1e-4, atol=1e-6)
        assert stats.total == len(seen)


def test_unseen_statistics_change_nothing() -> None:
    np.testing.assert_allclose(RunningStats.create(2).normalize(jnp.array([[0.5, -2.0]])), [[0.5, -2.0]], rtol=1e-4)


def test_normalisation_whitens_and_clips() -> None:
    """Mean 1, 2, 3 and variance 4, 1, 0; the constant component is divided by sqrt(1e-4) and clipped."""
    stats = RunningStats(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 1.0, 0.0]), jnp.array(10.0))
    x = jnp.array([[5.0, 0.0, 3.0], [100.0, -100.0, 3.01], [1.0, 2.0, 4.0]])
    expected = [[2.0, -2.0, 0.0], [8.0, -8.0, 1.0], [0.0, 0.0, 8.0]]
    np.testing.assert_allclose(stats.normalize(x), expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(stats.normalize(x[0]), expected[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(stats.normalize(x[None]), [expected], rtol=1e-3, atol=1e-6)


def test_only_known_vectors_are_normalised(inputs: dict[str, jax.Array]) -> None:
    stats = {"agent_pos": RunningStats(jnp.ones(14), jnp.ones(14), jnp.array(10.0))}
    normalised = normalize_inputs(inputs, stats)
    np.testing.assert_allclose(normalised["agent_pos"], inputs["agent_pos"] - 1, rtol=1e-3, atol=1e-6)
    assert normalised["pixels"] is inputs["pixels"]
    assert normalised["privileged"] is inputs["privileged"]
    assert set(networks.vector_inputs(inputs)) == {"agent_pos", "privileged"}


def test_an_observation_becomes_named_inputs(inputs: dict[str, jax.Array]) -> None:
    pixels, vector = inputs["pixels"], inputs["agent_pos"]
    assert as_inputs(pixels) == {"pixels": pixels}
    assert as_inputs(vector) == {"state": vector}
    assert as_inputs({"pixels": pixels, "agent_pos": vector}, privileged=vector).keys() == {"pixels", "agent_pos", "privileged"}
