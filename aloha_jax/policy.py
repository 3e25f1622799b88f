"""A trained policy: parameters, observation statistics and configuration, and nothing of the training."""

from typing import Any

import jax
import jax.numpy as jnp

from aloha_jax import history, networks
from aloha_jax.config import Config
from aloha_jax.networks import ActorCritic, MirroredActorCritic, RunningStats, as_inputs, normalize_inputs
from aloha_jax.views import vectors_beside_pixels

AGENT_POS_SIZE = 14
STATE_SIZE = 142  # tasks.insertion.Insertion.features


def make_network(config: Config) -> ActorCritic | MirroredActorCritic:
    """The networks that `config` describes."""
    kind = MirroredActorCritic if config.network == "mirrored" else ActorCritic
    return kind(
        conv=config.conv,
        features_dim=config.features_dim,
        hidden_sizes=config.hidden_sizes,
        activation=config.activation,
        privileged_critic=config.privileged_critic,
        log_std_init=config.log_std_init,
        state_size=STATE_SIZE if config.state_coef else None,
    )


def example_inputs(config: Config) -> dict[str, jax.Array]:
    """Network inputs of one world, all zero."""
    if config.obs == "state":
        return {"state": jnp.zeros((1, STATE_SIZE))}
    joints = jnp.zeros((1, AGENT_POS_SIZE))
    memory = history.start(joints, config.history)
    inputs = {"pixels": jnp.zeros((1, config.image_height, config.image_width, 3), jnp.uint8)}
    inputs |= vectors_beside_pixels(config.obs, config.observe_target, config.history, joints, joints, memory)
    return inputs | ({"privileged": jnp.zeros((1, STATE_SIZE))} if config.privileged_critic else {})


def init_params(config: Config, key: jax.Array) -> Any:
    """Fresh parameters of `make_network(config)`."""
    return make_network(config).init(key, example_inputs(config))


def init_stats(config: Config) -> dict[str, RunningStats]:
    """Statistics of every vector input before training; none if observations are not normalised."""
    if not config.normalize_obs:
        return {}
    return {name: RunningStats.create(x.shape[-1]) for name, x in networks.vector_inputs(example_inputs(config)).items()}


class Policy:
    """Maps observations to actions.

    Attributes:
        params: pytree of network parameters.
        stats: running statistics of the vector inputs.
        config: the configuration it was trained under.
    """

    def __init__(self, config: Config, params: Any, stats: dict[str, RunningStats]):
        self.config, self.params, self.stats = config, params, stats

    def act(self, obs: jax.Array | dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Actions float32[N, 14] for N observations: the mean, or a sample if a PRNG key is given.

        Raises:
            ValueError: they are not what the policy was trained to see.
        """
        return _act(self.config, self.params, self.stats, obs, key)


def act(config: Config, params: Any, stats: dict[str, RunningStats], obs: Any, key: jax.Array | None) -> jax.Array:
    """The pure function behind `Policy.act`, for use under `jit`."""
    raw = as_inputs(obs)
    wanted = {name: x for name, x in example_inputs(config).items() if name != "privileged"}
    if _kinds(raw) != _kinds(wanted):
        raise ValueError(f"the policy sees {_kinds(wanted)}, not {_kinds(raw)}")
    inputs = {name: x if name == "pixels" else jnp.asarray(x, jnp.float32) for name, x in raw.items()}
    distribution: Any = make_network(config).apply(params, normalize_inputs(inputs, stats), method="policy")
    action = distribution.mean if key is None else networks.sample(distribution, key)
    return clip_action(config, action)


def _kinds(inputs: dict[str, jax.Array]) -> str:
    """What observations of N worlds are, in words, whatever N; vectors may have any type of numbers."""
    shapes = {name: ", ".join(map(str, ("N", *x.shape[1:]))) for name, x in sorted(inputs.items())}
    return " and ".join(f"{name} {inputs[name].dtype if name == 'pixels' else 'float'}[{shapes[name]}]" for name in shapes)


_act = jax.jit(act, static_argnums=0)


def clip_action(config: Config, action: jax.Array) -> jax.Array:
    """What reaches the environment, float32[N, 14], of actions that the Gaussian gave (per arm, perhaps)."""
    action = action.reshape(action.shape[0], -1)
    return action if config.action_clip is None else jnp.clip(action, -config.action_clip, config.action_clip)
