"""`gymnasium.make_vec("aloha_jax/Insertion-v0", num_envs=…)`: the same environment as a Gymnasium `VectorEnv`.

The only file, beside the judge's, that knows Gymnasium. JAX is imported when an environment is made, not before.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

ENV_ID = "aloha_jax/Insertion-v0"


def register() -> None:
    """Tell Gymnasium about our environments; harmless if done before."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(ENV_ID, vector_entry_point="aloha_jax.gym:AlohaVectorEnv")


class AlohaVectorEnv(VectorEnv):
    """N worlds with NumPy in and out; ended episodes are reset in the same step.

    What their last step had is in `infos["final_obs"]`, an observation per world (None where none has ended), and
    `infos["final_info"]`, in the form of Gymnasium's own vector environments. All infos are of the step just taken; there, those
    beside `final_info` are of the reset where an episode has ended.

    Args:
        num_envs: number of worlds.
        kwargs: as for `aloha_jax.make`, but for `autoreset`.

    Raises:
        ValueError: an argument is not one of its choices.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": [], "render_fps": 50}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, **kwargs: Any):
        import jax

        from aloha_jax.factory import MAX_SEED, make

        if not kwargs.get("autoreset", True):
            raise ValueError("autoreset is how Gymnasium steps worlds on: take aloha_jax.make for worlds that stop")
        self._jax, self._max_seed = jax, MAX_SEED
        self._env = make(num_envs=num_envs, **kwargs)
        self._reset, self._reset_from, self._step = (jax.jit(f) for f in (self._env.reset, self._env.reset_from, self._env.step))
        self._key: Any = None
        self._state: Any = None
        self.num_envs = num_envs
        self.single_observation_space = self._observation_space()
        if self._env.action == "delta":
            self.single_action_space = gymnasium.spaces.Box(-3.0, 3.0, (14,), np.float32)
        else:
            low, high = np.asarray(self._env.target_low), np.asarray(self._env.target_high)
            self.single_action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start every world anew; `options={"qpos": float[N, 30]}` from given joint positions.

        Raises:
            TypeError: `seed` is not one number, for all worlds.
            ValueError: `seed` is not one of JAX's, or there is another option.
        """
        if seed is not None and not isinstance(seed, int | np.integer):
            raise TypeError(f"reset takes one seed for all worlds, an int, not {seed!r}")
        if seed is not None and not 0 <= seed <= self._max_seed:
            raise ValueError(f"seed lies in 0..{self._max_seed}, not {seed}")
        if unknown := set(options or {}) - {"qpos"}:
            raise ValueError(f"reset has no option {', '.join(map(str, unknown))}, only qpos")
        if seed is not None or self._key is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
            self._key = self._jax.random.key(seed)
        self._key, key = self._jax.random.split(self._key)
        qpos = (options or {}).get("qpos")
        self._state = self._reset(key) if qpos is None else self._reset_from(np.asarray(qpos), key)
        return self._host(self._state.obs), _masked({"level": self._host(self._state.level)}, np.ones(self.num_envs, bool))

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step of every world with float[N, 14] actions."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        self._state = state = self._step(self._state, np.asarray(actions, np.float32))
        level, done = self._host(state.level), self._host(state.done)
        success = level == self._env.task.num_levels
        infos = _masked({"level": level, "is_success": success}, np.ones_like(done))
        if done.any():
            final = _masked({"level": np.where(done, level, 0), "is_success": success & done}, done)
            infos |= _masked({"final_obs": self._per_world(self._host(state.final_obs), done), "final_info": final}, done)
        reward, terminated, truncated = (self._host(x) for x in (state.reward, state.terminated, state.truncated))
        return self._host(state.obs), reward, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the renderer."""
        self._env.close()

    def _host(self, arrays: Any) -> Any:
        return self._jax.tree.map(np.array, arrays)  # copies: a view of JAX's is read-only, and wrappers write into these

    def _per_world(self, batch: Any, chosen: np.ndarray) -> np.ndarray:
        """An array of observations, None where no world is chosen."""
        each = np.full(self.num_envs, None, dtype=object)
        for world in np.flatnonzero(chosen):
            each[world] = self._jax.tree.map(lambda x: x[world].copy(), batch)  # noqa: B023 - called at once
        return each

    def _observation_space(self) -> gymnasium.Space:
        """Of one world; shapes and types are those of what a reset would give."""
        obs = self._jax.eval_shape(self._env.reset, self._jax.random.key(0)).obs
        spaces = self._jax.tree.map(_box, obs)
        return gymnasium.spaces.Dict(spaces) if isinstance(spaces, dict) else spaces


def _masked(infos: dict[str, Any], present: np.ndarray) -> dict[str, Any]:
    """With bool[N] `present` beside each info, under its name after an underscore, as Gymnasium has it."""
    return infos | {f"_{name}": present.copy() for name in infos}


def _box(batch: Any) -> gymnasium.spaces.Box:
    low, high = (0, 255) if batch.dtype == np.uint8 else (-np.inf, np.inf)
    return gymnasium.spaces.Box(low, high, batch.shape[1:], batch.dtype)
