"""Which graph a batch runs on, and which graphs are worth their memory: pure functions of a view.

The same choices drive any device: `xllm_plugin.graph.cache` applies them to a `GraphBackend`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from xllm_plugin.graph.buckets import fits
from xllm_plugin.graph.mode import BatchShape, Decision, GraphKey, GraphMode, Reason

__all__ = ["GraphView", "choose", "evictions", "least_worth_first", "modes_for"]

HYSTERESIS = 2.0
"""A captured graph makes room only for one worth this much more, lest two of equal worth take
turns, each paying a capture."""


@dataclass(frozen=True, slots=True)
class GraphView:
    """What a choice depends on.

    Attributes:
        modes: that the device captures.
        max_tokens: larger batches run eager; there the device is busy anyhow.
        max_padding: the largest part of a graph's tokens that may be padding.
        ready: graphs that can be replayed.
        wanted: graphs that the sizes seen ask for.
        refused: wanted graphs that will not come for now, and why.
    """

    modes: frozenset[GraphMode]
    max_tokens: int
    max_padding: float
    ready: frozenset[GraphKey] = frozenset()
    wanted: frozenset[GraphKey] = frozenset()
    refused: Mapping[GraphKey, Reason] = field(default_factory=dict)


def modes_for(shape: BatchShape, modes: Iterable[GraphMode]) -> tuple[GraphMode, ...]:
    """The graph modes that can run such a batch, the best first."""
    order = (GraphMode.FULL, GraphMode.PARTIAL) if shape.is_decode else (GraphMode.PARTIAL,)
    available = frozenset(modes)
    return tuple(mode for mode in order if mode in available)


def choose(shape: BatchShape, view: GraphView) -> Decision:
    """The ready graph of the best mode with the least padding; else eager, and why."""
    modes = modes_for(shape, view.modes)
    if not modes:
        return Decision(None, Reason.UNSUPPORTED)
    if shape.num_tokens > view.max_tokens:
        return Decision(None, Reason.TOO_LARGE)
    for mode in modes:
        key = _least_padded(shape, mode, view.ready, view.max_padding)
        if key is not None:
            return Decision(key, Reason.READY)
    wanted = _least_padded(shape, modes[0], view.wanted, view.max_padding)
    if wanted is None:
        return Decision(None, Reason.TOO_RARE)
    return Decision(None, view.refused.get(wanted, Reason.NOT_CAPTURED))


def _least_padded(
    shape: BatchShape, mode: GraphMode, keys: Iterable[GraphKey], max_padding: float
) -> GraphKey | None:
    fitting = (
        key
        for key in keys
        if key.mode == mode
        and fits(shape.num_tokens, shape.num_tokens + key.padding(shape.num_tokens), max_padding)
    )
    return min(fitting, key=lambda key: (key.padding(shape.num_tokens), key), default=None)


def evictions(
    candidate: GraphKey,
    num_bytes: int,
    *,
    held_bytes: Mapping[GraphKey, int],
    uses: Mapping[GraphKey, float],
    budget_bytes: int,
    max_graphs: int,
) -> tuple[GraphKey, ...] | None:
    """What to drop so that a candidate fits, the least worth first.

    A graph is worth its uses for each byte: what one replay saves is about the same for all, the
    launches of one step.

    Args:
        candidate: not held.
        num_bytes: that it is expected to take.
        held_bytes: of the graphs captured.
        uses: how often each graph was or would have been used lately.
        budget_bytes: for all graphs.
        max_graphs: held at once.

    Returns:
        Nothing to drop as (), and None when the candidate is not worth what it would displace.
    """
    if num_bytes > budget_bytes:
        return None
    excess_bytes = sum(held_bytes.values()) + num_bytes - budget_bytes
    excess_graphs = len(held_bytes) + 1 - max_graphs
    dropped: list[GraphKey] = []
    for key in least_worth_first(held_bytes, uses):
        if excess_bytes <= 0 and excess_graphs <= 0:
            break
        if _worth(uses.get(key, 0.0), held_bytes[key]) * HYSTERESIS > _worth(
            uses.get(candidate, 0.0), num_bytes
        ):
            return None
        dropped.append(key)
        excess_bytes -= held_bytes[key]
        excess_graphs -= 1
    return tuple(dropped)


def least_worth_first(
    held_bytes: Mapping[GraphKey, int], uses: Mapping[GraphKey, float]
) -> list[GraphKey]:
    """Captured graphs in the order in which they are to go."""
    return sorted(held_bytes, key=lambda key: (_worth(uses.get(key, 0.0), held_bytes[key]), key))


def _worth(uses: float, num_bytes: int) -> float:
    return uses / max(num_bytes, 1)
