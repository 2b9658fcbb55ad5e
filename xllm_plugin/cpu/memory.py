"""`CpuMemoryDriver`: pages of a memory file, put behind reserved addresses.

Physical pages are parts of one anonymous file (memfd), so that one page can show at several
addresses.  What makes a fresh mapping dear on a CPU is not mmap (5 us) but its page tables: 512
entries for 2 MiB where the kernel gives a memory file no huge pages, measured 0.4 ms to fill and
0.1 ms to drop.  Each page's tables are therefore filled once, in a parking area, and moved from
there to the first address of the page and back (mremap with MREMAP_DONTUNMAP, Linux 5.13), about
10 us.  A page's further addresses get tables of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm_plugin.accelerator.page_books import BookedMemoryDriver, Placement
from xllm_plugin.cpu.vm_calls import VmCalls

if TYPE_CHECKING:
    import torch

__all__ = ["PAGE_BYTES", "CpuFence", "CpuMemoryDriver"]

PAGE_BYTES = 2 * 2**20
"""The huge page of x86-64 and of 64-bit ARM with 4 KiB base pages."""


@dataclass(frozen=True, slots=True)
class CpuFence:
    """The moment at which the work that was under way is done."""

    works: tuple[threading.Event, ...]

    def is_done(self) -> bool:
        """Say whether it is."""
        return all(work.is_set() for work in self.works)

    def wait(self) -> None:
        """Return when it is.  A thread inside `CpuMemoryDriver.working` would wait for itself."""
        for work in self.works:
            work.wait()


class CpuMemoryDriver(BookedMemoryDriver[int]):
    """A `MemoryDriver` over the machine's memory.

    A CPU does its work in the program's own threads: put it inside `working`, so that fences taken
    in other threads wait for it.

    Args:
        page_bytes: the size of a page; a multiple of the system's.
        capacity_bytes: how much may be created at once; the machine's memory by default.  Linux
            kills rather than refuses when its memory runs out, so whoever shares the machine gives
            this.
        calls: the kernel.
    """

    def __init__(
        self,
        *,
        page_bytes: int = PAGE_BYTES,
        capacity_bytes: int | None = None,
        calls: VmCalls | None = None,
    ) -> None:
        super().__init__(page_bytes)
        if page_bytes % mmap.PAGESIZE:
            raise ValueError(f"page of {page_bytes} bytes; give a multiple of {mmap.PAGESIZE}")
        if capacity_bytes is None:
            capacity_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.capacity_pages = capacity_bytes // page_bytes
        if not self.capacity_pages:
            raise ValueError(f"{capacity_bytes} bytes hold no page of {page_bytes}; give more")
        self._calls = calls or VmCalls()
        self._file = os.memfd_create("xllm-pages")
        num_bytes = self.capacity_pages * page_bytes
        os.ftruncate(self._file, num_bytes)
        self._parking = self._calls.reserve(num_bytes, page_bytes)
        self._calls.show(self._parking, num_bytes, self._file, 0)
        with contextlib.suppress(OSError):  # a kernel without huge pages for memory files
            self._calls.advise_huge(self._parking, num_bytes)
        self._num_used = 0  # slots of the file that ever held a page
        self._free_slots: list[int] = []  # of those, the lowest first
        self._works: set[threading.Event] = set()
        self._works_lock = threading.Lock()
        self._close = weakref.finalize(
            self, _close, self._calls, self._file, self._parking, num_bytes, self._ranges
        )
        # At exit the system takes everything back; other threads may still compute until then.
        self._close.atexit = False

    def close(self) -> None:
        """Give everything back: pages, mappings and ranges; nothing may use them any more."""
        self._close()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside the context the CPU does work that fences wait for."""
        work = threading.Event()
        with self._works_lock:
            self._works.add(work)
        try:
            yield
        finally:
            with self._works_lock:
                self._works.remove(work)
            work.set()

    def fence(self) -> CpuFence:
        """Mark the end of the work that is under way now."""
        with self._works_lock:
            return CpuFence(tuple(self._works))

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """An int8 tensor [num_bytes] over addresses of a reserved range, without a copy.

        Making it touches no memory, so the range need not be mapped; using an element does, and
        ends the process where no page is.  The tensor keeps the driver alive, not the mapping.

        Raises:
            ValueError: the bytes are not inside one reserved range.
        """
        import torch

        self._check_inside(address, num_bytes)
        array = (ctypes.c_int8 * num_bytes).from_address(address)
        array.driver = self  # type: ignore[attr-defined]  # the tensor holds the array, and it us
        return torch.frombuffer(array, dtype=torch.int8)

    # What the books ask for

    def _reserve(self, num_bytes: int) -> int:
        try:
            return self._calls.reserve(num_bytes, self._granularity_bytes)
        except (OSError, ctypes.ArgumentError, OverflowError) as error:
            raise MemoryError(f"no room for a range of {num_bytes} bytes: {error}") from error

    def _unreserve(self, address: int, num_bytes: int) -> None:
        self._calls.unmap(address, num_bytes)

    def _create(self, num_pages: int) -> Sequence[int]:
        num_left = len(self._free_slots) + self.capacity_pages - self._num_used
        if num_pages > num_left:
            raise MemoryError(
                f"{num_pages} pages asked for, {num_left} left of {self.capacity_pages}"
            )
        slots = [
            heapq.heappop(self._free_slots) for _ in range(min(num_pages, len(self._free_slots)))
        ]
        num_new = num_pages - len(slots)
        slots += range(self._num_used, self._num_used + num_new)
        self._num_used += num_new
        try:
            for start, count in _neighbours(slots):
                self._fill(start, count)
        except OSError as error:
            with contextlib.suppress(OSError):  # their memory is there for the next pages, then
                self._punch(slots)
            self._add_free(slots)
            raise MemoryError(f"no memory for {num_pages} pages: {error}") from error
        return slots

    def _fill(self, slot: int, num_pages: int) -> None:
        size = self._granularity_bytes
        try:
            self._calls.populate(self._park(slot), num_pages * size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Before Linux 5.14: the memory at least, so that no later access runs out of it.
            os.posix_fallocate(self._file, slot * size, num_pages * size)

    def _release(self, physicals: Sequence[int]) -> None:
        try:
            self._punch(physicals)
        except OSError as error:
            raise MemoryError(
                f"the kernel did not take {len(physicals)} pages back: {error}"
            ) from error
        self._add_free(physicals)

    def _punch(self, slots: Sequence[int]) -> None:
        size = self._granularity_bytes
        for start, count in _neighbours(sorted(slots)):
            self._calls.punch(self._file, start * size, count * size)

    def _add_free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            heapq.heappush(self._free_slots, slot)

    def _joins(self, before: Placement, after: Placement) -> bool:
        return before.alone == after.alone and before.physical + 1 == after.physical

    def _map_run(self, run: Sequence[Placement]) -> None:
        address, slot, alone = run[0]
        num_bytes = len(run) * self._granularity_bytes
        try:
            if not (alone and self._moved(self._park(slot), num_bytes, address)):
                self._calls.show(address, num_bytes, self._file, slot * self._granularity_bytes)
                self._populate_early(address, num_bytes)
        except OSError as error:
            # A mapping that fails may have taken away what was there before.
            with contextlib.suppress(OSError):
                self._calls.hold(address, num_bytes)
            raise _refused("map", len(run), error) from error

    def _unmap_run(self, run: Sequence[Placement]) -> None:
        address, slot, alone = run[0]
        num_bytes = len(run) * self._granularity_bytes
        if alone:
            self._moved(address, num_bytes, self._park(slot))
        try:
            self._calls.hold(address, num_bytes)
        except OSError as error:
            raise _refused("unmap", len(run), error) from error

    def _drop(self, placements: Sequence[Placement]) -> None:
        """Neighbours in one call, wherever their pages are; page tables are not kept."""
        size = self._granularity_bytes
        places = [placement.address // size for placement in placements]
        num_done = 0
        try:
            for start, count in _neighbours(places):
                self._calls.hold(start * size, count * size)
                num_done += count
        except OSError as error:
            # No more than what is gone: near the limit of mappings each call may be one too many.
            self._take_back(self._map_run, self._runs(placements[:num_done]))
            raise _refused("unmap", len(placements), error) from error

    def _moved(self, source: int, num_bytes: int, target: int) -> bool:
        """Move page tables where the kernel can; where not, only time is lost."""
        try:
            self._calls.move(source, num_bytes, target)
        except OSError:
            return False
        return True

    def _populate_early(self, address: int, num_bytes: int) -> None:
        with contextlib.suppress(OSError):  # the first access does it then
            self._calls.populate(address, num_bytes)

    def _park(self, slot: int) -> int:
        return self._parking + slot * self._granularity_bytes


def _neighbours(slots: Sequence[int]) -> list[tuple[int, int]]:
    """First and length of each run of consecutive numbers, of `slots` in order."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs


def _refused(what: str, num_pages: int, error: OSError) -> MemoryError:
    return MemoryError(
        f"the kernel refused to {what} {num_pages} pages: {error}; the number of mappings of a "
        "process is limited by vm.max_map_count (sysctl)"
    )


def _close(calls: VmCalls, file: int, parking: int, num_bytes: int, ranges: dict[int, int]) -> None:
    calls.unmap(parking, num_bytes)
    for address, size in ranges.items():
        calls.unmap(address, size)
    os.close(file)
