"""Padded sizes learned from the sizes really seen.

Engines pad to a fixed ladder (xLLM: 1, 2, 4, 8, then multiples of 16).  Here the sizes are chosen
for the traffic: with few graphs, those that waste least.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

__all__ = ["learn_buckets", "wasted_tokens"]

NUM_SIZES = 48
"""Sizes looked at, the heaviest first: the search below is quadratic in them (some ms for 48)."""


def wasted_tokens(
    weights: Mapping[int, float], buckets: tuple[int, ...], max_padding: float
) -> float:
    """What `learn_buckets` makes least: tokens of padding, weighted.

    A size without a bucket counts as if it were padded to its double.
    """
    waste = 0.0
    for size, weight in weights.items():
        bucket = min((b for b in buckets if fits(size, b, max_padding)), default=2 * size)
        waste += weight * (bucket - size)
    return waste


def fits(size: int, bucket: int, max_padding: float) -> bool:
    """Whether a batch may be padded so far: padding is at most `max_padding` of the bucket."""
    return 0 <= bucket - size <= max_padding * bucket


def learn_buckets(
    weights: Mapping[int, float], max_buckets: int, max_padding: float
) -> tuple[int, ...]:
    """The sizes to have graphs for, ascending, so that `wasted_tokens` is least.

    Every bucket is a seen size: a smaller one serves the same batches with less padding.  Which
    sizes go together is found exactly, by dynamic programming over the sorted sizes: the best
    choice for the first j of them either leaves size j out, or ends with a bucket at j that
    serves a run of sizes below it.

    Args:
        weights: how often each size was seen; positive.
        max_buckets: how many to choose at most.
        max_padding: the largest part of a bucket that may be padding, 0 to 0.5.  With more, a batch
            would fit where it wastes more than without a graph.
    """
    heaviest = sorted(weights, key=lambda size: (-weights[size], size))[:NUM_SIZES]
    sizes = sorted(heaviest)
    total = [0.0, *accumulate(weights[size] for size in sizes)]
    tokens = [0.0, *accumulate(weights[size] * size for size in sizes)]
    # best[j]: waste and buckets for the first j sizes.
    best: list[tuple[float, tuple[int, ...]]] = [(waste, ()) for waste in tokens]
    for _ in range(max_buckets):
        better = [best[0]]
        for j, bucket in enumerate(sizes, start=1):
            waste, chosen = better[j - 1]
            found = min(best[j], (waste + weights[bucket] * bucket, chosen))
            for i in range(j - 1, -1, -1):
                if not fits(sizes[i], bucket, max_padding):
                    break
                padding = bucket * (total[j] - total[i]) - (tokens[j] - tokens[i])
                waste, chosen = best[i]
                if waste + padding < found[0]:
                    found = (waste + padding, (*chosen, bucket))
            better.append(found)
        if better == best:
            break
        best = better
    return best[-1][1]
