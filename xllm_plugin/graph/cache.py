"""`GraphCache`: the captured graphs of one device, under a memory budget."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from xllm_plugin.accelerator.graphs import GraphBackend, GraphHandle
from xllm_plugin.errors import InternalError
from xllm_plugin.graph.buckets import learn_buckets
from xllm_plugin.graph.config import GraphConfig
from xllm_plugin.graph.mode import BatchShape, Decision, GraphKey, GraphMode, Reason
from xllm_plugin.graph.policy import GraphView, choose, evictions, least_worth_first, modes_for

__all__ = ["GraphCache", "GraphStatistics"]

logger = logging.getLogger("vllm.xllm_plugin")


@dataclass(frozen=True, slots=True)
class GraphStatistics:
    """Counts since the start, and what is held now.

    Attributes:
        num_batches: by mode and reason.
        num_captures: that succeeded.
        num_evictions: graphs dropped to make room.
        num_padding_tokens: computed for nothing.
        held_bytes: of each captured graph, as measured when it was captured.
    """

    num_batches: Mapping[tuple[GraphMode, Reason], int]
    num_captures: int
    num_evictions: int
    num_padding_tokens: int
    held_bytes: Mapping[GraphKey, int]


@dataclass(frozen=True, slots=True)
class HeldGraph:
    handle: GraphHandle
    num_bytes: int


class GraphCache:
    """Decides how each batch runs, and keeps the graphs that the traffic is worth.

    One thread, a step at a time::

        decision = cache.decide(shape)
        if decision.key is None:  # eager, for decision.reason
            ...
        else:  # pad the batch into the graph's input tensors, then
            output = cache.replay(decision.key)
        cache.maintain(work)  # between steps: captures at most one graph

    Args:
        backend: of the device; this cache alone captures with it.
        modes: that it captures.
        config: limits.
        dynamic: one graph takes every batch, unpadded, so there are no sizes to learn.
    """

    def __init__(
        self,
        backend: GraphBackend,
        modes: frozenset[GraphMode],
        config: GraphConfig,
        *,
        dynamic: bool = False,
    ) -> None:
        self._backend = backend
        self._modes = modes - {GraphMode.EAGER}
        self._config = config
        self._dynamic = dynamic
        self._held: dict[GraphKey, HeldGraph] = {}
        self._refused: dict[GraphKey, Reason] = {}
        self._seen: dict[GraphMode, dict[int, float]] = {mode: {} for mode in self._modes}
        self._uses: dict[GraphKey, float] = {}
        self._wanted: frozenset[GraphKey] = frozenset()
        self._steps_to_replan = config.min_uses
        self._view = self._new_view()
        self._num_batches: Counter[tuple[GraphMode, Reason]] = Counter()
        self._num_captures = self._num_evictions = self._num_padding_tokens = 0

    def decide(self, shape: BatchShape) -> Decision:
        """Choose how a batch runs, and count it."""
        decision = choose(shape, self._view)
        self._num_batches[decision.mode, decision.reason] += 1
        if decision.key is not None:
            self._num_padding_tokens += decision.key.padding(shape.num_tokens)
        if shape.num_tokens <= self._config.max_tokens:
            for mode in modes_for(shape, self._modes)[:1]:
                seen = self._seen[mode]
                seen[shape.num_tokens] = seen.get(shape.num_tokens, 0.0) + 1
        self._steps_to_replan -= 1
        if self._steps_to_replan <= 0:
            self._replan()
        return decision

    def replay(self, key: GraphKey) -> Any:
        """Run a captured graph; see `GraphBackend.replay`.

        Raises:
            InternalError: it is not held; keys of `decide` are, until the next `maintain`.
        """
        if key not in self._held:
            raise InternalError(f"graph {key} is not held: replay follows decide")
        return self._backend.replay(self._held[key].handle)

    def maintain(self, work: Callable[[GraphKey], Callable[[], Any]]) -> GraphKey | None:
        """Capture the most used graph that is missing, if it is worth its memory.

        Whatever a capture raises, eager still serves: it is logged once, and not tried again.

        Args:
            work: makes what `GraphBackend.capture` runs, for a graph.

        Returns:
            The graph that was captured and kept, or None.
        """
        missing = self._wanted - self._held.keys() - self._refused.keys()
        if not missing:
            return None
        candidate = max(missing, key=lambda key: (self._uses[key], key))
        dropped = self._evictions_for(candidate)
        if dropped is None:
            self._refuse(candidate, Reason.OVER_BUDGET)
            return None
        for key in dropped:
            self._drop(key)
        self._capture(candidate, work)
        self._keep_to_budget(candidate)
        self._view = self._new_view()
        return candidate if candidate in self._held else None

    def drop_all(self) -> None:
        """Forget every graph, as before the model's weights move; they are captured again."""
        for key in tuple(self._held):
            self._backend.drop(self._held.pop(key).handle)
        self._view = self._new_view()

    def statistics(self) -> GraphStatistics:
        """Counts since the start, and what is held now."""
        return GraphStatistics(
            MappingProxyType(dict(self._num_batches)),
            self._num_captures,
            self._num_evictions,
            self._num_padding_tokens,
            MappingProxyType(self._held_bytes()),
        )

    def check_integrity(self) -> None:
        """Compare what is held with the limits, the device and the view.

        Raises:
            InternalError: they disagree.
        """
        found = {
            "memory over budget": self._backend.memory_used_bytes() > self._config.memory_bytes,
            "too many graphs": len(self._held) > self._config.max_graphs,
            "memory without graphs": not self._held and self._backend.memory_used_bytes() > 0,
            "the view is stale": self._view.ready != self._held.keys(),
            "held and refused": bool(self._held.keys() & self._refused.keys()),
        }
        broken = [what for what, holds in found.items() if holds]
        if broken:
            raise InternalError(f"graph cache: {', '.join(broken)}")

    def _replan(self) -> None:
        self._steps_to_replan = self._config.replan_steps
        self._uses = {}
        for mode, seen in self._seen.items():
            self._uses |= self._uses_of(mode, seen)
        self._wanted = frozenset(
            key for key, uses in self._uses.items() if uses >= self._config.min_uses
        )
        # What did not fit may do so now; what failed is not tried again.
        self._refused = {k: why for k, why in self._refused.items() if why is Reason.FAILED}
        self._view = self._new_view()
        for mode, seen in self._seen.items():
            self._seen[mode] = {size: uses / 2 for size, uses in seen.items() if uses >= 1}

    def _uses_of(self, mode: GraphMode, seen: dict[int, float]) -> dict[GraphKey, float]:
        """How often each graph of a mode, held or learned now, would have been used lately."""
        config = self._config
        if self._dynamic:
            keys = {GraphKey(mode, config.max_tokens, is_dynamic=True)}
        else:
            buckets = learn_buckets(seen, config.max_graphs, config.max_padding)
            keys = {GraphKey(mode, num_tokens) for num_tokens in buckets}
        keys |= {key for key in self._held if key.mode == mode}
        view = GraphView(self._modes, config.max_tokens, config.max_padding, frozenset(keys))
        uses = dict.fromkeys(keys, 0.0)
        for size, weight in seen.items():
            key = choose(BatchShape(size, is_decode=mode is GraphMode.FULL), view).key
            if key is not None:
                uses[key] += weight
        return uses

    def _evictions_for(self, candidate: GraphKey) -> tuple[GraphKey, ...] | None:
        like = [graph.num_bytes for key, graph in self._held.items() if key.mode == candidate.mode]
        return evictions(
            candidate,
            # The first of its mode is measured once it is there.
            max(like, default=0),
            held_bytes=self._held_bytes(),
            uses=self._uses,
            budget_bytes=self._config.memory_bytes,
            max_graphs=self._config.max_graphs,
        )

    def _capture(self, key: GraphKey, work: Callable[[GraphKey], Callable[[], Any]]) -> None:
        before_bytes = self._backend.memory_used_bytes()
        try:
            handle = self._backend.capture(work(key))
        except MemoryError:
            self._refuse(key, Reason.OVER_BUDGET)
        except Exception:  # a device raises anything in a capture; such batches run eager
            self._refuse(key, Reason.FAILED)
            logger.exception(
                "xllm-plugin: no %s graph for %d tokens; such batches run eager from now on.",
                key.mode,
                key.num_tokens,
            )
        else:
            num_bytes = max(0, self._backend.memory_used_bytes() - before_bytes)
            self._held[key] = HeldGraph(handle, num_bytes)
            self._num_captures += 1

    def _keep_to_budget(self, newest: GraphKey) -> None:
        """Drop the least worth until the measured memory fits."""
        while self._held and self._backend.memory_used_bytes() > self._config.memory_bytes:
            least = least_worth_first(self._held_bytes(), self._uses)[0]
            self._drop(least)
            if least == newest:
                self._refuse(newest, Reason.OVER_BUDGET)

    def _refuse(self, key: GraphKey, reason: Reason) -> None:
        self._refused[key] = reason
        self._view = self._new_view()

    def _drop(self, key: GraphKey) -> None:
        self._backend.drop(self._held.pop(key).handle)
        self._num_evictions += 1

    def _held_bytes(self) -> dict[GraphKey, int]:
        return {key: graph.num_bytes for key, graph in self._held.items()}

    def _new_view(self) -> GraphView:
        return GraphView(
            self._modes,
            self._config.max_tokens,
            self._config.max_padding,
            frozenset(self._held),
            self._wanted,
            MappingProxyType(dict(self._refused)),
        )
