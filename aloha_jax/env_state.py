"""What a batch of worlds carries from step to step."""

from typing import NamedTuple

import jax

from aloha_jax.archive import Archive
from aloha_jax.engines import Physics
from aloha_jax.tasks.insertion import Progress

Observation = jax.Array | dict[str, jax.Array]


class Episode(NamedTuple):
    """Statistics of the episode that the step just taken belongs to, per world.

    Attributes:
        total_reward: float32[N], sum of rewards so far.
        length: int32[N], steps so far.
        best_level: int32[N], highest official level so far.
    """

    total_reward: jax.Array
    length: jax.Array
    best_level: jax.Array


class Domain(NamedTuple):
    """How an episode's world differs from the task's (domain randomization, Tobin et al. 2017), per world.

    Attributes:
        camera: float32[N, 2], how far the camera is off its place along x and y, metres; None if it never is.
        late: bool[N], whether actions take effect one control step late; None if they never do.
        pose_error: float32[N, 2, 6], by how much each arm's object seems off to whoever sees the state: metres and a rotation
            vector in radians, in the arm's frame; None if it is seen as it is.
    """

    camera: jax.Array | None = None
    late: jax.Array | None = None
    pose_error: jax.Array | None = None


class EnvState(NamedTuple):
    """N worlds after a step. The world axis leads every array but those of `archive`, which all worlds share.

    After `terminated` or `truncated`, `physics`, `obs` and `privileged` already belong to the next episode (autoreset), while
    `level`, `reward`, `episode` and everything called `final_` belong to the step just taken.

    Attributes:
        physics: the engine's state.
        target: float32[N, 14], control targets in gym_aloha's action meaning, as commanded last.
        progress: what the dense reward remembers.
        clock: int32[N], steps since reset.
        key: PRNG keys [N] for the starts to come.
        obs: the observation: uint8[N, H, W, 3] (`pixels`), float32[N, 142] (`state`), or both `pixels` and float32[N, 14]
            `agent_pos` in a dict (`pixels_agent_pos`); pixels perhaps in a dict with the last `target` float32[N, 14] and with
            `history` float32[N, 2 * lags * 7] (`history.recall`).
        privileged: float32[N, 142], what a critic may see whatever `obs` is.
        final_obs: like `obs`, before any autoreset; bootstraps truncated episodes.
        final_privileged: like `privileged`, before any autoreset.
        final_qpos: float32[N, 30], joint positions before any autoreset.
        reward: float32[N].
        arm_reward: float32[N, 2], the reward's share of each arm (dense), or half of it each.
        level: int32[N], official level 0..4 of the step just taken.
        terminated: bool[N], success (or an object lost, under the dense reward).
        truncated: bool[N], time limit (or physics that became invalid).
        invalid: bool[N], worlds whose physics or control targets became non-finite and were reset.
        episode: statistics.
        task_start: bool[N], whether the episode of the step just taken began at a start of the task, not at an archived state.
        next_task_start: bool[N], likewise of the step to come.
        history: float32[N, max lag + 1, 14], joint positions (with `pixels`: targets) of the last steps; None if nobody
            looks back.
        archive: states that episodes may start from; None if they always start as the task does.
        domain: what is off in the episodes that the next step belongs to.
    """

    physics: Physics
    target: jax.Array
    progress: Progress
    clock: jax.Array
    key: jax.Array
    obs: Observation
    privileged: jax.Array
    final_obs: Observation
    final_privileged: jax.Array
    final_qpos: jax.Array
    reward: jax.Array
    arm_reward: jax.Array
    level: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    invalid: jax.Array
    episode: Episode
    task_start: jax.Array
    next_task_start: jax.Array
    history: jax.Array | None
    archive: Archive | None
    domain: Domain

    @property
    def qpos(self) -> jax.Array:
        """float32[N, 30], joint positions (after any autoreset)."""
        return self.physics.qpos

    @property
    def done(self) -> jax.Array:
        """bool[N], whether the episode of the step just taken has ended."""
        return self.terminated | self.truncated


class Start(NamedTuple):
    """How an episode begins: qpos float32[30], qvel float32[28]; `of_task` bool[], or archived with its target float32[14]."""

    qpos: jax.Array
    qvel: jax.Array
    target: jax.Array
    of_task: jax.Array


class Moment(NamedTuple):
    """What observations are made of: of `EnvState` and, as `camera`, of its `domain`, in the same shapes."""

    physics: Physics
    target: jax.Array
    privileged: jax.Array
    history: jax.Array | None
    camera: jax.Array | None
