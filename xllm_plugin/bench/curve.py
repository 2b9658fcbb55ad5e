"""From load points to one number: the throughput a server reaches while it keeps its promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from xllm_plugin.errors import ConfigError

__all__ = ["AtBound", "LoadPoint", "at_bound", "percentile"]


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """What one load gave.  `load` is clients (closed loop) or requests a second (open loop)."""

    load: float
    output_tok_s: float
    tpot_ms: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class AtBound:
    """The best a server does within the bound.

    `is_met` is False if even the lightest load broke the bound (all figures are then those of
    no load: 0).  `is_limit` is False if the bound was never reached: the throughput is then that of
    a measured load, and more load might have given more.
    """

    load: float
    output_tok_s: float
    ttft_ms: float
    is_met: bool
    is_limit: bool


def at_bound(points: Sequence[LoadPoint], tpot_bound_ms: float) -> AtBound:
    """Highest output throughput whose TPOT is at most `tpot_bound_ms`.

    Candidates are every measured point within the bound, and every crossing of the bound between
    two neighbouring loads, where load, throughput and TTFT are interpolated linearly in TPOT.
    """
    if not points:
        raise ConfigError("no load points to interpolate; measure at least one load")
    ordered = sorted(points, key=lambda point: point.load)
    crossings = [
        _between(a, b, tpot_bound_ms)
        for a, b in pairwise(ordered)
        if (a.tpot_ms <= tpot_bound_ms) != (b.tpot_ms <= tpot_bound_ms)
    ]
    within = [point for point in ordered if point.tpot_ms <= tpot_bound_ms]
    if not within:
        return AtBound(0.0, 0.0, 0.0, is_met=False, is_limit=True)
    best = max([*within, *crossings], key=lambda point: point.output_tok_s)
    is_limit = ordered[-1].tpot_ms > tpot_bound_ms
    return AtBound(best.load, best.output_tok_s, best.ttft_ms, is_met=True, is_limit=is_limit)


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile with linear interpolation between ranks, as numpy's default."""
    if not values:
        raise ConfigError("no values to take a percentile of: did every request fail?")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _between(a: LoadPoint, b: LoadPoint, bound_ms: float) -> LoadPoint:
    share = (bound_ms - a.tpot_ms) / (b.tpot_ms - a.tpot_ms)

    def mix(x: float, y: float) -> float:
        return x + (y - x) * share

    return LoadPoint(
        load=mix(a.load, b.load),
        output_tok_s=mix(a.output_tok_s, b.output_tok_s),
        tpot_ms=bound_ms,
        ttft_ms=mix(a.ttft_ms, b.ttft_ms),
    )
