"""Graph capture: what operators do meanwhile is written down, and a replay does it again.

The runtime (`runtime.c`) says whether a stream is captured and tells of replays.  An entry holds
host tensors over the memory that an operator reads and writes, so what it does depends on that
memory alone, as on a device: an address that was given to someone else shows as a wrong result.

What a device cannot do in a capture is refused: to give the host a value.  Unlike on a device,
captured work also runs once at its capture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from xllm_plugin.testing.cann.device.host import host_view

__all__ = ["Tape", "tape"]

LIBRARY = "libascendcl.so"


@dataclass(slots=True)
class Entry:
    """One operator's call.

    Attributes:
        run: does it on host tensors and returns new ones.
        results: host tensors over the device's memory, which take what `run` returns.
    """

    run: Callable[[], Any]
    results: list[torch.Tensor]

    def replay(self) -> None:
        """Do it again."""
        new = [one for one in tree_leaves(self.run()) if isinstance(one, torch.Tensor)]
        for result, value in zip(self.results, new, strict=True):
            if result.data_ptr() != value.data_ptr():  # what was written in place is given back
                result.copy_(value)


class Tape:
    """All captured graphs of this process, by the runtime's numbers."""

    def __init__(self) -> None:
        self.graphs: dict[int, list[Entry]] = {}
        self.groups: dict[int, Entry] = {}
        library = ctypes.CDLL(LIBRARY)
        self._capturing, self._group, self._updating = (
            ctypes.c_int32.in_dll(library, f"emulator_{name}")
            for name in ("capturing", "group", "updating")
        )
        told = ctypes.CFUNCTYPE(None, ctypes.c_int32)
        self._callbacks = (told(self.replay), told(self.forget))  # kept: the runtime calls them
        library.emulator_tell(*self._callbacks)

    def note(self, name: str, run: Callable[[], Any], results: Any) -> None:
        """Write down an operator's call, if a stream is captured.

        Args:
            name: of the operator.
            run: does what it does on host tensors.
            results: device tensors that take what `run` returns.

        Raises:
            RuntimeError: something that is no tensor is among them.
        """
        graph = self._capturing.value
        if not graph:
            return
        leaves = [one for one in tree_leaves(results) if one is not None]
        if not all(isinstance(one, torch.Tensor) for one in leaves):
            self.refuse_waiting(name)
        entry = Entry(run, [host_view(one) for one in leaves])
        self.graphs.setdefault(graph, []).append(entry)
        if self._group.value:
            self.groups[self._group.value] = entry

    def refuse_waiting(self, name: str) -> None:
        """Refuse what gives the host a value, if a stream is captured.

        Raises:
            RuntimeError: one is.
        """
        if self._capturing.value:
            raise RuntimeError(f"{name} waits for the device, which a captured stream cannot do")

    def replaces(self, run: Callable[[], Any]) -> bool:
        """Whether a task is being replaced: it is now `run`, which is not to be run yet."""
        group = self._updating.value
        if group:
            self.groups[group].run = run
        return bool(group)

    def replay(self, graph: int) -> None:
        """Do a graph's work again; the runtime calls this."""
        for entry in self.graphs.get(graph, ()):
            entry.replay()

    def forget(self, graph: int) -> None:
        """Drop a graph; the runtime calls this."""
        gone = {id(entry) for entry in self.graphs.pop(graph, [])}
        self.groups = {n: entry for n, entry in self.groups.items() if id(entry) not in gone}


tape = Tape()
"""Of this process: the runtime is one library, loaded once."""
