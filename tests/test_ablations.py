"""Ablations: each changes what it says and nothing else, is trained once, and comes into the table with the right figures."""

import csv
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from aloha_jax import cli
from aloha_jax.config import Config, ConfigError
from aloha_jax.presets import PRESETS
from benchmarks import ablations
from benchmarks.ablations import ABLATIONS, Flags

PRETRAINED = Path(__file__).parents[1] / "pretrained"
# What each changes in its recipe.
CHANGES = {
    "state": {},
    "state-absolute": {"action": "absolute"},
    "state-shaped": {"reward": "shaped"},
    "state-joint": {"network": "joint"},
    "state-task-starts": {"start_states": "task"},
    "state-one-bin": {"advantage_bins": 1},
    "state-half": {"start_share": 0.5},
    "state-average": {"average_decay": 0.98},
    "pixels": {},
    "pixels-64x64": {"crop": None, "image_height": 64, "image_width": 64},
    "pixels-84x84": {"crop": None, "image_height": 84, "image_width": 84},
    "pixels-120x160": {"crop": None, "image_height": 120, "image_width": 160},
    "pixels-cheap": {"physics": "fast", "render_quality": "fast"},
    "pixels-cheap-physics": {"physics": "fast"},
    "pixels-no-shadows": {"render_quality": "fast"},
    "pixels-few-worlds": {"n_envs": 128, "n_steps": 16},
    "pixels-no-state": {"state_coef": 0.0},
    "pixels-untaught": {},
    "pixels-untaught-no-state": {"state_coef": 0.0},
    "pixels-untaught-own-critic": {"state_coef": 0.0, "privileged_critic": False},
}
RECORDS = {"seed", "log_dir", "total_timesteps", "eval_freq", "eval_episodes", "checkpoint_freq", "final_eval_episodes"}


def configuration(flags: Flags, name: str, seed: int = 0) -> Config:
    return cli.parse_config(ablations.train_flags(flags, name, seed))[0]


def changes(config: Config, other: Config) -> dict[str, object]:
    names = [field.name for field in dataclasses.fields(Config) if field.name not in RECORDS]
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(other, name)}


def write_evaluations(directory: Path, *rows: tuple[float, ...]) -> None:
    """As `MetricsLogger` does; of each row the env steps, seconds, and shares that reached levels 1 to 4."""
    (directory / "eval").mkdir(parents=True)
    with (directory / "eval" / "evaluations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_steps", "seconds", "mean_reward", "success_rate", *(f"level_{k}" for k in (1, 2, 3, 4))])
        writer.writerows([steps, seconds, 7.5, levels[-1], *levels] for steps, seconds, *levels in rows)


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "state-guide"])
def test_an_ablation_changes_what_it_says_and_nothing_else(name: str) -> None:
    recipe = dataclasses.replace(PRESETS[ABLATIONS[name].recipe], teacher="t" if ABLATIONS[name].taught else None)
    assert changes(configuration(Flags(teacher="t"), name), recipe) == CHANGES[name]


def test_the_guide_on_the_state_is_the_guide() -> None:
    config = configuration(Flags(), "state-guide")
    worlds = {"n_envs": 64, "n_steps": 128}
    assert changes(config, PRESETS["guide"]) == {"obs": "state", "physics": "fast", "normalize_obs": True} | worlds
    assert config.rollout_size == PRESETS["guide"].rollout_size
    assert (config.action, config.reward, config.network, config.start_states) == ("absolute", "shaped", "joint", "task")
    assert (config.activation, config.hidden_sizes, config.batch_size, config.n_epochs) == ("tanh", (256, 256), 64, 10)
    assert (config.learning_rate, config.lr_schedule, config.ent_coef, config.gamma) == (3e-4, "constant", 0.01, 0.99)


@pytest.mark.parametrize("name", ABLATIONS)
def test_budget_and_records_are_the_same_for_all(name: str) -> None:
    own = {"state": 2_500_000, "pixels": 500_000, "pixels-ppo": 2_000_000}[ABLATIONS[name].recipe]
    for total, expected in ((1_000_000, 1_000_000), (None, own)):
        config = configuration(Flags(teacher="t", total_timesteps=total, out=Path("somewhere")), name, seed=7)
        assert (config.total_timesteps, config.eval_freq, config.eval_episodes) == (expected, expected // 10, 64)
        assert (config.seed, config.final_eval_episodes, config.log_dir) == (7, 0, f"somewhere/{name}/7")


def test_pixels_are_left_out_unless_there_is_a_teacher() -> None:
    assert Flags().names == tuple(name for name in ABLATIONS if name.startswith("state"))
    assert Flags(teacher="t").names == tuple(ABLATIONS)
    assert Flags(only=("pixels-untaught",)).names == ("pixels-untaught",)  # pure PPO needs none
    with pytest.raises(ConfigError, match="--teacher is needed by pixels-64x64"):
        _ = Flags(only=("pixels-64x64",)).names
    with pytest.raises(ConfigError, match="--only nonsense: there is no such ablation; there are state, "):
        _ = Flags(only=("nonsense",)).names


def test_table_and_json_have_the_last_evaluations_and_their_mean(tmp_path: Path) -> None:
    flags = Flags(only=("state", "state-joint"), seeds=(0, 1, 2), total_timesteps=1000, out=tmp_path / "runs")
    write_evaluations(tmp_path / "runs/state/0", (0, 3, 0, 0, 0, 0), (1024, 120, 1.0, 0.75, 0.5, 0.25))
    write_evaluations(tmp_path / "runs/state/1", (1024, 60, 0.5, 0.25, 0.0, 0.0))
    write_evaluations(tmp_path / "runs/state/2", (512, 30, 0.0, 0.0, 0.0, 0.0))  # cut off: not in the mean
    found = ablations.results(flags)
    assert found["state"]["mean"]["level_2"] == 0.5
    assert found["state-joint"] == {}
    assert ablations.table(found).splitlines()[2:] == [
        "| state | the recipe | 0 | 0.00 M | 2.0 | 100% | 75% | 50% | 25% |",
        "| state | the recipe | 1 | 0.00 M | 1.0 | 50% | 25% | 0% | 0% |",
        "| state | the recipe | 2 | 0.00 M | 0.5 | 0% | 0% | 0% | 0% |",
        "| **state** | **the recipe** | **mean** | **0.00 M** | **1.5** | **75%** | **50%** | **25%** | **12%** |",
    ]
    ablations.write_json(flags, found, tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["evaluation_episodes"] == 64
    assert figures["ablations"]["state"]["seeds"]["0"]["success_rate"] == 0.25
    assert figures["ablations"]["state"]["mean"]["success_rate"] == 0.125
    assert figures["ablations"]["state-joint"] | {"seeds": {}, "mean": None} == figures["ablations"]["state-joint"]
    assert figures["ablations"]["state-joint"]["flags"] == "--network joint"


def test_what_is_finished_is_left_and_what_was_cut_off_goes_on(tmp_path: Path) -> None:
    flags = Flags(total_timesteps=1000, out=tmp_path)
    directory, wanted = flags.directory("state", 0), ablations.train_flags(flags, "state", 0)
    assert ablations.what_is_left(directory, wanted) == wanted
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(configuration(flags, "state").to_json())
    assert ablations.what_is_left(directory, wanted) == [*wanted, "--overwrite"]  # cut off before its first checkpoint
    (directory / "checkpoints" / "500" / "policy").mkdir(parents=True)
    assert ablations.what_is_left(directory, wanted) == ["--resume", str(directory)]
    (directory / "final_model").mkdir()
    assert ablations.what_is_left(directory, wanted) is None
    unfilmed = dataclasses.replace(configuration(flags, "state"), checkpoint_freq=10, final_video=False)
    (directory / "config.json").write_text(unfilmed.to_json())
    assert ablations.what_is_left(directory, wanted) is None  # a run of one's own that learned the same
    other = ablations.train_flags(dataclasses.replace(flags, total_timesteps=2000), "state", 0)
    with pytest.raises(ConfigError, match="was trained with --total-timesteps 1000, not 2000"):
        ablations.what_is_left(directory, other)


def test_a_finished_run_that_took_its_teachers_grip_is_left(tmp_path: Path) -> None:
    flags = Flags(out=tmp_path, teacher=str(PRETRAINED / "insertion-scratch"))
    directory, wanted = flags.directory("pixels", 0), ablations.train_flags(flags, "pixels", 0)
    (directory / "final_model").mkdir(parents=True)
    trained = dataclasses.replace(configuration(flags, "pixels"), grip_tolerance=0.006)  # as `launch.execute` wrote it down
    (directory / "config.json").write_text(trained.to_json())
    assert ablations.what_is_left(directory, wanted) is None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], list[str]]:
    """Puts trainings that do nothing in place of real ones; told exit statuses by directory, returns the list they enter."""

    def replace(statuses: dict[str, int]) -> list[str]:
        seen: list[str] = []

        def train(args: list[str]) -> int:
            path = Path(args[args.index("--log-dir") + 1])
            seen.append(f"{path.parent.name}/{path.name}")
            return statuses.get(seen[-1], 0)

        monkeypatch.setattr(ablations, "train", train)
        return seen

    return replace


def test_one_failure_does_not_stop_the_others_but_a_signal_does(
    tmp_path: Path, started: Callable[[dict[str, int]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = Flags(only=("state", "state-joint"), seeds=(0, 1), out=tmp_path)
    seen = started({"state/1": 2})
    assert ablations.main(flags) == 1
    assert seen == ["state/0", "state/1", "state-joint/0", "state-joint/1"]
    assert "state, seed 1, ended with exit status 2" in capsys.readouterr().err
    seen = started({"state/1": 143})
    assert ablations.main(flags) == 143
    assert seen == ["state/0", "state/1"]
    seen = started({"state/0": -9})
    assert ablations.main(flags) == 137
    seen = started({})
    assert ablations.main(dataclasses.replace(flags, train=False)) == 0
    assert seen == []


def test_what_would_show_after_hours_is_refused_at_once(tmp_path: Path, started: Callable[[dict[str, int]], list[str]]) -> None:
    seen = started({})
    flags = Flags(only=("state",), seeds=(0,), out=tmp_path)
    with pytest.raises(ConfigError, match="--evaluations must be at least 1, got 0"):
        ablations.main(dataclasses.replace(flags, evaluations=0))
    with pytest.raises(ConfigError, match=r"--json .* is in a folder|--json .* is no file"):
        ablations.main(dataclasses.replace(flags, json=tmp_path))
    assert seen == []


def test_sigterm_reaches_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"os.kill({os.getpid()}, signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(ablations, "TRAIN", script)
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should it not be caught, the test fails and pytest lives
    try:
        assert ablations.train([]) == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)
