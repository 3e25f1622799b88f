"""Actor and critic (Flax linen), the Gaussian policy's formulas, and running observation normalisation."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aloha_jax.settings import NATURE_CNN

ACTION_SIZE = 14
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "elu": nn.elu, "tanh": nn.tanh}


# --- Modules -----------------------------------------------------------------------------------------------------------------


def _dense(size: int, gain: float = math.sqrt(2)) -> nn.Dense:
    """Orthogonal initialisation with Stable-Baselines3's gains, sqrt(2) inside and 0.01 for actions; for values, too, 0.01.

    Its 1 there begins with values of about 1 that mean nothing. Where a step is paid thousandths, they are all that the first
    advantages consist of, and the policy climbs them for half a million steps (docs/experiments.md, 29).
    """
    return nn.Dense(size, kernel_init=nn.initializers.orthogonal(gain))


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """float[B, ..., K] @ float[K, F]; on CPUs the kernel's gradient is up to twice as fast where rows are many, K and F small.

    It is a sum over all rows, which XLA's product of the two computes at less than half its usual pace. As one product for each
    quarter of the batch, the longer of its sides last, it comes nearer (docs/benchmarks.md, Convolutions on a CPU).
    """
    return x @ kernel


def _product_gradient(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    parts = math.gcd(x.shape[0], 4)
    rows, cotangents = (array.reshape(parts, -1, array.shape[-1]) for array in (x, cotangent))
    return cotangent @ kernel.T, jnp.einsum("prf,prk->pfk", cotangents, rows).sum(axis=0).T


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_gradient)


def conv_by_slices(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Unpadded convolution, float[B, H, W, C] * float[k, k, C, F], as one matrix product over shifted views of the input.

    XLA's own gradients of convolutions are slow on CPUs: these take about half the time, or less, for the whole encoder
    (benchmarks/conv.py). A stride that divides the kernel is first moved into the channels, which leaves fewer and larger views.
    """
    size, features = kernel.shape[0], kernel.shape[-1]
    batch, height, width, channels = x.shape
    out_height, out_width = (height - size) // stride + 1, (width - size) // stride + 1
    if stride > 1 and size % stride == 0:
        size //= stride
        rows, columns = out_height + size - 1, out_width + size - 1
        x = x[:, : rows * stride, : columns * stride].reshape(batch, rows, stride, columns, stride, channels)
        channels *= stride * stride
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, channels)
        kernel = kernel.reshape(size, stride, size, stride, -1, features).transpose(0, 2, 1, 3, 4, 5)
        stride = 1
    bottom, right = stride * (out_height - 1) + 1, stride * (out_width - 1) + 1
    views = [x[:, i : i + bottom : stride, j : j + right : stride] for i in range(size) for j in range(size)]
    return _product(jnp.concatenate(views, axis=-1), kernel.reshape(size * size * channels, features))


def conv_by_xla(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same by XLA's own convolution."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same on a CPU (benchmarks/conv.py): slices where patches do not overlap, and to learn; else XLA."""
    by = conv_by_slices if kernel.shape[0] == stride else conv_by_xla
    return by(x, kernel, stride)


def _conv_to_learn(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, Callable[..., Any]]:
    return jax.vjp(functools.partial(conv_by_slices, stride=stride), x, kernel)


conv_on_cpu.defvjp(_conv_to_learn, lambda stride, vjp, cotangent: vjp(cotangent))


class Conv(nn.Module):
    """Unpadded convolution with bias, [B, H, W, C] -> [B, H', W', features]; same parameters as `flax.linen.Conv`."""

    features: int
    kernel_size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.orthogonal(math.sqrt(2)), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        conv = conv_on_cpu if jax.default_backend() == "cpu" else conv_by_xla
        y = conv(x, kernel, self.stride)
        return y + bias[None, None, None]


class PixelEncoder(nn.Module):
    """uint8[B, H, W, 3] -> float32[B, features_dim].

    Attributes:
        conv: (features, kernel, stride) per convolution, unpadded.
        features_dim: size of the dense layer behind them.
    """

    conv: Sequence[tuple[int, int, int]] = NATURE_CNN
    features_dim: int = 512

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = pixels.astype(jnp.float32) / 255.0
        for features, kernel, stride in self.conv:
            x = nn.relu(Conv(features, kernel, stride)(x))
        return nn.relu(_dense(self.features_dim)(x.reshape(x.shape[0], -1)))


class Mlp(nn.Module):
    """Hidden layers and a linear output: float32[..., any] -> float32[..., output_size]."""

    hidden_sizes: Sequence[int]
    output_size: int
    activation: str
    output_gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in self.hidden_sizes:
            x = ACTIVATIONS[self.activation](_dense(size)(x))
        return _dense(self.output_size, self.output_gain)(x)


class Gaussian(NamedTuple):
    """A diagonal Gaussian over actions: mean float32[..., 14] or, per arm, [..., 2, 7], and log standard deviation."""

    mean: jax.Array
    log_std: jax.Array


class ActorCritic(nn.Module):
    """Policy and value networks over one observation.

    Pixels pass through an encoder that both heads share; proprioception joins behind it. A privileged critic has no part in the
    encoder: it sees the simulator's state (asymmetric actor-critic, Pinto et al. 2017).

    Attributes:
        conv: see `PixelEncoder`.
        features_dim: see `PixelEncoder`.
        hidden_sizes: of the policy head and, separately, of the value head.
        activation: of the heads: `relu`, `elu` or `tanh`.
        privileged_critic: whether the value head sees `privileged` instead of the observation.
        log_std_init: initial log standard deviation of every action.
        state_size: of the simulator's state, if the policy is to predict it from what it sees, and to act on that; else None.
        action_size: 14 for two ViperX arms.
    """

    conv: Sequence[tuple[int, int, int]] = NATURE_CNN
    features_dim: int = 512
    hidden_sizes: Sequence[int] = (256, 256)
    activation: str = "tanh"
    privileged_critic: bool = False
    log_std_init: float = 0.0
    state_size: int | None = None
    action_size: int = ACTION_SIZE

    def setup(self) -> None:
        self.encoder = PixelEncoder(self.conv, self.features_dim)
        self.policy_head = Mlp(self.hidden_sizes, self.action_size, self.activation, output_gain=0.01)
        self.value_head = Mlp(self.hidden_sizes, 1, self.activation, output_gain=0.01)
        if self.state_size is not None:
            self.state_head = Mlp(self.hidden_sizes[:1], self.state_size, self.activation, output_gain=1.0)
        self.log_std = self.param("log_std", nn.initializers.constant(self.log_std_init), (self.action_size,))

    def __call__(self, inputs: dict[str, jax.Array]) -> tuple[Gaussian, jax.Array]:
        """Action distribution and value float32[B]."""
        features = self._features(inputs)
        return self._policy(features), self._value(inputs, features)

    def with_state_error(self, inputs: dict[str, jax.Array]) -> tuple[Gaussian, jax.Array, jax.Array]:
        """The same, and the mean squared error, float32[B], of the state as predicted from what the policy sees.

        Rewards tell an encoder little about where things are, the state all (auxiliary tasks: Jaderberg et al. 2017).
        """
        features = self._features(inputs)
        state = self._privileged(inputs)[..., : self.state_size]  # without a mirrored network's flag, which is no part of it
        error = jnp.square(self.state_head(features) - state).mean(axis=-1)
        return self._policy(features), self._value(inputs, features), error

    def policy(self, inputs: dict[str, jax.Array]) -> Gaussian:
        """The action distribution alone."""
        return self._policy(self._features(inputs))

    def value(self, inputs: dict[str, jax.Array]) -> jax.Array:
        """The value alone, float32[B]; a privileged critic skips the encoder."""
        return self._value(inputs, None if self.privileged_critic else self._features(inputs))

    def _features(self, inputs: dict[str, jax.Array]) -> jax.Array:
        parts = [self.encoder(inputs["pixels"])] if "pixels" in inputs else []
        parts += [inputs[name] for name in ("agent_pos", "target", "history", "state") if name in inputs]
        return jnp.concatenate(parts, axis=-1)

    def _policy(self, features: jax.Array) -> Gaussian:
        if self.state_size is not None:
            # As if it were measured: the policy's gradient reaches the encoder beside the prediction, not through it.
            prediction = jax.lax.stop_gradient(self.state_head(features))
            features = jnp.concatenate([features, prediction], axis=-1)
        mean = self.policy_head(features)
        return Gaussian(mean, jnp.broadcast_to(self.log_std, mean.shape))

    def _value(self, inputs: dict[str, jax.Array], features: jax.Array | None) -> jax.Array:
        x = self._privileged(inputs) if self.privileged_critic else features
        assert x is not None
        return self.value_head(x)[..., 0]

    def _privileged(self, inputs: dict[str, jax.Array]) -> jax.Array:
        return inputs["privileged"]

    @staticmethod
    def views(name: str, x: jax.Array) -> jax.Array:
        """The vector input `name`, float32[..., size], as the heads see it, which is what running statistics are of."""
        return x


ARM_ACTION_SIZE = 7
ARM_STATE_SIZE = 68  # tasks.insertion.Insertion.features: one block per arm, then what both share


class MirroredActorCritic(ActorCritic):
    """One policy and one value network for both arms, which see the scene each from its own side.

    The robot is symmetric under a half turn about the vertical axis between its arms. The right arm's picture is turned by 180
    degrees, vectors are split into own and other arm's, and a flag tells which object the arm handles. Every step is then two
    samples for one network, and each arm is judged by its own reward and value: shapes gain an axis of 2 (left, right), the mean
    is float32[B, 2, 7], the value and the state's error are float32[B, 2].
    """

    action_size: int = ARM_ACTION_SIZE

    def _features(self, inputs: dict[str, jax.Array]) -> jax.Array:
        parts = []
        if "pixels" in inputs:
            views = jnp.stack([inputs["pixels"], inputs["pixels"][:, ::-1, ::-1]], axis=1)
            encoded = self.encoder(views.reshape(-1, *views.shape[2:]))
            parts.append(encoded.reshape(*views.shape[:2], -1))
        for name in ("agent_pos", "target", "history", "state"):
            if name in inputs:
                parts.append(self.views(name, inputs[name]))
        return _with_flag(jnp.concatenate(parts, axis=-1))

    def _privileged(self, inputs: dict[str, jax.Array]) -> jax.Array:
        return _with_flag(self.views("privileged", inputs["privileged"]))

    @staticmethod
    def views(name: str, x: jax.Array) -> jax.Array:
        """As each arm sees it, float32[..., 2, size]: whitened by statistics of both, what is alike stays so."""
        return _own_and_other(x, ARM_STATE_SIZE if name in ("state", "privileged") else x.shape[-1] // 2)


def _own_and_other(x: jax.Array, size: int) -> jax.Array:
    """[left, right, shared] blocks, float32[..., 2 * size + rest], as each arm sees them: float32[..., 2, 2 * size + rest]."""
    left, right, shared = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return jnp.stack([jnp.concatenate([left, right, shared], -1), jnp.concatenate([right, left, shared], -1)], axis=-2)


def _with_flag(x: jax.Array) -> jax.Array:
    """Append which arm it is: float32[B, 2, size] -> float32[B, 2, size + 2]."""
    flag = jnp.broadcast_to(jnp.eye(2)[None], (x.shape[0], 2, 2))
    return jnp.concatenate([x, flag], axis=-1)


def num_parameters(params: Any) -> int:
    """Number of scalars in a pytree of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


# --- The Gaussian policy -----------------------------------------------------------------------------------------------------


def sample(distribution: Gaussian, key: jax.Array) -> jax.Array:
    """One action per mean, of its shape."""
    noise = jax.random.normal(key, distribution.mean.shape)
    return distribution.mean + jnp.exp(distribution.log_std) * noise


def log_prob(distribution: Gaussian, action: jax.Array) -> jax.Array:
    """Log density of actions of the means' shape, summed over the last axis: float32[...]."""
    return jax.scipy.stats.norm.logpdf(action, distribution.mean, jnp.exp(distribution.log_std)).sum(axis=-1)


def entropy(distribution: Gaussian) -> jax.Array:
    """Differential entropy, float32[...]."""
    return (distribution.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(axis=-1)


# --- Observations as network inputs --------------------------------------------------------------------------------------------


class RunningStats(NamedTuple):
    """Mean and variance of all vectors seen so far, and how many they were (Chan, Golub and LeVeque 1979)."""

    mean: jax.Array
    variance: jax.Array
    total: jax.Array

    @classmethod
    def create(cls, size: int) -> "RunningStats":
        """Statistics before the first vector of `size`."""
        return cls(jnp.zeros(size), jnp.ones(size), jnp.zeros(()))

    def update(self, batch: jax.Array) -> "RunningStats":
        """Merge float32[..., size] vectors."""
        batch = batch.reshape(-1, batch.shape[-1])
        total = self.total + batch.shape[0]
        delta = batch.mean(axis=0) - self.mean
        share = batch.shape[0] / total
        mean = self.mean + share * delta
        variance = (1 - share) * self.variance + share * batch.var(axis=0) + share * (1 - share) * jnp.square(delta)
        return RunningStats(mean, variance, total)

    def normalize(self, x: jax.Array) -> jax.Array:
        """float32[..., size], whitened and clipped to +-8."""
        lead = (1,) * (x.ndim - 1) + (-1,)
        return jnp.clip((x - self.mean.reshape(lead)) / jnp.sqrt(self.variance + 1e-4).reshape(lead), -8.0, 8.0)

    def denormalize(self, x: jax.Array) -> jax.Array:
        """What was whitened to `x`, float32[..., size], unless it was clipped."""
        lead = (1,) * (x.ndim - 1) + (-1,)
        return x * jnp.sqrt(self.variance + 1e-4).reshape(lead) + self.mean.reshape(lead)


def as_inputs(obs: jax.Array | dict[str, jax.Array], privileged: jax.Array | None = None) -> dict[str, jax.Array]:
    """An environment's observation as a dict: `pixels`, `agent_pos`, `target`, `history`, `state`, and `privileged` if given."""
    if not isinstance(obs, dict):
        obs = {"pixels" if obs.dtype == jnp.uint8 else "state": obs}
    return obs if privileged is None else {**obs, "privileged": privileged}


def vector_inputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The inputs that are normalised by running statistics: all but the pixels."""
    return {name: x for name, x in inputs.items() if name != "pixels"}


def normalize_inputs(inputs: dict[str, jax.Array], stats: dict[str, RunningStats]) -> dict[str, jax.Array]:
    """Whiten every vector that `stats` knows; pixels are scaled by the encoder."""
    return {name: stats[name].normalize(x) if name in stats else x for name, x in inputs.items()}
