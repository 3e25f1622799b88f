"""Small environments for the learner, jittable and without physics: what `training` needs of an `Env`, from three functions."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from aloha_jax.config import Config
from aloha_jax.env import Env, Episode
from aloha_jax.networks import ActorCritic, Gaussian, as_inputs, normalize_inputs
from aloha_jax.policy import clip_action
from aloha_jax.training import RunState, init_run, make_train_step

World = Any


class ToyState(NamedTuple):
    """The fields of `EnvState` that `training` reads, and `world`, the state of N worlds."""

    world: World
    clock: jax.Array
    key: jax.Array
    obs: jax.Array
    privileged: jax.Array
    final_obs: jax.Array
    final_privileged: jax.Array
    reward: jax.Array
    arm_reward: jax.Array
    level: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    invalid: jax.Array
    episode: Episode
    task_start: jax.Array
    next_task_start: jax.Array

    @property
    def done(self) -> jax.Array:
        return self.terminated | self.truncated


class ToyEnv:
    """N worlds. A subclass describes one: `start`, `observe` and `move`; the rest is batching, the time limit and autoreset."""

    episode_length: int
    num_arms = 1
    draws_ahead = False

    def __init__(self, num_envs: int):
        self.num_envs = num_envs

    def start(self, key: jax.Array) -> World:
        """A world at the start of an episode."""
        raise NotImplementedError

    def observe(self, world: World) -> jax.Array:
        """Its observation, float32[size]."""
        raise NotImplementedError

    def move(self, world: World, action: jax.Array) -> tuple[World, jax.Array, jax.Array]:
        """One step with an action float32[size]: the world after it, reward (of each arm, if several), whether it terminated."""
        raise NotImplementedError

    def reset(self, key: jax.Array) -> ToyState:
        key, start_key = jax.random.split(key)
        world = jax.vmap(self.start)(jax.random.split(start_key, self.num_envs))
        obs = jax.vmap(self.observe)(world)
        integers, floats, no = (jnp.zeros(self.num_envs, dtype) for dtype in (int, float, bool))
        episode = Episode(floats, integers, integers)
        arms = jnp.zeros((self.num_envs, self.num_arms))
        return ToyState(world, integers, key, obs, obs, obs, obs, floats, arms, integers, no, no, no, episode, ~no, ~no)

    def step(self, state: ToyState, action: jax.Array) -> ToyState:
        world, reward, terminated = jax.vmap(self.move)(state.world, action)
        arm_reward = reward.reshape(self.num_envs, self.num_arms)
        reward = arm_reward.sum(axis=1)
        truncated = (state.clock + 1 >= self.episode_length) & ~terminated
        done = terminated | truncated
        final_obs = jax.vmap(self.observe)(world)
        key, start_key = jax.random.split(state.key)
        fresh = jax.vmap(self.start)(jax.random.split(start_key, self.num_envs))
        world = jax.tree.map(jax.vmap(jnp.where), jax.tree.map(lambda _: done, world), fresh, world)
        obs = jax.vmap(self.observe)(world)
        going_on = ~state.done
        episode = Episode(going_on * state.episode.total_reward + reward, going_on * state.episode.length + 1, state.level)
        clock = jnp.where(done, 0, state.clock + 1)
        return state._replace(
            world=world,
            clock=clock,
            key=key,
            obs=obs,
            privileged=obs,
            final_obs=final_obs,
            final_privileged=final_obs,
            reward=reward,
            arm_reward=arm_reward,
            terminated=terminated,
            truncated=truncated,
            episode=episode,
            task_start=state.next_task_start,
            next_task_start=state.next_task_start | done,
        )


def train(config: Config, env: ToyEnv, network: ActorCritic) -> tuple[RunState, list[dict[str, jax.Array]]]:
    """The run after `config.num_updates` updates by the real learner, and the metrics of each."""
    run = init_run(config, cast(Env, env), network)
    train_step = make_train_step(config, cast(Env, env), network)
    history = []
    for _ in range(config.num_updates):
        run, metrics = train_step(run)
        history.append(metrics)
    return run, history


def judge(run: RunState, network: ActorCritic, obs: jax.Array) -> tuple[Gaussian, jax.Array]:
    """What a run's networks say of observations float32[N, size]: actions and values."""
    apply: Any = network.apply
    return apply(run.params, normalize_inputs(as_inputs(obs), run.stats))


def returns(config: Config, env: ToyEnv, network: ActorCritic, run: RunState, key: jax.Array) -> jax.Array:
    """Undiscounted returns float32[N] of one episode in each world, acting without noise."""

    def step(state, _):
        distribution, _ = judge(run, network, state.obs)
        state = env.step(state, clip_action(config, distribution.mean))
        return state, state.reward

    return jax.jit(lambda: jax.lax.scan(step, env.reset(key), length=env.episode_length)[1].sum(axis=0))()
