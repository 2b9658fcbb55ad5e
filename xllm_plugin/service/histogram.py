"""Counts durations by size: for Prometheus since the start, for people over the last moments."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Any, Final, Self

__all__ = ["BOUNDS_S", "Histogram"]

_STEPS_PER_DOUBLING: Final = 4
_NUM_DOUBLINGS: Final = 17
BOUNDS_S: Final = tuple(
    0.001 * 2 ** (step / _STEPS_PER_DOUBLING)
    for step in range(_STEPS_PER_DOUBLING * _NUM_DOUBLINGS + 1)
)
"""Upper ends of the buckets, 1 ms to 131 s, each 19 % over the one before; one more is open."""
_NUM_BUCKETS: Final = len(BOUNDS_S) + 1


class Histogram:
    """Durations of one kind.

    `counts` are since the start.  `quantile` looks at what came since the turn before the last one:
    who calls `turn` every N seconds sees the last N to 2 N of them.
    """

    __slots__ = ("_before", "_recent", "counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * _NUM_BUCKETS
        self.sum_s = 0.0
        self._before = [0] * _NUM_BUCKETS
        self._recent = [0] * _NUM_BUCKETS

    def observe(self, seconds: float) -> None:
        """Count one."""
        bucket = bisect_left(BOUNDS_S, seconds)
        self.counts[bucket] += 1
        self._recent[bucket] += 1
        self.sum_s += seconds

    def turn(self) -> None:
        """Forget what is older than the last turn."""
        self._before, self._recent = self._recent, [0] * _NUM_BUCKETS

    def quantile_s(self, part: float) -> float | None:
        """The duration that `part` of the last ones did not exceed, in seconds; None of none.

        Within a bucket the durations are taken as spread evenly, as Prometheus does.
        """
        counts = [old + new for old, new in zip(self._before, self._recent, strict=True)]
        wanted = part * sum(counts)
        if not wanted:
            return None
        bucket = bisect_left(list(accumulate(counts)), wanted)
        if bucket == len(BOUNDS_S):
            return BOUNDS_S[-1]
        low_s = BOUNDS_S[bucket - 1] if bucket else 0.0
        inside = (wanted - sum(counts[:bucket])) / counts[bucket]
        return low_s + inside * (BOUNDS_S[bucket] - low_s)

    def add(self, other: Histogram) -> None:
        """Count what another one has counted."""
        for bucket, count in enumerate(other.counts):
            if count:
                self.counts[bucket] += count
                self._recent[bucket] += count
        self.sum_s += other.sum_s

    def packed(self) -> tuple[float, dict[int, int]]:
        """Sum and counts by bucket, for `unpacked` in another process."""
        return self.sum_s, {bucket: count for bucket, count in enumerate(self.counts) if count}

    @classmethod
    def unpacked(cls, packed: Any) -> Self:
        """What `packed` gave, as counted just now."""
        found = cls()
        found.sum_s = packed[0]
        for bucket, count in packed[1].items():
            found.counts[bucket] = found._recent[bucket] = count
        return found

    def exposed(self) -> list[tuple[str, float]]:
        """Cumulative counts under Prometheus' `le`; every fourth bound, each twice the last."""
        totals = list(accumulate(self.counts))
        steps = range(0, len(BOUNDS_S), _STEPS_PER_DOUBLING)
        found = [(f"{BOUNDS_S[step]:g}", float(totals[step])) for step in steps]
        return [*found, ("+Inf", float(totals[-1]))]
