"""Intervals of ratios are those of the sign test."""

from __future__ import annotations

import pytest

from xllm_plugin.bench.pairs import MIN_PAIRS, interval


def test_the_interval_is_that_of_the_ordered_values() -> None:
    values = [float(n) for n in range(1, 25)]
    assert interval(values) == (7.0, 18.0)  # tables of the sign test: 24, 5 %
    assert interval(list(reversed(values))) == (7.0, 18.0)


def test_too_few_values_have_none() -> None:
    values = [float(n) for n in range(MIN_PAIRS)]
    assert interval(values) == (values[0], values[-1])
    with pytest.raises(ValueError, match=f"{MIN_PAIRS - 1} values are too few"):
        interval(values[1:])
