"""Arrivals are seeded, bunch in the bursts, and are the same traffic at every rate."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.errors import ConfigError

durations = st.floats(0.5, 120)
bursts = st.builds(
    Bursts, cycle_s=st.floats(2, 30), length_s=st.floats(0.1, 1.9), factor=st.floats(1, 20)
)


@settings(deadline=None)
@given(bursts, st.floats(0, 20), durations, st.integers(0, 9))
def test_as_many_as_the_rate_says_within_the_duration(
    shape: Bursts, rate: float, duration_s: float, seed: int
) -> None:
    times = shape.arrivals(rate, duration_s, seed)
    assert len(times) == round(rate * duration_s)
    assert all(0 <= time < duration_s or time == pytest.approx(duration_s) for time in times)
    assert times == shape.arrivals(rate, duration_s, seed)


@settings(deadline=None)
@given(bursts, st.floats(0, 10), st.floats(0, 10), durations, st.integers(0, 9))
def test_a_higher_rate_moves_no_arrival(
    shape: Bursts, low: float, more: float, duration_s: float, seed: int
) -> None:
    fewer = shape.arrivals(low, duration_s, seed)
    assert shape.arrivals(low + more, duration_s, seed)[: len(fewer)] == fewer


@settings(deadline=None)
@given(bursts, durations, st.integers(0, 9))
def test_one_burst_a_cycle(shape: Bursts, duration_s: float, seed: int) -> None:
    windows = shape.windows(duration_s, seed)
    cycle_s = duration_s / len(windows)
    assert len(windows) == max(1, round(duration_s / shape.cycle_s))
    for index, (begin, end) in enumerate(windows):
        assert index * cycle_s - 1e-6 <= begin < end <= (index + 1) * cycle_s + 1e-6
        assert (end - begin) / cycle_s == pytest.approx(shape.length_s / shape.cycle_s)


@pytest.mark.parametrize("factor", [1.0, 4.0, 10.0])
def test_the_rate_in_a_burst_is_so_much_higher(factor: float) -> None:
    shape = Bursts(cycle_s=10, length_s=2, factor=factor)
    times = shape.arrivals(1000, 20, "x")
    windows = shape.windows(20, "x")
    inside = sum(any(begin <= time < end for begin, end in windows) for time in times)
    ratio = (inside / 4) / ((len(times) - inside) / 16)
    assert ratio == pytest.approx(factor, rel=0.1)


def test_seeds_differ() -> None:
    assert Bursts().arrivals(1, 20, 0) != Bursts().arrivals(1, 20, 1)
    assert Bursts().windows(20, 0) != Bursts().windows(20, 1)


@pytest.mark.parametrize(("cycle_s", "length_s", "factor"), [(2, 2, 4), (2, 0, 4), (2, 1, 0.5)])
def test_bursts_that_are_none(cycle_s: float, length_s: float, factor: float) -> None:
    with pytest.raises(ConfigError, match="shorter than its cycle"):
        Bursts(cycle_s, length_s, factor)


def test_in_words() -> None:
    assert str(Bursts()) == "4 times the rate for 2 s of every 8 s"
