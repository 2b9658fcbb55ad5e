"""`GraphBackend`: capture work once, replay it whole, whatever the device.

`xllm_plugin.testing.conformance.check_graph_backend` is the contract as code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NewType, Protocol, runtime_checkable

__all__ = ["GraphBackend", "GraphHandle"]

GraphHandle = NewType("GraphHandle", int)
"""Names one captured graph to the backend that captured it; each is given out only once."""


@runtime_checkable
class GraphBackend(Protocol):
    """Capture, replay, drop, memory used."""

    def capture(self, run: Callable[[], Any]) -> GraphHandle:
        """Capture the device work of `run`, which reads and writes tensors at fixed addresses.

        What `run` raises passes through, and nothing is kept.  Devices differ in what else a
        capture does, so callers rely on none of it: how often `run` is called, at capture and at
        replay, and whether its tensors hold results before the first replay.  Captures do not nest.

        Raises:
            MemoryError: the device has no memory left for the graph; nothing is kept.
        """
        ...

    def replay(self, graph: GraphHandle) -> Any:
        """Run the captured work again on the present contents of its input tensors.

        Other graphs' results stay as they are.

        Returns:
            What `run` returned at capture, its tensors holding the new results: the same tensors
            at every replay, so the next one overwrites them.

        Raises:
            ValueError: the graph is unknown or dropped.
        """
        ...

    def drop(self, graph: GraphHandle) -> None:
        """Forget the graph and free its memory; other graphs live on.

        Raises:
            ValueError: the graph is unknown or dropped.
        """
        ...

    def memory_used_bytes(self) -> int:
        """Memory held by all captured graphs, their results included; zero when there is none."""
        ...
