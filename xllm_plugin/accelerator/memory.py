"""`MemoryDriver`: virtual address ranges over physical pages, whatever the device.

The shape is that of CUDA's virtual memory management (cuMemAddressReserve, cuMemCreate, cuMemMap,
cuMemUnmap, ...), which ACL (aclrtReserveMemAddress, ...) and memfd with mmap(MAP_FIXED) can both
fill.  `xllm_plugin.testing.conformance.check_memory_driver` is the contract as code.
"""

from __future__ import annotations

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

    Calls come one at a time, but not always from one thread.  No call waits for the device's work:
    before `unmap`, the caller sees to it that a fence taken after the last use has passed.
    """

    @property
    def granularity_bytes(self) -> int:
        """The size of a physical page; a power of two above one, the same at every call."""
        ...

    def reserve(self, num_bytes: int) -> int:
        """Reserve virtual addresses without memory behind them; return the first.

        The addresses are consecutive and belong to no other reserved range.

        Raises:
            MemoryError: the address space has no such range left.
        """
        ...

    def create(self) -> PageHandle:
        """Create one physical page of `granularity_bytes`; its contents are undefined.

        Raises:
            MemoryError: the device is out of memory.
        """
        ...

    def map(self, address: int, page: PageHandle) -> None:
        """Put `page` at `address`, inside a reserved range and not mapped; read and write work.

        One page may be mapped at several addresses; all of them show the same bytes.

        Raises:
            ValueError: the address is not reserved, or mapped already, or the page is unknown.
            MemoryError: the device has no memory left for the mapping itself.
        """
        ...

    def unmap(self, address: int) -> None:
        """Take the page at `address` away; the page, its contents and its other addresses live on.

        Raises:
            ValueError: nothing is mapped at `address`.
        """
        ...

    def release(self, page: PageHandle) -> None:
        """Give the physical page back to the device; its handle is unknown from then on.

        Raises:
            ValueError: the page is unknown, or still mapped somewhere.
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
        """Mark this moment in the device's work."""
        ...
