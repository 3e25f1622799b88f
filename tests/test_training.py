"""What a training step makes of a run, beyond the rollout and PPO's update in it."""

import dataclasses
from typing import Literal

import numpy as np
import pytest

from aloha_jax import training
from aloha_jax.config import Config
from aloha_jax.factory import make_from_config
from aloha_jax.networks import ARM_STATE_SIZE, RunningStats
from aloha_jax.presets import PRESETS

SMALL = dataclasses.replace(PRESETS["smoke"], obs="state", normalize_obs=True, n_envs=4, n_steps=8, batch_size=32, n_epochs=1)


def statistics(config: Config) -> RunningStats:
    """Of the state, after one training step."""
    env = make_from_config(config)
    run, _ = training.make_train_step(config, env)(training.init_run(config, env))
    return run.stats["state"]


@pytest.mark.parametrize("network", ["mirrored", "joint"])
def test_arms_that_share_a_network_are_whitened_alike(network: Literal["mirrored", "joint"]) -> None:
    """Else the network, whose arms see each other's blocks swapped, would see the same scene differently from either side."""
    stats = statistics(dataclasses.replace(SMALL, network=network))
    mirrored = network == "mirrored"
    assert stats.total == SMALL.rollout_size * (2 if mirrored else 1)
    for x in (stats.mean, stats.variance):
        left, right = np.asarray(x)[: 2 * ARM_STATE_SIZE].reshape(2, -1)
        assert np.ptp(left) > 0.1
        assert np.allclose(left, right, rtol=1e-5, atol=1e-12) == mirrored
