"""Figures of a run: every request counts, none is left out because it came late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_plugin.errors import InternalError

__all__ = ["Promise", "Served", "Summary", "quantile", "summarise"]


@dataclass(frozen=True, slots=True)
class Promise:
    """What a request is to keep: seconds to its first token, and mean seconds per later one."""

    ttft_s: float
    tpot_s: float


@dataclass(slots=True)
class Served:
    """What became of one request; times as its client sees them, negative while it waits."""

    number: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    instance: int = -1
    cached_tokens: int = 0
    num_preemptions: int = 0
    ttft_s: float = -1.0
    done_s: float = -1.0

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 if there is none."""
        if self.output_tokens < 2:  # noqa: PLR2004
            return 0.0
        return (self.done_s - self.at_s - self.ttft_s) / (self.output_tokens - 1)

    def keeps(self, promise: Promise) -> bool:
        """Whether both times are within the promise."""
        return self.ttft_s <= promise.ttft_s and self.tpot_s <= promise.tpot_s


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one run.  Times in seconds, shares between 0 and 1."""

    num_requests: int
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p90_s: float
    goodput: float
    """Share of requests that keep the promise."""
    hit_share: float
    """Of prompt tokens that were cached where they came."""
    imbalance: float
    """Busy time of the busiest instance over the mean."""
    busy_share: float
    """Of instances' time until the last arrival."""
    num_preemptions: int


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(
    served: Sequence[Served], busy_s: Sequence[float], promise: Promise, span_s: float
) -> Summary:
    """Condense a run.

    Args:
        served: all requests.
        busy_s: of each instance, how long it computed until the last arrival.
        promise: to be kept.
        span_s: from the first arrival to the last.

    Raises:
        InternalError: a request did not end.
    """
    lost = [one.number for one in served if one.ttft_s < 0 or one.done_s < 0]
    if lost:
        raise InternalError(f"{len(lost)} requests never ended, the first is number {lost[0]}")
    ttfts = [one.ttft_s for one in served]
    tpots = [one.tpot_s for one in served if one.output_tokens > 1]
    mean_busy_s = sum(busy_s) / len(busy_s)
    return Summary(
        num_requests=len(served),
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p90_s=quantile(ttfts, 0.9),
        ttft_p99_s=quantile(ttfts, 0.99),
        tpot_p90_s=quantile(tpots, 0.9) if tpots else 0.0,
        goodput=sum(one.keeps(promise) for one in served) / len(served),
        hit_share=sum(one.cached_tokens for one in served)
        / sum(one.prompt_tokens for one in served),
        imbalance=max(busy_s) / mean_busy_s if mean_busy_s else 1.0,
        busy_share=mean_busy_s / span_s if span_s else 0.0,
        num_preemptions=sum(one.num_preemptions for one in served),
    )
