"""A stand-in for libcuda, under the real driver code: memory, events and one device.

It takes the place of the module `cuda.bindings.driver`: functions return ``(CUresult, value...)``
in the binding's own types, and answer misuse with the codes that CUDA documents.  A faulty kernel
access, which CUDA reports much later, raises `DeviceFaultError` at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from xllm_plugin.testing.fakes import Countdown, DeviceFaultError, PagedBytes, WorkQueue

__all__ = ["FakeCuda"]

DEVICE, CONTEXT = 0, 4096
FIRST_ADDRESS = 0x7F00_0000_0000
ADDRESS_SPACE_BYTES = 2**48


class FakeCuda(PagedBytes):
    """One device.

    Args:
        granularity_bytes: the size of a page.
        capacity_pages: how many pages the device has.

    `faults["cuMemMap"].set(n)` makes the n-th such call from now run out of memory.
    """

    def __init__(self, *, granularity_bytes: int = 64, capacity_pages: int = 16) -> None:
        from cuda.bindings import driver

        self._types = driver
        self._ok = driver.CUresult.CUDA_SUCCESS
        self.granularity_bytes = granularity_bytes
        self.capacity_pages = capacity_pages
        self.faults = {name: Countdown() for name in ("cuMemCreate", "cuMemMap", "cuMemSetAccess")}
        self.calls: list[str] = []
        self._handles = count(1)
        self._next_address = FIRST_ADDRESS
        self._ranges: dict[int, int] = {}
        self._contents: dict[int, bytearray] = {}  # handle -> bytes, while anything refers to it
        self._held: set[int] = set()  # handles not yet released
        self._mapped: dict[int, int] = {}  # address -> handle
        self._accessible: set[int] = set()  # addresses
        self._threads = threading.local()
        self._work = WorkQueue()
        self._events: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        """Types and constants are the binding's; functions that are not faked do not exist."""
        if name.startswith("cu"):
            raise AttributeError(f"FakeCuda has no {name}")
        return getattr(self._types, name)

    # Device and context

    def cuInit(self, flags: int) -> Any:
        return self._answer("cuInit", flags == 0)

    def cuDeviceGet(self, ordinal: int) -> Any:
        code = self._types.CUresult.CUDA_ERROR_INVALID_DEVICE
        return (self._ok, DEVICE) if ordinal == 0 else (code, None)

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return self._answer("cuDevicePrimaryCtxRetain", device == DEVICE, CONTEXT)

    def cuDevicePrimaryCtxRelease(self, device: int) -> Any:
        return self._answer("cuDevicePrimaryCtxRelease", device == DEVICE)

    def cuCtxPushCurrent(self, context: int) -> Any:
        self._stack().append(context)
        return (self._ok,)

    def cuCtxPopCurrent(self) -> Any:
        return self._ok, self._stack().pop()

    # Memory

    def cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> Any:
        good = properties.location.id == DEVICE and option in (0, 1)
        return self._answer("cuMemGetAllocationGranularity", good, self.granularity_bytes)

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> Any:
        room = self._next_address + size <= ADDRESS_SPACE_BYTES
        good = room and size % self.granularity_bytes == 0 and flags == 0 and address == 0
        if not good or alignment & (alignment - 1):
            return self._answer("cuMemAddressReserve", False, None)
        start = self._next_address
        self._next_address += size + self.granularity_bytes
        self._ranges[start] = size
        return self._answer("cuMemAddressReserve", True, self._types.CUdeviceptr(start))

    def cuMemAddressFree(self, address: int, size: int) -> Any:
        good = self._ranges.get(address) == size and not self._mapped_in(address, size)
        if good:
            del self._ranges[address]
        return self._answer("cuMemAddressFree", good)

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> Any:
        pinned = self._types.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        good = size == self.granularity_bytes and properties.type == pinned and flags == 0
        if self.faults["cuMemCreate"].fires() or len(self._contents) >= self.capacity_pages:
            return self._out_of_memory("cuMemCreate", None)
        handle = next(self._handles)
        self._contents[handle] = bytearray(b"\xdb" * size)
        self._held.add(handle)
        named = self._types.CUmemGenericAllocationHandle(handle)
        return self._answer("cuMemCreate", good, named)

    def cuMemRelease(self, handle: int) -> Any:
        good = handle in self._held
        self._held.discard(handle)
        self._free_unused()
        return self._answer("cuMemRelease", good)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> Any:
        if self.faults["cuMemMap"].fires():
            return self._out_of_memory("cuMemMap")
        good = (
            size == self.granularity_bytes
            and address % size == 0
            and any(start <= address < start + room for start, room in self._ranges.items())
            and address not in self._mapped
            and handle in self._held
            and offset == flags == 0
        )
        if good:
            self._mapped[address] = handle
        return self._answer("cuMemMap", good)

    def cuMemSetAccess(self, address: int, size: int, descriptions: Any, number: int) -> Any:
        if self.faults["cuMemSetAccess"].fires():
            return self._out_of_memory("cuMemSetAccess")
        pages = self._mapped_in(address, size)
        good = (
            len(descriptions) == number == 1
            and descriptions[0].location.id == DEVICE
            and len(pages) * self.granularity_bytes == size > 0
        )
        if good:
            self._accessible.update(pages)
        return self._answer("cuMemSetAccess", good)

    def cuMemUnmap(self, address: int, size: int) -> Any:
        pages = self._mapped_in(address, size)
        good = len(pages) * self.granularity_bytes == size > 0
        if good:
            for page in pages:
                if self._work.uses(range(page, page + self.granularity_bytes)):
                    raise DeviceFaultError(f"unmap of {page:#x}, which unfinished work still uses")
                del self._mapped[page]
                self._accessible.discard(page)
            self._free_unused()
        return self._answer("cuMemUnmap", good)

    # Events

    def cuEventCreate(self, flags: int) -> Any:
        event = next(self._handles)
        good = self._in_context() and isinstance(flags, int)
        return self._answer("cuEventCreate", good, event)

    def cuEventDestroy(self, event: int) -> Any:
        return self._answer("cuEventDestroy", self._events.pop(event, None) is not None)

    def cuCtxRecordEvent(self, context: int, event: int) -> Any:
        self._events[event] = self._work.num_launched
        return self._answer("cuCtxRecordEvent", context == CONTEXT)

    def cuEventQuery(self, event: int) -> Any:
        if self._work.num_finished < self._events[event]:
            return (self._types.CUresult.CUDA_ERROR_NOT_READY,)
        return self._answer("cuEventQuery", True)

    def cuEventSynchronize(self, event: int) -> Any:
        self._work.wait(self._events[event])
        return self._answer("cuEventSynchronize", True)

    # What a test may do

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep the device busy inside the context."""
        self._work.launch(frozenset())
        try:
            yield
        finally:
            self._work.finish(None)

    @property
    def num_pages(self) -> int:
        """Physical pages in use."""
        return len(self._contents)

    @property
    def num_mapped(self) -> int:
        """Addresses at which a page is mapped."""
        return len(self._mapped)

    @property
    def num_ranges(self) -> int:
        """Reserved ranges."""
        return len(self._ranges)

    def _answer(self, name: str, good: bool, *values: Any) -> Any:
        self.calls.append(name)
        if name.startswith("cuMem") and not self._in_context():
            return self._types.CUresult.CUDA_ERROR_INVALID_CONTEXT, *values
        code = self._ok if good else self._types.CUresult.CUDA_ERROR_INVALID_VALUE
        return code, *values

    def _out_of_memory(self, name: str, *values: Any) -> Any:
        self.calls.append(name)
        return self._types.CUresult.CUDA_ERROR_OUT_OF_MEMORY, *values

    def _stack(self) -> list[int]:
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        stack: list[int] = self._threads.stack
        return stack

    def _in_context(self) -> bool:
        return self._stack()[-1:] == [CONTEXT]

    def _mapped_in(self, address: int, size: int) -> list[int]:
        return [page for page in self._mapped if address <= page < address + size]

    def _free_unused(self) -> None:
        used = self._held | set(self._mapped.values())
        self._contents = {handle: data for handle, data in self._contents.items() if handle in used}

    def _bytes_at(self, address: int, num_bytes: int) -> list[tuple[bytearray, int]]:
        found = []
        for at in range(address, address + num_bytes):
            start = at - at % self.granularity_bytes
            if start not in self._accessible:
                raise DeviceFaultError(f"access to {at:#x}, which is not mapped or not accessible")
            found.append((self._contents[self._mapped[start]], at - start))
        return found
