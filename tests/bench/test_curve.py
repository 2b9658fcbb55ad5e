"""The one number of a serving benchmark, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.bench.curve import LoadPoint, at_bound, percentile
from xllm_plugin.errors import ConfigError


def curve(*points: tuple[float, float, float]) -> list[LoadPoint]:
    """Load, throughput and TPOT; TTFT is ten times the TPOT."""
    return [LoadPoint(load, speed, tpot, 10 * tpot) for load, speed, tpot in points]


def test_interpolates_between_the_loads_around_the_bound() -> None:
    found = at_bound(curve((1, 30, 20), (8, 140, 40), (16, 200, 60)), 50)
    assert (found.load, found.output_tok_s, found.ttft_ms) == (12, 170, 500)
    assert found.is_met
    assert found.is_limit


def test_order_of_points_does_not_matter() -> None:
    points = curve((16, 200, 60), (1, 30, 20), (8, 140, 40))
    assert at_bound(points, 50).output_tok_s == 170


def test_a_bound_never_reached_gives_the_best_measured_load() -> None:
    found = at_bound(curve((1, 30, 20), (8, 140, 40)), 50)
    assert (found.load, found.output_tok_s) == (8, 140)
    assert found.is_met
    assert not found.is_limit


def test_a_bound_broken_from_the_start_gives_nothing() -> None:
    found = at_bound(curve((1, 30, 70), (8, 140, 80)), 50)
    assert found.output_tok_s == 0
    assert not found.is_met


def test_a_point_on_the_bound_is_within_it() -> None:
    assert at_bound(curve((1, 30, 20), (8, 140, 50), (16, 150, 90)), 50).output_tok_s == 140


def test_of_several_crossings_the_best_counts() -> None:
    points = curve((1, 30, 40), (8, 100, 60), (16, 200, 40), (32, 300, 60))
    assert at_bound(points, 50).output_tok_s == 250


def test_throughput_that_falls_with_load_is_not_extrapolated() -> None:
    assert at_bound(curve((1, 100, 40), (8, 60, 60)), 50).output_tok_s == 100


def test_no_points_and_no_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="no load points"):
        at_bound([], 50)
    with pytest.raises(ConfigError, match="every request fail"):
        percentile([], 50)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.sampled_from([0, 10, 50, 90, 99, 100])
)
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
