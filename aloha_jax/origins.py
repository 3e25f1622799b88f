"""The models that a run starts from and learns from: the one whose parameters it begins with, and its teacher."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from aloha_jax.checkpoints import load_policy
from aloha_jax.config import Config, ConfigError
from aloha_jax.policy import Policy, init_params, init_stats

# What decides the shapes of parameters and of the statistics of observations.
SHAPING_FIELDS = (
    *("obs", "image_height", "image_width", "observe_target", "history", "normalize_obs"),
    *("network", "conv", "features_dim", "hidden_sizes", "privileged_critic", "state_coef"),
)
# What decides what those parameters mean.
MEANING_FIELDS = ("activation", "action", "obs", "observe_target", "history")
# The same of who sees pictures: other ones, or patches cut otherwise, may need parameters of the same shapes.
PICTURE_FIELDS = ("image_height", "image_width", "crop", "conv")


def load_teacher(config: Config) -> Policy | None:
    """The teacher of `config`, if it has one.

    Raises:
        CheckpointError: there is no model.
        ConfigError: it does not see the simulator's state, or its actions mean something else.
    """
    if config.teacher is None:
        return None
    shipped = Path(__file__).parents[1] / config.teacher  # where a preset finds its own, from wherever it is started
    teacher = load_policy(config.teacher if Path(config.teacher).exists() or not shipped.exists() else shipped, "--teacher")
    if teacher.config.obs != "state":
        raise ConfigError(f"--teacher {config.teacher} sees {teacher.config.obs}; it must be trained with --obs state")
    for name in ("task", "action"):
        theirs, ours = getattr(teacher.config, name), getattr(config, name)
        if theirs != ours:
            raise ConfigError(
                f"--teacher {config.teacher} was trained with --{name} {theirs}, this run has {ours}: give both the same"
            )
    return teacher


def with_teachers_grip(config: Config) -> Config:
    """`config` with its teacher's `grip_tolerance` unless it has its own: the teacher observes the grip measured by it.

    Raises:
        CheckpointError, ConfigError: as `load_teacher`, or the two do not go together.
    """
    teacher = load_teacher(config)
    if teacher is None or config.grip_tolerance is not None:
        return config
    tolerance = teacher.config.grip_tolerance
    if tolerance is not None and config.grip_height_tolerance is not None:
        raise ConfigError(
            f"--teacher {config.teacher} brings its --grip-tolerance {tolerance}, which asks for another height of the grip than "
            f"--grip-height-tolerance {config.grip_height_tolerance}: give --grip-height-tolerance None"
        )
    return dataclasses.replace(config, grip_tolerance=tolerance).validate()


def load_initial(config: Config) -> Policy | None:
    """The model that `config` starts from, if it does.

    Raises:
        CheckpointError: there is no model.
        ConfigError: its networks, observations or actions are not those of `config`.
    """
    if config.init_from is None:
        return None
    initial = load_policy(config.init_from, "--init-from")
    wanted = jax.eval_shape(lambda: (init_params(config, jax.random.key(0)), init_stats(config)))
    same_shapes = _shapes((initial.params, initial.stats)) == _shapes(wanted)
    meaning = MEANING_FIELDS + (PICTURE_FIELDS if config.has_pixels else ())
    names = meaning if same_shapes else dict.fromkeys(SHAPING_FIELDS + meaning)
    names = ("obs",) if config.obs != initial.config.obs else names  # most of the others then differ, too
    both = [(name, getattr(config, name), getattr(initial.config, name)) for name in names]
    differ = [f"--{name.replace('_', '-')} {here} here, {there} there" for name, here, there in both if here != there]
    if not same_shapes or differ:
        what = "other networks, observations or actions than this run"
        raise ConfigError(f"--init-from {config.init_from} has {what}: {'; '.join(differ)}")
    return initial


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.shape, tree)
