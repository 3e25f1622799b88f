"""Input that nobody thought of: random configurations, flags and damaged files are taken whole or refused in one sentence."""

import contextlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aloha_jax import checkpoints, cli
from aloha_jax.checkpoints import CheckpointError, CheckpointWriter, digest, load_policy, save_model
from aloha_jax.config import Config, ConfigError
from aloha_jax.policy import Policy, init_params, init_stats
from aloha_jax.presets import PRESETS

SMALL = PRESETS["smoke"]
FIELDS = sorted(json.loads(SMALL.to_json()))
NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, math.nan, math.inf, -math.inf, True, None]
ODDITIES = st.sampled_from(NUMBERS) | st.text(max_size=8) | st.integers() | st.floats()
JSON = st.recursive(ODDITIES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2))


def require_one_sentence(error: Exception, names: str = "") -> None:
    text = str(error)
    assert text
    assert "Traceback" not in text
    assert names in text
    assert "\n" not in text or not names


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, max_size=3))
@example({"learning_rate": 10**400})
@example({"n_envs": 2**31})
@example({"log_dir": "a\0b"})
@example({"log_dir": "\udcff"})
def test_a_configuration_is_taken_whole_or_refused(changes: dict[str, Any]) -> None:
    try:
        config = Config.from_json(json.dumps(json.loads(SMALL.to_json()) | changes))
    except ConfigError as error:
        require_one_sentence(error)
    else:
        assert Config.from_json(config.to_json()) == config


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40) | st.text('[]{}",:0123456789eE+-.truefalsn ', max_size=60))
@example("[" * 100_000)
@example('{"format_version": ' + "9" * 5000 + "}")
def test_text_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_json(text)
    require_one_sentence(error.value)


FLAGS = st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS] + ["--", "-", "---", "--no-overwrite", "--no-seed"])
VALUES = st.sampled_from(["-1", "0", "1e400", "nan", "None", "", " ", "9" * 5000, "0x10", "1,2", "(1,)", "🤖", "../..", "--"])
WORDS = st.lists(
    FLAGS | VALUES | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6), max_size=6
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(WORDS.filter(lambda words: not {"-h", "--help"} & set(words)))
@example(["--n-envs", "9" * 5000])
def test_a_command_line_is_understood_or_refused(words: list[str]) -> None:
    try:
        config, given_flags = cli.parse_config(["--preset", "smoke", *words])
    except ConfigError as error:
        require_one_sentence(error)
    else:
        assert config.validate() == config
        assert given_flags <= set(FIELDS)


# --- Files ---------------------------------------------------------------------------------------------------------------------

DAMAGES = ["flip a bit", "truncate", "empty", "delete", "append", "swap for a folder"]


def damage(directory: Path, rng: random.Random) -> str:
    """Do something bad to one file; says what."""
    file = rng.choice(sorted(path for path in directory.rglob("*") if path.is_file()))
    kind, content = rng.choice(DAMAGES), bytearray(file.read_bytes())
    if kind == "flip a bit" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[rng.randrange(len(content) + 1) :]
    elif kind == "empty":
        content.clear()
    elif kind == "append":
        content += rng.randbytes(7)
    file.unlink()
    if kind == "swap for a folder":
        file.mkdir()
    elif kind != "delete":
        file.write_bytes(content)
    return f"{kind}: {file.relative_to(directory)}"


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = Config(obs="state", hidden_sizes=(8,), features_dim=8)
    return Policy(config, init_params(config, jax.random.key(0)), init_stats(config))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    save_model(directory, policy)
    return directory


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_model_is_refused_or_none_the_worse(
    model: Path, policy: Policy, tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    what = damage(copy, random.Random(seed))
    try:
        loaded = load_policy(copy)
    except (CheckpointError, ConfigError) as error:
        require_one_sentence(error, str(copy))
    else:
        assert digest((loaded.params, loaded.stats)) == digest((policy.params, policy.stats)), what
    assert capfd.readouterr().err == ""  # neither JAX nor Orbax, asyncio or TensorStore have something to add


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    run = tmp_path_factory.mktemp("fuzz") / "run"
    rng = np.random.default_rng(0)
    trees = {"w": rng.normal(size=(7, 5)).astype(np.float32)}, {"key": jax.random.key(7), "n": np.arange(99, dtype=np.int32)}
    writer = CheckpointWriter(run / "checkpoints")
    writer.save(64, SMALL, *trees, score=0.5, records={"best_score": 0.25, "logger": {"seconds": 1.5, "episodes": []}})
    writer.close()
    return run, *trees


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_checkpoint_is_refused_or_none_the_worse(checkpoint: tuple[Path, Any, Any], tmp_path: Path, seed: int) -> None:
    run, policy, state = checkpoint
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    what = damage(copy / "checkpoints" / "64", random.Random(1000 + seed))
    try:
        with contextlib.closing(CheckpointWriter(copy / "checkpoints")) as writer:
            restored = writer.restore(None, policy, state)
    except CheckpointError as error:
        require_one_sentence(error, str(copy))
    else:
        assert (digest(restored.policy), digest(restored.run)) == (digest(policy), digest(state)), what


@pytest.mark.parametrize("damaged", ["[1]", '{"rcore": 0.5}', '{"score": "half"}'])
def test_a_damaged_score_is_the_lowest(checkpoint: tuple[Path, Any, Any], tmp_path: Path, damaged: str) -> None:
    """It must not keep a run from being resumed, nor from saving."""
    run, policy, state = checkpoint
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "checkpoints" / "64" / "metrics" / "metrics").write_text(damaged)
    with contextlib.closing(CheckpointWriter(copy / "checkpoints")) as writer:
        assert digest(writer.restore(None, policy, state).run) == digest(state)
        for step in range(65, 69):
            writer.save(step, SMALL, policy, state, score=1 / step)
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"65", "66", "67", "68"}


@pytest.mark.parametrize(("saved", "damaged"), [("best_score", "best_scord"), ("0.25", "0.35"), ('"records"', '"recordr"')])
def test_damaged_records_are_noticed(checkpoint: tuple[Path, Any, Any], tmp_path: Path, saved: str, damaged: str) -> None:
    """One bit each, after which the file is JSON all the same."""
    run, policy, state = checkpoint
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "checkpoints" / "64" / "config" / "metadata"
    assert saved in file.read_text()
    file.write_text(file.read_text().replace(saved, damaged))
    with contextlib.closing(CheckpointWriter(copy / "checkpoints")) as writer, pytest.raises(CheckpointError) as error:
        writer.restore(None, policy, state)
    require_one_sentence(error.value, str(copy))


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["model.pkl", "policy/params.pkl", "policy/_METADATA", "policy/manifest.ocdbt", "config.json"])
def test_a_foreign_file_is_refused_and_never_executed(model: Path, tmp_path: Path, name: str) -> None:
    import pickle

    foreign = tmp_path / "foreign"
    if name != "model.pkl":
        shutil.copytree(model, foreign)
    (foreign / name).parent.mkdir(parents=True, exist_ok=True)
    (foreign / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    if name == "policy/params.pkl":  # beside a complete model: not looked at
        load_policy(foreign)
    else:
        for path in (foreign, foreign / name):
            with pytest.raises((CheckpointError, ConfigError)) as error:
                load_policy(path)
            require_one_sentence(error.value)
    assert not (tmp_path / "executed").exists()


def test_another_run_format_is_refused_in_one_sentence(
    checkpoint: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, policy, state = checkpoint
    writer = CheckpointWriter(Path(shutil.copytree(run, tmp_path / "run")) / "checkpoints")
    monkeypatch.setattr(checkpoints, "RUN_FORMAT", checkpoints.RUN_FORMAT + 1)
    with pytest.raises(CheckpointError, match=rf"/64 has run format {checkpoints.RUN_FORMAT - 1}; this program"):
        writer.restore(None, policy, state)
    writer.close()
