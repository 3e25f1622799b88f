"""benchmarks/prediction.py: what it reads from the simulator's state, and that a policy acts on what it is told."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from aloha_jax import checkpoints
from aloha_jax.config import ConfigError
from aloha_jax.factory import make_from_config
from aloha_jax.networks import MirroredActorCritic
from aloha_jax.policy import Policy, init_params, init_stats
from aloha_jax.presets import PRESETS
from aloha_jax.scene import HALF_LENGTH
from benchmarks import prediction

PRETRAINED = Path(__file__).parents[1] / "pretrained"
PREDICTS = dataclasses.replace(PRESETS["smoke"], network="mirrored", privileged_critic=True, state_coef=1.0, engine="c")


def test_it_reads_what_it_names() -> None:
    env = make_from_config(dataclasses.replace(PREDICTS, obs="state", state_coef=0.0), 2)
    state = jax.block_until_ready(jax.jit(env.reset)(jax.random.key(0)))
    env.close()
    seen = np.asarray(MirroredActorCritic.views("privileged", state.privileged))
    geometry = jax.device_get(jax.jit(env.task.geometry)(state.physics))
    np.testing.assert_allclose(seen[..., prediction.FINGERTIPS].reshape(2, 2, 2, 3), geometry.fingertips, atol=1e-6)
    np.testing.assert_allclose(seen[..., prediction.POSITION], geometry.position, atol=1e-6)
    np.testing.assert_allclose(seen[..., prediction.ROTATION][..., ::2], geometry.rotation[..., 0], atol=1e-6)
    np.testing.assert_allclose(seen[..., prediction.HOLD], state.progress.grasp, atol=1e-6)
    end = geometry.position + HALF_LENGTH * geometry.rotation[..., 0]
    other = end[:, ::-1] * np.array([-1.0, -1.0, 1.0])
    np.testing.assert_allclose(seen[..., prediction.TO_OTHER], other - end, atol=1e-6)


def test_errors_are_in_millimetres_and_degrees() -> None:
    true = np.zeros((5, 2, 142))
    true[..., prediction.ROTATION.start] = 1.0  # along x
    predicted = true.copy()
    predicted[..., prediction.FINGERTIPS.start] = 0.003  # one of two fingertips
    predicted[..., prediction.POSITION] += [0.0, 0.003, 0.004]
    turned = [np.cos(0.1), 0.0, np.sin(0.1), 0.0, 0.0, 0.0]  # about z: the columns x and z, row by row
    predicted[..., prediction.ROTATION] = 2 * np.array(turned)
    found = prediction.errors(predicted, true)
    np.testing.assert_allclose(np.sort(found.fingertips), [0.0] * 10 + [3.0] * 10)
    np.testing.assert_allclose(found.position, 5.0)
    np.testing.assert_allclose(found.axis, np.degrees(0.1))
    assert prediction.median_and_most(found.position) == "5.0, 5.0"
    assert prediction.median_and_most(found.position[:0]) == "none held"


def test_a_policy_that_is_told_the_state_acts_on_it() -> None:
    env = make_from_config(PREDICTS, 2, autoreset=False)
    policy = Policy(PREDICTS, init_params(PREDICTS, jax.random.key(0)), init_stats(PREDICTS))
    state = jax.block_until_ready(jax.jit(env.reset)(jax.random.key(1)))
    env.close()
    (seeing, predicted, truth), (told, still_predicted, _) = (
        jax.jit(functools.partial(prediction.decide, policy, told))(state) for told in (False, True)
    )
    np.testing.assert_allclose(seeing, policy.act(state.obs), atol=1e-6)
    assert np.abs(seeing - told).max() > 1e-4
    np.testing.assert_array_equal(predicted, still_predicted)
    assert np.abs(predicted - truth).max() > 0.1
    seen = MirroredActorCritic.views("privileged", state.privileged)
    np.testing.assert_allclose(policy.stats["privileged"].denormalize(truth), seen, atol=1e-5)


def test_a_policy_that_predicts_nothing_is_told_so(tmp_path: Path) -> None:
    config, model = PRESETS["smoke"], tmp_path / "model"
    checkpoints.save_model(model, Policy(config, init_params(config, jax.random.key(0)), init_stats(config)))
    with pytest.raises(ConfigError, match="model: predicts no state"):
        prediction.main(prediction.Flags(model_path=str(model)))
    with pytest.raises(ConfigError, match="--only brightness: occurs in none of as it is; "):
        prediction.main(prediction.Flags(model_path=str(PRETRAINED / "insertion-pixels-robust"), only=("brightness",)))


@pytest.mark.slow
def test_a_policy_that_inserts_knows_where_things_are(capsys: pytest.CaptureFixture[str]) -> None:
    flags = prediction.Flags(model_path=str(PRETRAINED / "insertion-pixels-robust"), only=("as it is",), n_episodes=4)
    prediction.main(flags)
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["as it is", "4 of 4 (51%..100%)"]
    half = [float(cell.split(", ")[0]) for cell in row[2:]]
    assert max(half) < 15
    assert min(half) > 0.1
