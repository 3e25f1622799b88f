"""The training loop: `RunState` is the only carry, `train_step` the one jitted function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aloha_jax import networks, ppo
from aloha_jax.config import Config
from aloha_jax.env import Env, EnvState, Observation
from aloha_jax.networks import RunningStats, as_inputs, normalize_inputs, vector_inputs
from aloha_jax.policy import Policy, act, clip_action, make_network
from aloha_jax.ppo import Coefficients, Hyperparameters, Transition

# Bounds and factor of the adaptive learning rate (Schulman et al. 2017 adapt a KL penalty the same way, section 4).
LEARNING_RATE_BOUNDS, LEARNING_RATE_FACTOR = (1e-5, 2e-3), 1.2


class RunState(NamedTuple):
    """Everything a run needs to go on.

    Attributes:
        params: parameters of `ActorCritic`.
        opt_state: the optimizer's state, with the learning rate in it.
        stats: running statistics of each vector input.
        env: the worlds.
        key: PRNG key of exploration and shuffling.
        update: int32[], updates done.
        average: running average of `params` over updates (Polyak and Juditsky 1992), which is what is judged and saved; None
            without `--average-decay`.
    """

    params: Any
    opt_state: optax.OptState
    stats: dict[str, RunningStats]
    env: EnvState
    key: jax.Array
    update: jax.Array
    average: Any = None

    @property
    def judged_field(self) -> str:
        """Which of `params` and `average` is judged and saved."""
        return "params" if self.average is None else "average"

    @property
    def judged(self) -> Any:
        """The parameters that are judged and saved."""
        return getattr(self, self.judged_field)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with global-norm clipping; epsilon as in Stable-Baselines3. The learning rate is part of its state."""

    def adam(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(learning_rate, eps=1e-5))

    return optax.inject_hyperparams(adam)(learning_rate=config.learning_rate)


def hyperparameters(config: Config) -> Hyperparameters:
    """The update's constants; under the adaptive schedule `target_kl` steers the learning rate instead of stopping."""
    values = {name: getattr(config, name) for name in Hyperparameters._fields}
    if config.lr_schedule == "adaptive":
        values["target_kl"] = None
    return Hyperparameters(**values)


def init_run(config: Config, env: Env, network: nn.Module | None = None) -> RunState:
    """The state before the first step. Clocks start at random, so that the worlds' time limits do not fall together."""
    network = network or make_network(config)
    params_key, env_key, clock_key, key = jax.random.split(jax.random.key(config.seed), 4)
    state = jax.jit(env.reset)(env_key)
    state = state._replace(clock=jax.random.randint(clock_key, (env.num_envs,), 0, env.episode_length))
    inputs = _inputs(config, state.obs, state.privileged)
    stats = {name: RunningStats.create(x.shape[-1]) for name, x in vector_inputs(inputs).items() if config.normalize_obs}
    params = jax.jit(network.init)(params_key, jax.tree.map(lambda x: x[:1], inputs))
    average = params if config.average_decay else None
    run = RunState(params, make_optimizer(config).init(params), stats, state, key, jnp.zeros((), jnp.int32), average)
    return jax.tree.map(lambda x: x.copy(), run)  # no two leaves share a buffer: `train_step` donates them all


TrainStep = Callable[[RunState], tuple[RunState, dict[str, jax.Array]]]


def make_train_step(config: Config, env: Env, network: nn.Module | None = None, teacher: Policy | None = None) -> TrainStep:
    """The jitted `train_step(run) -> (run, metrics)`; `run`'s buffers are donated. `teacher` sees the privileged observation."""
    step = functools.partial(_train_step, config, env, network or make_network(config), teacher)
    return jax.jit(step, donate_argnums=0)


def _train_step(
    config: Config, env: Env, network: nn.Module, teacher: Policy | None, run: RunState
) -> tuple[RunState, dict[str, jax.Array]]:
    optimizer, hp = make_optimizer(config), hyperparameters(config)
    key, rollout_key, update_key = jax.random.split(run.key, 3)
    opt_state = _schedule(config, run)
    collected = rollout(config, env, network, run, rollout_key, teacher)
    batch = ppo.make_batch(collected.transitions, collected.last_value, config.gamma, config.gae_lambda)
    apply: Any = network.apply
    distill = _linear(config, run.update, config.distill_coef, config.distill_coef_final)
    coef = Coefficients(config.ppo_coef, distill)
    params, opt_state, metrics = ppo.update(run.params, opt_state, batch, update_key, apply, optimizer, hp, coef)
    if config.lr_schedule == "adaptive":
        assert config.target_kl is not None  # Config.validate
        opt_state = _adapt(opt_state, metrics["approx_kl"], config.target_kl)
    params = _cap_log_std(config, params, run.update + 1)
    stats = {name: _updated(stats, collected.vectors[name]) for name, stats in run.stats.items()}
    metrics |= collected.episodes | {"learning_rate": opt_state.hyperparams["learning_rate"]}
    average = _averaged(config, run, params)
    return RunState(params, opt_state, stats, collected.env, key, run.update + 1, average), metrics


def _updated(stats: RunningStats, x: jax.Array) -> RunningStats:
    """Statistics with one more batch, unless a number in it is not finite: that would stay in them for ever."""
    return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(x).all(), new, old), stats.update(x), stats)


class Rollout(NamedTuple):
    """What `rollout` collected.

    Attributes:
        env: the worlds after it.
        transitions: [T, N, ...].
        last_value: V of the last observation, [N].
        vectors: the vector inputs before normalisation, float32[T, N, size] each.
        episodes: sums over the episodes that ended.
    """

    env: EnvState
    transitions: Transition
    last_value: jax.Array
    vectors: dict[str, jax.Array]
    episodes: dict[str, jax.Array]


def rollout(
    config: Config, env: Env, network: nn.Module, run: RunState, key: jax.Array, teacher: Policy | None = None
) -> Rollout:
    """`config.n_steps` steps of every world under the policy of `run`, in which the teacher takes a share of the actions."""
    apply: Any = network.apply
    mix = _linear(config, run.update, config.teacher_mix, config.teacher_mix_final)

    def value_of(inputs: dict[str, jax.Array]) -> Any:
        return network.apply(run.params, inputs, method="value")

    def step(state: EnvState, key: jax.Array) -> tuple[EnvState, Any]:
        raw = _inputs(config, state.obs, state.privileged)
        inputs = normalize_inputs(raw, run.stats)
        distribution, value = apply(run.params, inputs)
        action_key, mix_key = jax.random.split(key)
        action = networks.sample(distribution, action_key)
        log_prob = networks.log_prob(distribution, action)
        executed, own, teacher_action = clip_action(config, action), None, None
        if teacher is not None:
            teacher_action = act(teacher.config, teacher.params, teacher.stats, state.privileged, None)
            own = jax.random.uniform(mix_key, (env.num_envs,)) >= mix
            executed = jnp.where(own[:, None], executed, teacher_action)
        after = env.step(state, executed)
        # Only truncated episodes need the value of where they ended, and most steps truncate none.
        final_value = jax.lax.cond(
            after.truncated.any(),
            lambda: value_of(normalize_inputs(_inputs(config, after.final_obs, after.final_privileged), run.stats)),
            lambda: jnp.zeros_like(value),
        )
        reward = after.arm_reward if value.ndim == 2 else after.reward
        ends = (after.terminated, after.truncated)
        transition = Transition(inputs, action, log_prob, value, final_value, reward, *ends, own, teacher_action)
        return after, (transition, vector_inputs(raw), _episode_sums(after))

    state, (transitions, raw, episodes) = jax.lax.scan(step, run.env, jax.random.split(key, config.n_steps))
    last_value = value_of(normalize_inputs(_inputs(config, state.obs, state.privileged), run.stats))
    return Rollout(state, transitions, last_value, raw, jax.tree.map(lambda x: x.sum(axis=0), episodes))


def _inputs(config: Config, obs: Observation, privileged: jax.Array) -> dict[str, jax.Array]:
    """What the networks see: the observation, and the simulator's state if a privileged critic does not see it anyway."""
    return as_inputs(obs, privileged if config.privileged_critic and config.has_pixels else None)


def _episode_sums(state: EnvState) -> dict[str, jax.Array]:
    """Sums over the worlds whose episode from a start of the task has just ended, for means over any number of steps."""
    ended = state.done & state.task_start
    sums = {
        "episodes": ended,
        "episode_reward": ended * state.episode.total_reward,
        "episode_length": ended * state.episode.length,
        "episode_level": ended * state.episode.best_level,
        "episode_success": ended * (state.level == 4),
        "invalid_worlds": state.invalid,
    }
    return {name: x.sum().astype(jnp.float32) for name, x in sums.items()}


def _cap_log_std(config: Config, params: Any, update: jax.Array) -> Any:
    """Exploration that must end: the log standard deviation, held under its falling cap."""
    if config.log_std_final is None:
        return params
    cap = _linear(config, update, config.log_std_init, config.log_std_final)
    return {**params, "params": {**params["params"], "log_std": jnp.minimum(params["params"]["log_std"], cap)}}


def _averaged(config: Config, run: RunState, params: Any) -> Any:
    """The running average with one more update in it; over the first ones it follows more closely, to forget where it began."""
    if run.average is None:
        return None
    decay = jnp.minimum(config.average_decay, (1 + run.update) / (10 + run.update))
    return optax.incremental_update(params, run.average, 1 - decay)


def _linear(config: Config, update: jax.Array, first: float, last: float | None) -> jax.Array:
    """From `first` to `last` (None: the same) over the run."""
    progress = jnp.minimum(update / config.num_updates, 1.0)
    return first + progress * ((first if last is None else last) - first)


def _schedule(config: Config, run: RunState) -> optax.OptState:
    if config.lr_schedule != "linear":
        return run.opt_state
    left = jnp.maximum(1.0 - run.update / config.num_updates, 0.0)
    return _with_learning_rate(run.opt_state, config.learning_rate * left)


def _adapt(opt_state: optax.OptState, kl: jax.Array, target_kl: float) -> optax.OptState:
    rate = opt_state.hyperparams["learning_rate"]
    factor = jnp.where(kl > 2.0 * target_kl, 1 / LEARNING_RATE_FACTOR, jnp.where(kl < 0.5 * target_kl, LEARNING_RATE_FACTOR, 1.0))
    return _with_learning_rate(opt_state, jnp.clip(rate * factor, *LEARNING_RATE_BOUNDS))


def _with_learning_rate(opt_state: optax.OptState, rate: jax.Array) -> optax.OptState:
    rate = jnp.asarray(rate, opt_state.hyperparams["learning_rate"].dtype)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})
