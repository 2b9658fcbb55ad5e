"""The NPU family's `GraphBackend`: torch_npu's NPUGraph.

Attention takes its lengths from the host, and a captured task would keep those of its capture.
torch_npu replaces them before each replay (`NPUGraph.update`), on a stream of its own, and the
replayed work waits for that alone: the host waits for nothing.  This file needs no vLLM.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch_npu  # noqa: F401  registers torch.npu

from xllm_plugin.accelerator.graphs import GraphHandle

__all__ = ["NpuGraphBackend"]

logger = logging.getLogger("vllm.xllm_plugin")

LENGTHS = "actual_seq_kvlen"
"""The argument of attention that differs from step to step and is the host's."""

STREAMS_RAN_OUT = re.compile(r"\b20700[58]\b")
"""CANN's errors: no resource, no stream (acl/error_codes/rt_error_codes.h)."""

num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, what its work returned, and the memory that it took."""

    graph: Any
    output: Any
    num_bytes: int


class NpuGraphBackend:
    """A `GraphBackend` over NPUGraph.

    Attributes:
        lengths: keys of each request in the next replay; None where no attention is captured.
    """

    def __init__(self) -> None:
        self.lengths: Sequence[int] | None = None
        self._graphs: dict[GraphHandle, Captured] = {}
        self._numbers = count(1)
        self._told_of_streams = False

    def capture(self, run: Callable[[], Any]) -> GraphHandle:
        """See `GraphBackend`."""
        graph = torch.npu.NPUGraph()
        torch.npu.synchronize()
        torch.npu.empty_cache()  # as the capture will, which must not count
        before_bytes = torch.npu.memory_reserved()
        stream, num_modes = torch.npu.current_stream(), num_dispatch_modes()
        try:
            with torch.npu.graph(graph, auto_dispatch_capture=True):
                output = run()
        except BaseException as error:  # raised again; half a capture keeps its memory
            # torch_npu leaves neither of these if its capture cannot begin or end.
            if num_dispatch_modes() > num_modes:
                graph.graph_dispatch_mode.__exit__(None, None, None)
            torch.npu.set_stream(stream)
            graph.reset()
            if self._finds_no_room(error):
                raise MemoryError(str(error)) from error
            raise
        handle = GraphHandle(next(self._numbers))
        num_bytes = max(0, torch.npu.memory_reserved() - before_bytes)
        self._graphs[handle] = Captured(graph, output, num_bytes)
        return handle

    def replay(self, graph: GraphHandle) -> Any:
        """See `GraphBackend`; `lengths` are put in first."""
        captured = self._get(graph)
        if self.lengths is not None:
            captured.graph.update([{LENGTHS: list(self.lengths)}])
        captured.graph.replay()
        return captured.output

    def drop(self, graph: GraphHandle) -> None:
        """See `GraphBackend`."""
        self._get(graph).graph.reset()
        del self._graphs[graph]
        torch.npu.empty_cache()

    def memory_used_bytes(self) -> int:
        """See `GraphBackend`; as measured at each capture."""
        return sum(captured.num_bytes for captured in self._graphs.values())

    def _finds_no_room(self, error: BaseException) -> bool:
        """Whether memory or streams ran out; of streams the log tells once."""
        errors = list(_with_causes(error))
        lacks_streams = any(STREAMS_RAN_OUT.search(str(one)) for one in errors)
        if lacks_streams and not self._told_of_streams:
            self._told_of_streams = True
            num_graphs = len(self._graphs)
            setting = f"graph.max_graphs to {num_graphs}" if num_graphs else "graph.mode to off"
            logger.warning(
                "xllm-plugin: the device has no streams or events for another graph beside the %d "
                "captured ones; steps of other sizes run eagerly. Set %s to keep to these, or end "
                "other processes on the device.",
                num_graphs,
                setting,
            )
        return lacks_streams or any(isinstance(one, torch.OutOfMemoryError) for one in errors)

    def _get(self, graph: GraphHandle) -> Captured:
        if graph not in self._graphs:
            raise ValueError(f"graph {graph} is unknown or dropped")
        return self._graphs[graph]


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised over: ending a capture that failed fails too."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__
