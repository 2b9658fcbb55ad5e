"""`MemoryDriver`: virtual address ranges over physical pages, whatever the device.

The shape is that of CUDA's virtual memory management (cuMemAddressReserve, cuMemCreate, cuMemMap,
cuMemUnmap, ...), which ACL (aclrtReserveMemAddress, ...) and memfd with mmap(MAP_FIXED) can both
fill.  `xllm_plugin.testing.conformance.check_memory_driver` is the contract as code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NewType, Protocol, runtime_checkable

__all__ = ["Fence", "MemoryDriver", "PageHandle"]

PageHandle = NewType("PageHandle", int)
"""Names one physical page to the driver that created it; a driver gives each out only once."""


@runtime_checkable
class Fence(Protocol):
    """A moment in the device's work, after which a page may be reused.

    The moment has passed when all work given to the device before `MemoryDriver.fence` is done;
    later work does not count, and a moment that has passed stays passed.
    """

    def is_done(self) -> bool:
        """Say whether the device has passed the moment; never blocks."""
        ...

    def wait(self) -> None:
        """Return when the device has passed the moment, and no earlier."""
        ...


@runtime_checkable
class MemoryDriver(Protocol):
    """Reserve ranges, create pages, map the one onto the other.

    Sizes and addresses are in bytes and multiples of `granularity_bytes`, and sizes are positive;
    anything else raises `ValueError`.  A call that raises, for whatever reason, changes nothing.

    Pages are created, mapped, unmapped and released several at a time, because a device does
    neighbours in one go: the longer the batch, the cheaper the page.  An empty batch does nothing.

    Calls come one at a time, but not always from one thread; `fence` alone, and what is asked of a
    fence, may come beside any other call: a step that gives pages up does not wait for a thread
    that unmaps.  No call waits for the device's work: before `unmap`, the caller sees to it that a
    fence taken after the last use has passed.
    """

    @property
    def granularity_bytes(self) -> int:
        """The size of a physical page; above one, the same at every call."""
        ...

    def reserve(self, num_bytes: int) -> int:
        """Reserve virtual addresses without memory behind them; return the first.

        The addresses are consecutive and belong to no other reserved range.

        Raises:
            MemoryError: the address space has no such range left.
        """
        ...

    def create(self, num_pages: int) -> list[PageHandle]:
        """Create physical pages of `granularity_bytes` each; their contents are undefined.

        Raises:
            ValueError: `num_pages` is negative.
            MemoryError: the device has less memory than that.
        """
        ...

    def map(self, pages: Mapping[int, PageHandle]) -> None:
        """Put each page at its address, inside a reserved range and not mapped; access works.

        One page may be mapped at several addresses; all of them show the same bytes.

        Args:
            pages: address -> page.

        Raises:
            ValueError: an address is not reserved, or mapped already, or a page is unknown.
            MemoryError: the device has no memory left for the mappings themselves.
        """
        ...

    def unmap(self, addresses: Collection[int], *, keep: bool = True) -> None:
        """Take the pages at `addresses` away; they, their contents and other addresses live on.

        Args:
            addresses: where.
            keep: False says that the pages go back next.  Those that show nowhere else live on
                with undefined contents then, and their next mapping may be dear.

        Raises:
            ValueError: nothing is mapped at one of them, or one is named twice.
            MemoryError: the device has no memory left to note it (a CPU splits its mappings).
        """
        ...

    def release(self, pages: Collection[PageHandle]) -> None:
        """Give physical pages back to the device; their handles are unknown from then on.

        Raises:
            MemoryError: the device does not take them now; all are still there, with undefined
                contents.
            ValueError: a page is unknown, still mapped somewhere, or named twice.
        """
        ...

    def unreserve(self, address: int, num_bytes: int) -> None:
        """Give a whole reserved range back.

        Raises:
            ValueError: it is not a range that `reserve` returned, or was given back already, or a
                page is mapped in it.
        """
        ...

    def fence(self) -> Fence:
        """Mark this moment in the device's work; also while another call is under way."""
        ...
