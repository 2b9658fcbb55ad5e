"""Two sides that take turns: how surely their ratio is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

__all__ = ["CONFIDENCE", "MIN_PAIRS", "interval"]

CONFIDENCE: Final = 0.95
MIN_PAIRS: Final = 6
"""The fewest values of which an interval of that confidence can be told."""


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
