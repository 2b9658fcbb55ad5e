"""Intervals of ratios are those of the sign test and of the signed-rank test."""

from __future__ import annotations

import random

import pytest

from xllm_plugin.bench.pairs import MIN_PAIRS, interval, symmetric_interval


def test_the_interval_is_that_of_the_ordered_values() -> None:
    values = [float(n) for n in range(1, 25)]
    assert interval(values) == (7.0, 18.0)  # tables of the sign test: 24, 5 %
    assert interval(list(reversed(values))) == (7.0, 18.0)


def test_too_few_values_have_none() -> None:
    values = [float(n) for n in range(MIN_PAIRS)]
    assert interval(values) == (values[0], values[-1])
    with pytest.raises(ValueError, match=f"{MIN_PAIRS - 1} values are too few"):
        interval(values[1:])


def test_the_symmetric_interval_is_that_of_the_signed_rank_test() -> None:
    # Tables of Wilcoxon's test: 8 values, 5 %: a sum of 3 is still significant, so k = 4.
    values = [0.0, 1.0, 10.0, 100.0, 1000.0, 1e4, 1e5, 1e6]
    means = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    assert symmetric_interval(values) == (means[3], means[-4])
    assert symmetric_interval(values[::-1]) == (means[3], means[-4])


def test_too_few_values_have_no_symmetric_interval_either() -> None:
    values = [float(n) for n in range(MIN_PAIRS)]
    assert symmetric_interval(values) == (values[0], values[-1])
    with pytest.raises(ValueError, match=f"{MIN_PAIRS - 1} values are too few"):
        symmetric_interval(values[1:])


def test_the_symmetric_interval_holds_the_centre_as_often_as_it_says() -> None:
    draw = random.Random(0)
    found = [symmetric_interval([draw.gauss(1.0, 0.01) for _ in range(8)]) for _ in range(2000)]
    held = sum(low <= 1.0 <= high for low, high in found) / len(found)
    assert 0.95 <= held <= 0.975  # 1 - 2 * 5 / 256 = 0.961 by the table
