"""The configuration: a round trip through JSON, and every wrong setting named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from aloha_jax.config import FORMAT_VERSION, Config, ConfigError
from aloha_jax.presets import PRESETS
from aloha_jax.settings import NATURE_CNN

CONFIG = Config(n_envs=64, n_steps=32, batch_size=512)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_json(preset: str) -> None:
    config = PRESETS[preset]
    assert config.preset == preset
    if config.distill_coef > 0 and config.teacher is None:
        with pytest.raises(ConfigError, match="--teacher"):
            config.validate()
        config = dataclasses.replace(config, teacher="runs/state")
    assert Config.from_json(config.validate().to_json()) == config


def test_every_setting_survives_json() -> None:
    """Including those that no preset changes: optional numbers, tuples of tuples, a seed that float32 would round."""
    config = Config(
        crop=(1, 2, 3, 4),
        image_height=3,
        image_width=4,
        conv=((5, 2, 1), (6, 1, 1)),
        hidden_sizes=(),
        clip_range_vf=0.25,
        target_kl=0.01,
        microbatch_size=64,
        seed=2**32 - 1,
        log_dir="a 'quoted' ☃ folder",
        resume="elsewhere",
        overwrite=True,
    )
    back = Config.from_json(config.to_json())
    assert back == config
    assert isinstance(back.conv[0], tuple)
    assert hash(back) == hash(config)  # jit takes it as a static argument


def test_json_that_lacks_a_setting_takes_its_default() -> None:
    assert Config.from_json(json.dumps({"format_version": FORMAT_VERSION, "gamma": 0.5})) == Config(gamma=0.5)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"total_timesteps": 0}, "--total-timesteps"),
        ({"n_envs": 0}, "--n-envs"),
        ({"n_steps": -1}, "--n-steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": 1}, "--batch-size must be above 1"),
        ({"batch_size": 100}, "--batch-size"),  # of 2048
        ({"n_epochs": 0}, "--n-epochs"),
        ({"features_dim": 0}, "--features-dim"),
        ({"hidden_sizes": (64, 0)}, "--hidden-sizes"),
        ({"episode_length": 0}, "--episode-length"),
        ({"checkpoint_freq": 0}, "--checkpoint-freq"),
        ({"eval_freq": 0}, "--eval-freq"),
        ({"eval_episodes": 0}, "--eval-episodes"),
        ({"final_eval_episodes": -1}, "--final-eval-episodes"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"max_grad_norm": float("inf")}, "--max-grad-norm"),
        ({"clip_range": -0.2}, "--clip-range"),
        ({"gamma": 1.01}, "--gamma"),
        ({"gamma": float("nan")}, "--gamma"),
        ({"gae_lambda": -0.1}, "--gae-lambda"),
        ({"ent_coef": -0.1}, "--ent-coef"),
        ({"vf_coef": float("inf")}, "--vf-coef"),
        ({"log_std_init": float("nan")}, "--log-std-init"),
        ({"log_std_final": 1.0}, "--log-std-final"),  # above the initial 0
        ({"log_std_final": float("-inf")}, "--log-std-final"),
        ({"action_change_cost": -0.1}, "--action-change-cost"),
        ({"action_cost": -0.1}, "--action-cost"),
        ({"average_decay": 1.0}, "--average-decay"),
        ({"grip_tolerance": 0.0}, "--grip-tolerance"),
        ({"grip_tolerance": float("nan")}, "--grip-tolerance"),
        ({"grip_height_tolerance": 0.0}, "--grip-height-tolerance"),
        ({"grip_height_tolerance": 0.01, "grip_tolerance": 0.008}, "--grip-height-tolerance"),
        ({"grip_height_tolerance": float("inf")}, "--grip-height-tolerance"),
        ({"start_share": 1.5}, "--start-share"),
        ({"delay_share": -0.1}, "--delay-share"),
        ({"obs": "state", "pose_noise": 0.06}, "--pose-noise"),
        ({"obs": "state", "pose_noise": float("nan")}, "--pose-noise"),
        ({"obs": "pixels", "pose_noise": 0.002}, "--obs"),
        ({"friction_factor": 0.5}, "--friction-factor"),
        ({"mass_factor": float("nan")}, "--mass-factor"),
        ({"mass_factor": 2.0, "engine": "mjx"}, "--mass-factor"),
        ({"start_yaw": -1.0}, "--start-yaw"),
        ({"start_yaw": float("nan")}, "--start-yaw"),
        ({"start_shift": 0.04}, "--start-shift"),
        ({"ppo_coef": -1.0}, "--ppo-coef"),
        ({"ppo_coef": 0.0}, "--ppo-coef"),  # and nothing else to learn from
        ({"distill_coef": 1.0}, "--teacher"),
        ({"teacher_mix": 0.5}, "--teacher"),
        ({"teacher": "x", "distill_coef": -1.0}, "--distill-coef"),
        ({"teacher": "x", "distill_coef_final": float("nan")}, "--distill-coef-final"),
        ({"teacher": "x", "teacher_mix": 1.1}, "--teacher-mix"),
        ({"teacher": "x", "teacher_mix_final": -0.1}, "--teacher-mix-final"),
        ({"lr_schedule": "adaptive", "target_kl": 0.02, "learning_rate": 1e-6}, "--learning-rate"),
        ({"lr_schedule": "adaptive", "target_kl": 0.02, "teacher": "x", "teacher_mix": 1.0}, "--teacher-mix"),
        ({"obs": "state", "history": (2,)}, "--obs"),
        ({"obs": "state", "observe_target": True}, "--obs"),
        ({"obs": "state", "privileged_critic": True}, "--obs"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"action_clip": 0.0}, "--action-clip"),
        ({"clip_range_vf": -1.0}, "--clip-range-vf"),
        ({"target_kl": 0.0}, "--target-kl"),
        ({"microbatch_size": 0}, "--microbatch-size"),
        ({"microbatch_size": 100}, "--microbatch-size"),  # of 512
        ({"advantage_bins": 0}, "--advantage-bins"),
        ({"advantage_bins": 7}, "--advantage-bins"),  # of 512
        ({"advantage_bins": 128}, "--advantage-bins"),  # four each
        ({"advantage_bins": 8, "normalize_advantage": False}, "--advantage-bins"),
        ({"lr_schedule": "adaptive"}, "--lr-schedule"),  # without --target-kl
        ({"image_height": 0}, "--image-height"),
        ({"image_height": 481}, "--image-height"),
        ({"image_width": 0}, "--image-width"),
        ({"image_width": 641}, "--image-width"),
        ({"crop": (0, 0, 0, 10)}, "--crop"),
        ({"crop": (-1, 0, 10, 10)}, "--crop"),
        ({"crop": (400, 0, 81, 10)}, "--crop"),
        ({"crop": (0, 600, 10, 41)}, "--crop"),
        ({"conv": ((8, 0, 1),)}, "--conv"),
        ({"image_height": 35, "conv": NATURE_CNN}, "--conv"),  # Mnih's convolutions need 36 pixels
        ({"impl": "warp"}, "--impl"),  # without --engine mjx
        ({"engine": "c", "impl": "jax"}, "--impl"),
        ({"engine": "mjx", "impl": "jax", "physics": "exact"}, "--physics"),
        ({"keep_period": 0}, "--keep-period"),
        ({"n_envs": 2**31}, "--n-envs"),
        ({"n_envs": 2**20, "n_steps": 2**20}, "--n-steps"),  # 2^40 steps per update
        ({"total_timesteps": 2**31}, "--total-timesteps"),
        ({"features_dim": 10**12}, "--features-dim"),
        ({"log_dir": "a\0b"}, "--log-dir"),
        ({"resume": "runs/\udcff"}, "--resume"),
    ],
)
def test_a_wrong_setting_is_refused_by_the_name_of_its_flag(change: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(CONFIG, **change).validate()
    assert str(error.value).startswith(f"{flag} ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"image_height": 480, "image_width": 640, "crop": None},
        {"image_height": 36, "image_width": 36, "conv": NATURE_CNN},
        {"crop": (479, 639, 1, 1)},
        {"obs": "state", "image_height": 1},  # no picture, no convolution
        {"gamma": 1.0, "gae_lambda": 0.0, "final_eval_episodes": 0, "seed": 2**32 - 1},
        {"action_clip": None, "lr_schedule": "adaptive", "target_kl": 0.01},
        {"batch_size": 2048, "microbatch_size": 1},
        {"engine": "mjx", "impl": "warp", "physics": "exact"},
        {"engine": "mjx", "impl": "jax"},
    ],
)
def test_what_is_just_right_is_accepted(change: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **change)
    assert config.validate() is config


def test_a_setting_that_is_gone_is_overlooked_in_an_older_configuration() -> None:
    assert Config.from_json('{"format_version": 1, "gamma": 0.9, "carry": 4.0}') == Config(gamma=0.9)
    assert "carry" not in Config().to_json()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "format version None"),
        ('{"format_version": 999}', "format version 999"),
        ('{"format_version": 1, "gama": 0.9}', "unknown settings: gama"),
        ('{"format_version": 1, "gamma": "0.9"}', "gamma"),
        ('{"format_version": 1, "gamma": null}', "gamma"),
        ('{"format_version": 1, "gamma": 1' + 400 * "0" + "}", "gamma"),
        (50_000 * "[", "not valid JSON"),
        ('{"format_version": 0}', "format version 0"),
        ('{"format_version": 1, "n_envs": 4.0}', "n_envs"),
        ('{"format_version": 1, "n_envs": true}', "n_envs"),
        ('{"format_version": 1, "gamma": true}', "gamma"),
        ('{"format_version": 1, "obs": "smell"}', "obs is one of pixels, pixels_agent_pos, state"),
        ('{"format_version": 1, "obs": ["state"]}', "obs"),
        ('{"format_version": 1, "crop": [0, 0, 10]}', "crop"),
        ('{"format_version": 1, "crop": 5}', "crop"),
        ('{"format_version": 1, "conv": [[8, 4]]}', "conv"),
        ('{"format_version": 1, "hidden_sizes": ["64"]}', "hidden_sizes"),
        ('{"format_version": 1, "gamma": 2}', "--gamma"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        Config.load(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    if "--" not in says:
        assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        Config.load(path)


@pytest.mark.parametrize(("total", "updates"), [(1, 1), (64, 1), (65, 2), (640, 10)])
def test_updates_are_the_fewest_that_reach_the_total(total: int, updates: int) -> None:
    config = dataclasses.replace(PRESETS["smoke"], n_envs=4, n_steps=16, total_timesteps=total)
    assert (config.rollout_size, config.num_updates) == (64, updates)


@pytest.mark.parametrize(("obs", "pixels"), [("state", False), ("pixels", True), ("pixels_agent_pos", True)])
def test_only_observations_with_a_picture_have_pixels(obs: Any, pixels: bool) -> None:
    assert dataclasses.replace(CONFIG, obs=obs).has_pixels is pixels


def test_the_guides_preset_is_the_guides() -> None:
    guide = PRESETS["guide"]
    assert (guide.image_height, guide.image_width, guide.crop) == (480, 640, None)
    assert guide.conv == ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    assert (guide.features_dim, guide.hidden_sizes) == (512, (256, 256))
    assert (guide.learning_rate, guide.n_envs, guide.n_steps, guide.batch_size, guide.n_epochs) == (3e-4, 4, 2048, 64, 10)
    assert (guide.ent_coef, guide.gamma, guide.reward) == (0.01, 0.99, "shaped")
