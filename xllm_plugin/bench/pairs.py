"""Two sides that take turns: how surely their ratio is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

__all__ = ["CONFIDENCE", "MIN_PAIRS", "interval", "symmetric_interval"]

CONFIDENCE: Final = 0.95
MIN_PAIRS: Final = 6
"""The fewest values of which an interval of that confidence can be told, by either function."""


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the median of the values' distribution lies, whatever that distribution is.

    The k-th smallest and the k-th largest value, with the largest k for which fewer than k of n
    values fall on one side of the median so seldom (a coin's n throws) that both ends together are
    within the rest of the confidence.

    Raises:
        ValueError: there are too few values for that confidence (`MIN_PAIRS` for `CONFIDENCE`).
    """
    n = len(values)
    tail, k = 0.0, 0
    while 2 * (tail + math.comb(n, k) / 2**n) <= 1 - confidence:
        tail += math.comb(n, k) / 2**n
        k += 1
    if not k:
        raise ValueError(f"{n} values are too few for an interval of {confidence:.0%}")
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def symmetric_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Where the centre of the values' distribution lies, if that is symmetric.

    So is the logarithm of a ratio of two sides whose luck is alike.  Narrower than `interval`: the
    interval that belongs to the signed-rank test (F. Wilcoxon, "Individual comparisons by ranking
    methods", 1945; J. L. Hodges, E. L. Lehmann, 1963), the k-th smallest and the k-th largest mean
    of two values, each value with itself included.

    Raises:
        ValueError: there are too few values for that confidence (`MIN_PAIRS` for `CONFIDENCE`).
    """
    n = len(values)
    means = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    sums = [1] + [0] * len(means)  # how many subsets of the ranks have that sum
    for rank in range(1, n + 1):
        for total in range(len(means), rank - 1, -1):
            sums[total] += sums[total - rank]
    tail, k = 0, 0
    while 2 * (tail + sums[k]) / 2**n <= 1 - confidence:
        tail += sums[k]
        k += 1
    if not k:
        raise ValueError(f"{n} values are too few for an interval of {confidence:.0%}")
    return means[k - 1], means[-k]
