"""The books that every memory driver keeps: what is reserved, which page is mapped where.

A real device answers a wrong call with a fault, a leak or silence.  `BookedMemoryDriver` refuses it
first, in the words of the contract, and takes a batch that the device fails half-way back, so that
a device's own driver only has to do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

from xllm_plugin.accelerator.memory import Fence, PageHandle

__all__ = ["BookedMemoryDriver", "Placement"]

PhysicalT = TypeVar("PhysicalT")


class Placement(NamedTuple):
    """One page at one address.

    Attributes:
        address: first byte of the mapping.
        physical: what the device calls the page.
        alone: the page is mapped nowhere else: before this `map`, or after this `unmap`.
    """

    address: int
    physical: Any
    alone: bool


@dataclass(slots=True)
class _Page(Generic[PhysicalT]):
    physical: PhysicalT
    num_mappings: int = 0


class BookedMemoryDriver(ABC, Generic[PhysicalT]):
    """A `MemoryDriver` that checks and counts; subclasses talk to the device.

    What a subclass implements is called with checked arguments only.  It raises `MemoryError` and
    then has changed nothing.

    Args:
        granularity_bytes: the size of a page; above one.
    """

    def __init__(self, granularity_bytes: int) -> None:
        if granularity_bytes < 2:  # noqa: PLR2004
            raise ValueError(f"granularity {granularity_bytes} is not above one")
        self._granularity_bytes = granularity_bytes
        self._handles = count(1)
        self._pages: dict[PageHandle, _Page[PhysicalT]] = {}
        self._mapped: dict[int, PageHandle] = {}
        self._ranges: dict[int, int] = {}  # first address -> bytes
        self._starts: list[int] = []  # the first addresses in order

    # The protocol

    @property
    def granularity_bytes(self) -> int:
        """The size of a page."""
        return self._granularity_bytes

    def reserve(self, num_bytes: int) -> int:
        """Reserve a range."""
        self._check_size(num_bytes)
        address = self._reserve(num_bytes)
        self._ranges[address] = num_bytes
        insort(self._starts, address)
        return address

    def create(self, num_pages: int) -> list[PageHandle]:
        """Create pages."""
        if num_pages < 0:
            raise ValueError(f"cannot create {num_pages} pages; give zero or more")
        handles = []
        for physical in self._create(num_pages) if num_pages else ():
            handles.append(handle := PageHandle(next(self._handles)))
            self._pages[handle] = _Page(physical)
        return handles

    def map(self, pages: Mapping[int, PageHandle]) -> None:
        """Put pages at addresses, neighbours together."""
        for address, handle in pages.items():
            self._check_free(address)
            self._page(handle)
        placements = []
        for address, handle in sorted(pages.items()):
            page = self._pages[handle]
            placements.append(Placement(address, page.physical, page.num_mappings == 0))
            page.num_mappings += 1  # the next one of the same page is not alone
        try:
            self._in_runs(placements, self._map_run, self._unmap_run)
        except BaseException:  # also Ctrl-C: the books are as before whatever stopped it
            for handle in pages.values():
                self._pages[handle].num_mappings -= 1
            raise
        self._mapped.update(pages)

    def unmap(self, addresses: Collection[int], *, keep: bool = True) -> None:
        """Take pages away, neighbours together."""
        wanted = sorted(addresses)
        handles = [self._mapped_at(address) for address in wanted]
        if len(set(wanted)) != len(wanted):
            raise ValueError("an address is named twice; name each once")
        placements = []
        for address, handle in zip(wanted, handles, strict=True):
            page = self._pages[handle]
            page.num_mappings -= 1
            placements.append(Placement(address, page.physical, page.num_mappings == 0))
        try:
            if keep:
                self._in_runs(placements, self._unmap_run, self._map_run)
            elif placements:
                self._drop(placements)
        except BaseException:  # as in `map`
            for handle in handles:
                self._pages[handle].num_mappings += 1
            raise
        for address in wanted:
            del self._mapped[address]

    def release(self, pages: Collection[PageHandle]) -> None:
        """Give pages back."""
        physicals = []
        for handle in pages:
            page = self._page(handle)
            if page.num_mappings:
                raise ValueError(f"page {handle} is still mapped at {page.num_mappings} addresses")
            physicals.append(page.physical)
        if len(set(pages)) != len(physicals):
            raise ValueError("a page is named twice; name each once")
        if physicals:
            self._release(physicals)
        for handle in pages:
            del self._pages[handle]

    def unreserve(self, address: int, num_bytes: int) -> None:
        """Give a range back."""
        if self._ranges.get(address) != num_bytes:
            raise ValueError(f"{num_bytes} bytes at {address:#x} are no range that was reserved")
        for at in range(address, address + num_bytes, self._granularity_bytes):
            if at in self._mapped:
                raise ValueError(f"a page is mapped at {at:#x}; unmap it first")
        self._unreserve(address, num_bytes)
        del self._ranges[address]
        self._starts.remove(address)

    @abstractmethod
    def fence(self) -> Fence:
        """Mark this moment in the device's work."""

    # What the device does

    @abstractmethod
    def _reserve(self, num_bytes: int) -> int: ...

    @abstractmethod
    def _unreserve(self, address: int, num_bytes: int) -> None: ...

    @abstractmethod
    def _create(self, num_pages: int) -> Sequence[PhysicalT]: ...

    @abstractmethod
    def _release(self, physicals: Sequence[PhysicalT]) -> None: ...

    @abstractmethod
    def _map_run(self, run: Sequence[Placement]) -> None:
        """Map neighbouring addresses, in order; also takes an `_unmap_run` back."""

    @abstractmethod
    def _unmap_run(self, run: Sequence[Placement]) -> None:
        """Unmap neighbouring addresses, in order; also takes a `_map_run` back."""

    def _drop(self, placements: Sequence[Placement]) -> None:
        """Unmap pages that go back next, in order of addresses."""
        self._in_runs(placements, self._unmap_run, self._map_run)

    def _joins(self, before: Placement, after: Placement) -> bool:
        """Say whether two pages at neighbouring addresses may be in one run."""
        del before, after
        return True

    # What this class does for it

    def _in_runs(self, placements: Sequence[Placement], do: Any, undo: Any) -> None:
        """Do all runs, or undo those done and raise; see `_take_back`."""
        done: list[Sequence[Placement]] = []
        try:
            for run in self._runs(placements):
                do(run)
                done.append(run)
        except BaseException:  # also Ctrl-C: half a batch would belong to nobody
            self._take_back(undo, done)
            raise

    @staticmethod
    def _take_back(undo: Any, done: Sequence[Sequence[Placement]]) -> None:
        """Undo runs, the last one first, as many as can be.

        Raises:
            RuntimeError: some could not, and the books say of them what is not so.
        """
        lost = []
        for run in reversed(done):
            try:
                undo(run)
            except MemoryError as error:
                lost.append((len(run), error))
        if lost:
            raise RuntimeError(
                f"the device stopped half-way, and {sum(num for num, _ in lost)} pages could not "
                f"be put back: {lost[0][1]}. Restart the engine."
            )

    def _runs(self, placements: Sequence[Placement]) -> list[list[Placement]]:
        runs: list[list[Placement]] = []
        for placement in placements:
            last = runs[-1][-1] if runs else None
            if (
                last is not None
                and last.address + self._granularity_bytes == placement.address
                and self._joins(last, placement)
            ):
                runs[-1].append(placement)
            else:
                runs.append([placement])
        return runs

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes <= 0 or num_bytes % self._granularity_bytes:
            raise ValueError(
                f"{num_bytes} bytes are no positive multiple of {self._granularity_bytes}"
            )

    def _check_inside(self, address: int, num_bytes: int) -> None:
        if not any(
            start <= address and address + num_bytes <= start + size
            for start, size in self._ranges.items()
        ):
            raise ValueError(f"{num_bytes} bytes at {address:#x} are not in one reserved range")

    def _check_free(self, address: int) -> None:
        if address % self._granularity_bytes:
            raise ValueError(f"address {address:#x} is no multiple of {self._granularity_bytes}")
        if address in self._mapped:
            raise ValueError(f"address {address:#x} is mapped already")
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._starts[place] + self._ranges[self._starts[place]]:
            raise ValueError(f"address {address:#x} is not reserved")

    def _page(self, handle: PageHandle) -> _Page[PhysicalT]:
        page = self._pages.get(handle)
        if page is None:
            raise ValueError(f"page {handle} is unknown or released")
        return page

    def _mapped_at(self, address: int) -> PageHandle:
        handle = self._mapped.get(address)
        if handle is None:
            raise ValueError(f"nothing is mapped at {address:#x}")
        return handle
