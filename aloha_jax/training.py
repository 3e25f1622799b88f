"""One training step: `RunState` is the only carry; a rollout and an update, jitted each."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from aloha_jax import ppo
from aloha_jax.config import LEARNING_RATE_BOUNDS, Config
from aloha_jax.env import Env, EnvState
from aloha_jax.networks import ActorCritic, RunningStats, vector_inputs
from aloha_jax.policy import Policy, make_network
from aloha_jax.ppo import Coefficients, Hyperparameters, Transition
from aloha_jax.rollout import Collector, PipelinedCollector, inputs_of

LEARNING_RATE_FACTOR = 1.2  # of the adaptive schedule (Schulman et al. 2017 adapt a KL penalty the same way, section 4)


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


def init_run(config: Config, env: Env, network: ActorCritic | None = None) -> RunState:
    """The state before the first step.

    Clocks start at random, so that the worlds' time limits do not fall together. What such a world does until its first reset is
    a part of an episode, and none to count.
    """
    network = network or make_network(config)
    params_key, env_key, clock_key, key = jax.random.split(jax.random.key(config.seed), 4)
    state = jax.jit(env.reset)(env_key)
    clock = jax.random.randint(clock_key, (env.num_envs,), 0, env.episode_length)
    state = state._replace(clock=clock, next_task_start=clock == 0)
    inputs = inputs_of(config, state.obs, state.privileged)
    stats = {name: RunningStats.create(x.shape[-1]) for name, x in vector_inputs(inputs).items() if config.normalize_obs}
    params = jax.jit(network.init)(params_key, jax.tree.map(lambda x: x[:1], inputs))
    average = params if config.average_decay else None
    run = RunState(params, make_optimizer(config).init(params), stats, state, key, jnp.zeros((), jnp.int32), average)
    return copy(run)  # no two leaves share a buffer: `train_step` donates them all


@jax.jit  # one program for all of a tree's leaves
def copy(tree: Any) -> Any:
    """The same values in buffers of their own."""
    return jax.tree.map(jnp.copy, tree)


class TrainStep:
    """`train_step(run) -> (run, metrics)`; all of `run`'s buffers are donated.

    Two programs, for XLA keeps none that calls the host until the next start: with the C engine or OpenGL that is the rollout,
    but never the update.
    """

    def __init__(self, config: Config, env: Env, network: ActorCritic, teacher: Policy | None):
        self._collect = jax.jit(functools.partial(_collect, config, env, network, teacher), donate_argnums=0)
        self._learn = jax.jit(functools.partial(_learn, config, network), donate_argnums=0)

    def __call__(self, run: RunState) -> tuple[RunState, dict[str, jax.Array]]:
        # The update knows nothing of the worlds, and so serves all whose transitions are alike.
        learner = run._replace(env=cast(EnvState, None))
        worlds, key, collected = self._collect(run.env, learner)
        learner, metrics = self._learn(learner._replace(key=key), *collected)
        return learner._replace(env=worlds), metrics

    @property
    def compilations(self) -> int:
        """How often the program that was compiled most often was."""
        programs: list[Any] = [self._collect, self._learn]
        return max(program._cache_size() for program in programs)


def make_train_step(config: Config, env: Env, network: ActorCritic | None = None, teacher: Policy | None = None) -> TrainStep:
    """A rollout and an update of a run; `teacher` sees the privileged observation."""
    return TrainStep(config, env, network or make_network(config), teacher)


def _collect(
    config: Config, env: Env, network: ActorCritic, teacher: Policy | None, worlds: EnvState, run: RunState
) -> tuple[EnvState, jax.Array, Any]:
    """The worlds after a rollout, the run's next key, and what `_learn` wants beside the run."""
    key, rollout_key, update_key = jax.random.split(run.key, 3)
    collected = make_collector(config, env, network, run, teacher).rollout(worlds, rollout_key)
    return collected.env, key, (update_key, collected.transitions, collected.last_value, collected.vectors, collected.episodes)


def _learn(
    config: Config,
    network: ActorCritic,
    run: RunState,
    key: jax.Array,
    transitions: Transition,
    last_value: jax.Array,
    vectors: dict[str, jax.Array],
    episodes: dict[str, jax.Array],
) -> tuple[RunState, dict[str, jax.Array]]:
    optimizer, hp = make_optimizer(config), hyperparameters(config)
    opt_state = _schedule(config, run)
    batch = ppo.make_batch(transitions, last_value, config.gamma, config.gae_lambda)
    apply: Any = functools.partial(network.apply, method="with_state_error") if config.state_coef else network.apply
    distill = _linear(config, run.update, config.distill_coef, config.distill_coef_final)
    coef = Coefficients(config.ppo_coef, distill, config.state_coef)
    learning_rate = opt_state.hyperparams["learning_rate"]
    params, opt_state, metrics = ppo.update(run.params, opt_state, batch, key, apply, optimizer, hp, coef)
    if config.lr_schedule == "adaptive":
        assert config.target_kl is not None  # Config.validate
        opt_state = _adapt(opt_state, metrics["approx_kl"], config.target_kl)
    params = _cap_log_std(config, params, run.update + 1)
    stats = {name: _updated(stats, network.views(name, vectors[name])) for name, stats in run.stats.items()}
    metrics |= episodes | {"learning_rate": learning_rate}
    average = _averaged(config, run, params)
    return RunState(params, opt_state, stats, run.env, run.key, run.update + 1, average), metrics


def _updated(stats: RunningStats, x: jax.Array) -> RunningStats:
    """Statistics with one more batch, unless a number in it is not finite: that would stay in them for ever."""
    return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(x).all(), new, old), stats.update(x), stats)


def make_collector(config: Config, env: Env, network: ActorCritic, run: RunState, teacher: Policy | None = None) -> Collector:
    """The current policy in its worlds, and how they are stepped."""
    mix = _linear(config, run.update, config.teacher_mix, config.teacher_mix_final)
    pipelined = env.draws_ahead and config.n_envs % 2 == 0 and config.start_states != "archive"
    kind = PipelinedCollector if pipelined and config.double_buffer else Collector
    return kind(config, env, network, run.params, run.stats, teacher, mix)


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
