"""What is saved can be loaded: whole, from anywhere, by anyone, or the reason why not is told."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aloha_jax import checkpoints, training
from aloha_jax.checkpoints import CheckpointError, CheckpointWriter, load_policy, save_model
from aloha_jax.config import Config, ConfigError
from aloha_jax.factory import make_from_config
from aloha_jax.policy import Policy, init_params, init_stats
from aloha_jax.presets import PRESETS
from tests.small_run import PIXELS, STATE, small_run
from tests.tiny_disk import tiny_disk

SMALL = dataclasses.replace(PRESETS["smoke"], obs="state")


@pytest.fixture(scope="module", params=[STATE, PIXELS], ids=["state", "pixels"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory, request.param).directory


@pytest.fixture(scope="module")
def state_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory, STATE).directory


def fresh_policy(config: Config = SMALL) -> Policy:
    """Statistics as after some updates, so that a lost one would show."""
    stats = {name: s.update(jnp.arange(5.0 * s.mean.size).reshape(1, 5, -1)) for name, s in init_stats(config).items()}
    return Policy(config, init_params(config, jax.random.key(3)), stats)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", fresh_policy())
    return tmp_path / "model"


def observations(config: Config, n: int) -> Any:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, config.image_height, config.image_width, 3), dtype=np.uint8)
    agent_pos = rng.normal(size=(n, 14)).astype(np.float32)
    if config.obs == "state":
        return rng.normal(size=(n, 142)).astype(np.float32)
    return {"pixels": pixels, "agent_pos": agent_pos} if config.obs == "pixels_agent_pos" else pixels


def assert_same_tree(a: Any, b: Any) -> None:
    """Bit for bit, in structure and types too."""

    def assert_same(x: Any, y: Any) -> None:
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(assert_same, a, b)


@pytest.mark.parametrize("part", ["best_model", "final_model", "checkpoints/64", "checkpoints/128"])
def test_a_model_needs_nothing_but_its_folder(trained: Path, tmp_path: Path, part: str) -> None:
    copy = Path(shutil.copytree(trained / part, tmp_path / "anywhere" / "renamed"))
    policy = load_policy(copy)
    assert policy.config == Config.load(trained / "config.json")
    assert_same_tree(policy.params, load_policy(trained / part).params)
    assert policy.act(observations(policy.config, 5)).shape == (5, 14)


def test_the_last_checkpoint_and_the_final_model_are_the_same_policy(trained: Path) -> None:
    newest = checkpoints.latest_checkpoint(trained)
    assert newest is not None
    final, last = load_policy(trained / "final_model"), load_policy(newest)
    assert_same_tree((final.params, final.stats), (last.params, last.stats))
    assert newest.name == str(final.config.total_timesteps)


def test_training_changed_the_policy(state_run: Path) -> None:
    first, last = (load_policy(state_run / "checkpoints" / step).params for step in ("64", "192"))
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True))


def test_a_run_stands_for_its_best_model_then_its_final_then_its_newest(state_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(state_run, tmp_path / "run"))
    for part in ("best_model", "final_model", "checkpoints/192", "checkpoints/128"):
        assert_same_tree(load_policy(run).params, load_policy(run / part).params)
        shutil.rmtree(run / part)


def test_the_run_of_a_model_is_the_one_it_lies_in(state_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(state_run, run)
    for model in (run, run / "best_model", run / "final_model", run / "checkpoints" / "192"):
        assert checkpoints.run_of(model) == run
    (tmp_path / "repository").mkdir()
    copied = tmp_path / "repository" / "model"
    (run / "best_model").rename(copied)
    (tmp_path / "checkpoints").mkdir()  # of something else
    assert checkpoints.run_of(copied) is None
    assert checkpoints.run_of(tmp_path / "repository") is None


def test_an_incomplete_checkpoint_is_passed_over(state_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(state_run / "checkpoints", run / "checkpoints")
    shutil.copytree(run / "checkpoints" / "64", run / "checkpoints" / "9999.orbax-checkpoint-tmp-7")
    (run / "checkpoints" / "10000").mkdir()
    assert checkpoints.latest_checkpoint(run) == run / "checkpoints" / "192"
    assert load_policy(run).config.obs == "state"


def test_a_saved_policy_acts_the_same_to_the_bit(model: Path) -> None:
    before, after = fresh_policy(), load_policy(str(model))
    assert after.config == before.config
    assert_same_tree((after.params, after.stats), (before.params, before.stats))
    obs = observations(SMALL, 7)
    np.testing.assert_array_equal(after.act(obs), before.act(obs))
    np.testing.assert_array_equal(after.act(obs, jax.random.key(1)), before.act(obs, jax.random.key(1)))


def test_a_policy_acts_on_any_number_of_observations(model: Path) -> None:
    policy = load_policy(model)
    obs = observations(SMALL, 3)
    mean = policy.act(obs)
    assert mean.shape == (3, 14)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(policy.act(obs[1:2])[0], mean[1], rtol=1e-5)
    sample, again, other = (policy.act(obs, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(sample, again)
    assert (sample != mean).any()
    assert (sample != other).any()


def test_a_newer_model_takes_the_place_of_an_older(model: Path) -> None:
    config = dataclasses.replace(SMALL, hidden_sizes=(8, 8))
    save_model(model, fresh_policy(config))
    assert load_policy(model).config == config
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_model_that_is_replaced_while_it_is_read_is_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it gone with the older one's folder, as when a run finds a better model."""
    better, restore = fresh_policy(dataclasses.replace(SMALL, hidden_sizes=(8, 8))), ocp.StandardCheckpointer.restore
    replaced = iter([better])

    def interrupted(*args: Any, **options: Any) -> Any:
        for policy in replaced:
            save_model(model, policy)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return restore(*args, **options)

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", interrupted)
    read = load_policy(model)
    assert read.config == better.config
    assert_same_tree(read.params, better.params)


def test_a_model_of_single_precision_is_not_called_damaged(model: Path) -> None:
    with jax.enable_x64(True), pytest.raises(ConfigError, match="single precision"):
        load_policy(model)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_failed_save_leaves_the_older_model(model: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise ValueError(f"ABSENT: Error writing file [OS error {number}: {errno.errorcode[number]} {os.strerror(number)}]")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        save_model(model, fresh_policy(dataclasses.replace(SMALL, hidden_sizes=(8, 8))))
    assert error.value.errno == number
    assert error.value.filename == str(model)
    assert load_policy(model).config == SMALL
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with tiny_disk(tmp_path / "disk") as disk:
        yield disk


def test_a_disk_that_is_really_full(disk: Path) -> None:
    save_model(disk / "model", fresh_policy())
    large = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)  # 4 MB that do not compress
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        save_model(disk / "model", Policy(SMALL, {"large": large}, {}))
    assert load_policy(disk / "model").config == SMALL

    writer = CheckpointWriter(disk / "checkpoints")
    writer.save(1, SMALL, {"w": np.zeros(3)}, {"x": np.zeros(2, np.float32)}, score=0.0)

    def save_too_much() -> None:
        writer.save(2, SMALL, {"w": large}, {"x": np.zeros(2, np.float32)}, score=1.0)
        writer.close()

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        save_too_much()
    assert checkpoints.latest_checkpoint(disk) == disk / "checkpoints" / "1"
    assert list((disk / "checkpoints").iterdir()) == [disk / "checkpoints" / "1"]


def test_what_a_failed_save_still_writes_is_removed(tmp_path: Path) -> None:
    """Orbax tells of the first item that failed, while its threads go on with the others."""
    unfinished = tmp_path / "2.orbax-checkpoint-tmp" / "policy"
    writes = threading.Event()

    def go_on_writing(until: float) -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                unfinished.mkdir(parents=True, exist_ok=True)
                (unfinished / f"{time.monotonic_ns()}").touch()
            writes.set()
            time.sleep(0.1)  # as a thread does that waits for its disk

    writer = CheckpointWriter(tmp_path)
    thread = threading.Thread(target=go_on_writing, args=[time.monotonic() + 0.5])
    thread.start()
    writes.wait()
    writer.close()
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_the_newest_three_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    def save(steps: dict[int, float | None]) -> set[int]:
        writer = CheckpointWriter(tmp_path)
        for step, score in steps.items():
            writer.save(step, SMALL, {"w": np.full(2, step)}, {"x": np.zeros(1, np.float32)}, score)
        writer.close()
        return {int(path.name) for path in tmp_path.iterdir()}

    assert save({1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.0, 6: 0.4}) == {2, 4, 5, 6}
    assert save({7: 0.5, 8: 0.6}) == {2, 6, 7, 8}  # another process knows which was the best
    assert save({9: 0.95, 10: 0.1, 11: 0.1, 12: 0.1}) == {9, 10, 11, 12}
    assert save({13: None, 14: 0.2, 15: None, 16: None}) == {9, 14, 15, 16}  # what was not evaluated is not the best


def test_the_first_checkpoint_of_every_period_is_kept_too(tmp_path: Path) -> None:
    """Steps come in rollouts of 70: none but the last is a multiple of the period 200."""

    def save(steps: range) -> set[int]:
        writer = CheckpointWriter(tmp_path, keep_period=200)
        for step in steps:
            writer.save(step, SMALL, {"w": np.full(2, step)}, {"x": np.zeros(1, np.float32)}, score=1.0 if step == 70 else 0.0)
        writer.close()
        return {int(path.name) for path in tmp_path.iterdir()}

    assert save(range(70, 701, 70)) == {70, 210, 420, 560, 630, 700}  # 70 is the best; 630 is the first beyond 600
    assert save(range(770, 1051, 70)) == {70, 210, 420, 630, 840, 910, 980, 1050}  # 1050 is the first beyond 1000


def test_restore_gives_back_what_was_saved(tmp_path: Path) -> None:
    policy, run = {"w": np.arange(3.0, dtype=np.float32)}, {"key": jax.random.key(7), "update": jnp.int32(5)}
    writer = CheckpointWriter(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        writer.restore(None, policy, run)
    for step in (10, 20):
        writer.save(step, SMALL, policy, run | {"update": jnp.int32(step)}, score=0.0, records={"seconds": 1.5})
    writer.close()
    writer = CheckpointWriter(tmp_path)
    step, restored_policy, restored_run, records = writer.restore(None, policy, run)
    assert (step, int(restored_run["update"]), records) == (20, 20, {"seconds": 1.5})
    assert_same_tree(restored_policy, policy)
    assert (jax.random.key_data(restored_run["key"]) == jax.random.key_data(run["key"])).all()
    assert int(writer.restore(10, policy, run).run["update"]) == 10
    with pytest.raises(CheckpointError, match=r"/20, which is damaged or does not fit"):
        writer.restore(None, {"w": np.zeros(4, np.float32)}, run)
    writer.close()


def test_whoever_changes_the_run_state_raises_its_format() -> None:
    """Write the new pair down here: older checkpoints are then told from damaged ones."""
    config = dataclasses.replace(SMALL, n_envs=2)
    env = make_from_config(config)
    state = jax.eval_shape(lambda: training.init_run(config, env))
    fields = [(jax.tree_util.keystr(path), leaf.dtype) for path, leaf in jax.tree.leaves_with_path(state)]
    sha256 = hashlib.sha256(f"{jax.tree.structure(state)} {fields}".encode()).hexdigest()
    assert (checkpoints.RUN_FORMAT, sha256[:8]) == (10, "5ff8b6c9")


def test_nothing_pickled_is_saved(trained: Path) -> None:
    """A pickle runs code when it is loaded; those of protocol 2 and later begin with 0x80 and the protocol."""
    for file in trained.rglob("*"):
        if file.is_file():
            assert not re.match(rb"\x80[\x02-\x05]", file.read_bytes()[:2]), file
            assert file.suffix not in (".pkl", ".pickle", ".npy", ".npz", ".pt"), file


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({"hidden_sizes": [16]}, {"hidden_sizes": [32, 32]}, {"normalize_obs": False}, {"network": "mirrored"}),
        *({"obs": "pixels"}, {"obs": "pixels_agent_pos"}, {"obs": "pixels", "image_height": 480, "image_width": 640}),
    ],
)
def test_a_network_other_than_its_configuration_says_is_refused(model: Path, changes: dict[str, Any]) -> None:
    edit_config(model, **changes)
    refuses(model, CheckpointError)


def refuses(model: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        load_policy(model)
    text = str(error.value)
    assert str(model) in text
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_another_format_version_is_refused(model: Path) -> None:
    edit_config(model, format_version=2)
    assert "version 2" in refuses(model, ConfigError)


def test_a_truncated_model_is_refused(model: Path) -> None:
    for file in model.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuses(model, CheckpointError)


def test_a_corrupt_model_is_refused(model: Path) -> None:
    for file in model.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    refuses(model, CheckpointError)


@pytest.mark.parametrize("file", ["manifest.ocdbt", "_METADATA"])
def test_a_model_that_lacks_a_file_is_refused(model: Path, file: str) -> None:
    (model / "policy" / file).unlink()
    refuses(model, CheckpointError)


def test_a_checkpoint_without_its_configuration_is_refused(state_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(state_run / "checkpoints" / "64", tmp_path / "64"))
    shutil.rmtree(copy / "config")
    refuses(copy, CheckpointError)
