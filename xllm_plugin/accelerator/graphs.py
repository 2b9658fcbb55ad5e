"""`GraphBackend`: capture work once, replay it whole, whatever the device.

`xllm_plugin.testing.conformance.check_graph_backend` is the contract as code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NewType, Protocol, runtime_checkable

__all__ = ["GraphBackend", "GraphHandle"]

GraphHandle = NewType("GraphHandle", int)
"""Names one captured graph to the backend that captured it."""


@runtime_checkable
class GraphBackend(Protocol):
    """Capture, replay, drop, memory used."""

    def capture(self, run: Callable[[], Any]) -> GraphHandle:
        """Capture the device work of `run`, which reads and writes tensors at fixed addresses.

        What `run` raises passes through, and nothing is kept.

        Raises:
            MemoryError: the device has no memory left for the graph.
        """
        ...

    def replay(self, graph: GraphHandle) -> Any:
        """Run the captured work again on the present contents of its input tensors.

        Returns:
            What `run` returned at capture, its tensors holding the new results.

        Raises:
            ValueError: the graph is unknown or dropped.
        """
        ...

    def drop(self, graph: GraphHandle) -> None:
        """Forget the graph and free its memory.

        Raises:
            ValueError: the graph is unknown or dropped.
        """
        ...

    def memory_used_bytes(self) -> int:
        """Memory held by all captured graphs; zero when there is none."""
        ...
