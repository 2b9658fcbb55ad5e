"""Durations by size: what Prometheus gets, and what people see of the last moments."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.service.histogram import BOUNDS_S, Histogram


def filled(durations_s: list[float]) -> Histogram:
    histogram = Histogram()
    for seconds in durations_s:
        histogram.observe(seconds)
    return histogram


@given(
    durations_s=st.lists(st.floats(0, 130), min_size=1, max_size=60),
    part=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(
    durations_s: list[float], part: float
) -> None:
    found = filled(durations_s).quantile_s(part)
    assert found is not None
    ordered = sorted(durations_s)
    rank = next(n for n in range(len(ordered)) if n + 1 >= part * len(ordered))
    bucket = bisect_left(BOUNDS_S, ordered[rank])
    low = BOUNDS_S[bucket - 1] if bucket else 0.0
    assert low <= found <= BOUNDS_S[bucket] * (1 + 1e-9)


def test_what_is_longer_than_every_bucket_is_shown_as_the_longest() -> None:
    assert filled([1000.0]).quantile_s(0.5) == BOUNDS_S[-1]


def test_people_see_what_came_since_the_turn_before_the_last() -> None:
    histogram = filled([0.1])
    histogram.turn()
    histogram.observe(10.0)
    assert (histogram.quantile_s(0.4) or 0) < 1 < (histogram.quantile_s(0.9) or 0)
    histogram.turn()
    assert (histogram.quantile_s(0.01) or 0) > 1
    histogram.turn()
    assert histogram.quantile_s(0.5) is None
    assert sum(histogram.counts) == 2


@given(st.lists(st.floats(0, 500), max_size=60))
def test_prometheus_gets_cumulative_counts(durations_s: list[float]) -> None:
    exposed = filled(durations_s).exposed()
    assert exposed[-1] == ("+Inf", len(durations_s))
    for bound, count in exposed[:-1]:
        assert count == sum(seconds <= float(bound) for seconds in durations_s)
