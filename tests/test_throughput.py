"""What the benchmark of every layer says of shares."""

import types

import jax
import pytest

from benchmarks import throughput


def test_a_paired_share_is_the_median_of_ratios_and_leaves_the_first_pair_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine halves its speed after the second pair: the ratios do not notice."""
    clock = [0.0]
    speed = iter([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5])

    def takes(seconds: float) -> None:
        clock[0] += seconds / next(speed)

    compiling = iter([100.0])
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    share = throughput.paired_share(lambda: takes(3.0), lambda: takes(4.0 + next(compiling, 0.0)), repeats=3)
    assert share == pytest.approx(0.75)


def test_layers_are_measured_next_to_the_bare_one() -> None:
    flags = throughput.Flags(steps=2, repeats=1, paired=True)
    with jax.debug_key_reuse(False):  # it does the same again and again
        state = throughput.measure(flags, 2, "state").share
        physics = throughput.measure(flags, 2, "physics").share
    assert state is not None
    assert state > 0
    assert physics is None  # nothing is below it


def test_a_measurement_that_fails_is_told_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(throughput.Flags(worlds=(3,), steps=1, measure=("state-ppo",))) == 1  # a batch would be of none
    assert "| 3 | state-ppo | failed: --batch-size must be at least 1, got 0 |" in capsys.readouterr().out
