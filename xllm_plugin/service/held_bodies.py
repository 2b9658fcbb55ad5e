"""How much memory large bodies take together, of all clients: those that are read, wait or run.

Small ones are not counted: a connection has few of them (`limits.max_pipelined`), and a request
with one costs no more here than before.
"""

from __future__ import annotations

from typing import Final

__all__ = ["LARGE_BYTES", "BodyMemory", "HeldBodies"]

LARGE_BYTES: Final = 64 * 1024
"""Bodies over it count.  They also go past the HTTP parser, and none is read ahead behind one."""


class BodyMemory:
    """One for each public port.

    Args:
        max_bytes: that all may take; a setting, and may change.
    """

    __slots__ = ("max_bytes", "num_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0


class HeldBodies:
    """The large bodies of one connection.  What it counts is gone with `close` at the latest.

    Args:
        memory: that they are taken from.
    """

    __slots__ = ("_held_bytes", "_memory", "_read_bytes")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._held_bytes = 0
        """Of whole bodies."""
        self._read_bytes = 0
        """Of the one that is being read."""

    def read(self, num_bytes: int) -> bool:
        """So much of a body is here; returns whether there is room for it, else `drop` it."""
        self._memory.num_bytes += num_bytes - self._read_bytes
        self._read_bytes = num_bytes
        return self._memory.num_bytes <= self._memory.max_bytes

    def whole(self, num_bytes: int) -> bool:
        """A body is complete, for `done` later; returns whether there is room for it."""
        has_room = self.read(num_bytes)
        self._held_bytes += num_bytes
        self._read_bytes = 0
        return has_room

    def drop(self) -> None:
        """What is being read is thrown away."""
        self._memory.num_bytes -= self._read_bytes
        self._read_bytes = 0

    def done(self, num_bytes: int) -> None:
        """A request with a whole body of this size has its answer; nothing after `close`."""
        num_bytes = min(num_bytes, self._held_bytes)
        self._held_bytes -= num_bytes
        self._memory.num_bytes -= num_bytes

    def close(self) -> None:
        """The connection is gone, and all that it held."""
        self.drop()
        self.done(self._held_bytes)
