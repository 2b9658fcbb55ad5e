r"""Counters that all processes see: a table in anonymous shared memory, and no lock.

::

             slot 0          slot 1                 a line: 64 bytes, 8 integers, one cache line
    row 0    [line]          [line]     ...         written by worker 0 alone
    row 1    [line]          [line]     ...         written by worker 1 alone
                 \ readers add the rows up

Each integer has one writer, and aligned 8 bytes are stored at once, so nothing is torn or lost.  A
sum is as old as its oldest part: another worker may be adding to its row meanwhile.  What a worker
that died had counted is taken out by the control process, which alone knows that it is dead.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

__all__ = ["MAX_INSTANCES", "MAX_KEYS", "CounterTable", "SharedMemory"]

MAX_INSTANCES = 4096
MAX_KEYS = 16384
_WORDS = 8
_LINE_BYTES = 8 * _WORDS


class CounterTable:
    """Counters by slot.

    Args:
        words: of the whole table, as signed 64-bit integers.
        num_rows: how many workers write.
        writer: the row of this process; None: it only reads.
    """

    def __init__(self, words: memoryview, num_rows: int, writer: int | None) -> None:
        self._words = words
        self._row_words = len(words) // num_rows
        self._starts = [row * self._row_words for row in range(num_rows)]
        self._own = -1 if writer is None else self._starts[writer]
        self._columns: dict[int, tuple[int, list[memoryview]]] = {}
        """Word -> how many slots were asked for last, and their views: making them takes longer
        than reading them."""

    def add(self, slot: int, word: int, amount: int) -> None:
        """Count in this process's own row."""
        self._words[self._own + slot * _WORDS + word] += amount

    def own(self, slot: int, word: int) -> int:
        """Of this process alone."""
        return self._words[self._own + slot * _WORDS + word]

    def total(self, slot: int, word: int) -> int:
        """Of all workers."""
        words, offset = self._words, slot * _WORDS + word
        return sum([words[start + offset] for start in self._starts])

    def totals(self, word: int, num_slots: int) -> list[int]:
        """The same for the first `num_slots` slots."""
        known, columns = self._columns.get(word, (-1, []))
        if known != num_slots:
            end = num_slots * _WORDS
            columns = [self._words[start + word : start + end : _WORDS] for start in self._starts]
            self._columns[word] = num_slots, columns
        rows = [column.tolist() for column in columns]
        return rows[0] if len(rows) == 1 else list(map(sum, zip(*rows, strict=True)))

    def is_idle(self, slot: int, words: Sequence[int]) -> bool:
        """Whether nothing is counted there, in any row."""
        return all(
            self._words[start + slot * _WORDS + word] == 0
            for start in self._starts
            for word in words
        )

    def clear(self, row: int, words: Sequence[int], num_slots: int) -> None:
        """Take out what a worker had counted that is dead."""
        start = self._starts[row]
        for slot in range(num_slots):
            for word in words:
                self._words[start + slot * _WORDS + word] = 0


class SharedMemory:
    """Both tables: by instance and by API key.

    Pages that nobody has counted in take no memory.

    Args:
        num_rows: how many workers write.
        descriptor: of the memory; None: make it.
        writer: the row of this process; None: it only reads.

    Attributes:
        descriptor: to hand to workers.
        instances: by slot of an instance.
        keys: by slot of an API key.
    """

    def __init__(
        self, num_rows: int, *, descriptor: int | None = None, writer: int | None = None
    ) -> None:
        rows_bytes = num_rows * _LINE_BYTES
        num_bytes = rows_bytes * (MAX_INSTANCES + MAX_KEYS)
        if descriptor is None:
            descriptor = os.memfd_create("xllm-service")
            os.ftruncate(descriptor, num_bytes)
        self.descriptor = descriptor
        self._mapped = mmap.mmap(descriptor, num_bytes)
        words = memoryview(self._mapped).cast("q")
        border = num_rows * MAX_INSTANCES * _WORDS
        self.instances = CounterTable(words[:border], num_rows, writer)
        self.keys = CounterTable(words[border:], num_rows, writer)

    def close(self) -> None:
        """Give the descriptor back; the mapping goes with the last view of it."""
        os.close(self.descriptor)
