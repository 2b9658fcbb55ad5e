"""`NpuMemoryDriver`: CANN's virtual memory management.

Each page is one allocation of aclrtMallocPhysical; aclrtMapMem and aclrtUnmapMem take one at a
time.  torch_npu's own allocator does not know these addresses: `tensor` makes a tensor over them.

Tested against `xllm_plugin.testing.cann` alone so far, not on a device.  What has to be shown there
first: that the driver maps one page at two addresses at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xllm_plugin.accelerator.page_books import BookedMemoryDriver, Placement
from xllm_plugin.npu.acl import GRANULARITY_RECOMMENDED, RESERVE_HUGE, Acl, huge_pages_of

if TYPE_CHECKING:
    import torch

__all__ = ["NpuFence", "NpuMemoryDriver"]


class NpuFence:
    """One event on each of the driver's streams.

    They are recorded through torch_npu, whose queue may still hold work that the device has not
    been given: an event recorded beside it would overtake that work.

    Args:
        streams: torch_npu's streams.
    """

    def __init__(self, streams: Sequence[Any]) -> None:
        import torch

        self._events = [torch.npu.Event() for _ in streams]
        for event, stream in zip(self._events, streams, strict=True):
            event.record(stream)

    def is_done(self) -> bool:
        """Ask the events."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Wait for the events; other threads run meanwhile."""
        for event in self._events:
            event.synchronize()


class NpuMemoryDriver(BookedMemoryDriver[int]):
    """A `MemoryDriver` over the memory of one device.

    Args:
        device_index: as CANN counts, after ASCEND_RT_VISIBLE_DEVICES.
        streams: those whose work a fence covers, asked for at each fence; CANN has no event of a
            whole device.  By default the current stream of the calling thread.
        acl: CANN's runtime.

    Raises:
        PlatformError: there is no CANN.
        RuntimeError: there is no such device.
    """

    def __init__(
        self,
        device_index: int = 0,
        *,
        streams: Callable[[], Sequence[Any]] | None = None,
        acl: Acl | None = None,
    ) -> None:
        self.acl = acl or Acl()
        self.device_index = device_index
        self._streams = streams or self._current_stream
        self.acl.call("aclrtSetDevice", device_index)
        self._context = ctypes.c_void_p()
        self.acl.call("aclrtGetCurrentContext", ctypes.byref(self._context))
        self._properties = huge_pages_of(device_index)
        size = ctypes.c_size_t()
        self.acl.call(
            "aclrtMemGetAllocationGranularity",
            ctypes.byref(self._properties),
            GRANULARITY_RECOMMENDED,
            ctypes.byref(size),
        )
        super().__init__(size.value)

    def fence(self) -> NpuFence:
        """Mark the end of all work that the streams have been given."""
        return NpuFence(self._streams())

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """An int8 tensor [num_bytes] over addresses of a reserved range, without a copy.

        The tensor keeps neither the range nor its mappings alive.

        Raises:
            ValueError: the bytes are not inside one reserved range.
        """
        import torch
        import torch_npu

        self._check_inside(address, num_bytes)
        device = torch.device("npu", self.device_index)
        construct = torch_npu._C._construct_storage_from_data_pointer  # noqa: SLF001  the only way
        storage = construct(address, device, num_bytes)
        return torch.empty(0, dtype=torch.int8, device=device).set_(storage, 0, (num_bytes,))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside the context the calling thread uses this device; before and after, its own."""
        before = ctypes.c_void_p()
        with contextlib.suppress(RuntimeError):  # a thread that has used no device yet
            self.acl.call("aclrtGetCurrentContext", ctypes.byref(before))
        self.acl.call("aclrtSetCurrentContext", self._context)
        try:
            yield
        finally:
            if before:
                self.acl.call("aclrtSetCurrentContext", before)

    # What the books ask for

    def _reserve(self, num_bytes: int) -> int:
        address = ctypes.c_void_p()
        with self.current():
            try:
                self.acl.call(
                    "aclrtReserveMemAddress",
                    ctypes.byref(address),
                    ctypes.c_size_t(num_bytes),
                    ctypes.c_size_t(0),
                    None,
                    ctypes.c_uint64(RESERVE_HUGE),
                )
            except RuntimeError as error:
                # The size is right, so whatever CANN calls it, there is no room.
                raise MemoryError(f"no room for a range of {num_bytes} bytes: {error}") from error
        assert address.value is not None
        return address.value

    def _unreserve(self, address: int, num_bytes: int) -> None:
        del num_bytes
        with self.current():
            self.acl.call("aclrtReleaseMemAddress", ctypes.c_void_p(address))

    def _create(self, num_pages: int) -> Sequence[int]:
        created: list[int] = []
        with self.current():
            try:
                created.extend(self._malloc() for _ in range(num_pages))
            except BaseException:  # also Ctrl-C: nobody else knows these pages
                self._release(created)
                raise
        return created

    def _malloc(self) -> int:
        page = ctypes.c_void_p()
        self.acl.call(
            "aclrtMallocPhysical",
            ctypes.byref(page),
            ctypes.c_size_t(self._granularity_bytes),
            ctypes.byref(self._properties),
            ctypes.c_uint64(0),
        )
        assert page.value is not None
        return page.value

    def _release(self, physicals: Sequence[int]) -> None:
        with self.current():
            for page in physicals:
                self.acl.call("aclrtFreePhysical", ctypes.c_void_p(page))

    def _map_run(self, run: Sequence[Placement]) -> None:
        size, num_mapped = self._granularity_bytes, 0
        with self.current():
            try:
                for placement in run:
                    self.acl.call(
                        "aclrtMapMem",
                        ctypes.c_void_p(placement.address),
                        ctypes.c_size_t(size),
                        ctypes.c_size_t(0),
                        ctypes.c_void_p(placement.physical),
                        ctypes.c_uint64(0),
                    )
                    num_mapped += 1
            except BaseException:  # as in `_create`
                self._unmap_run(run[:num_mapped])
                raise

    def _unmap_run(self, run: Sequence[Placement]) -> None:
        with self.current():
            for placement in run:
                self.acl.call("aclrtUnmapMem", ctypes.c_void_p(placement.address))

    def _current_stream(self) -> Sequence[Any]:
        import torch
        import torch_npu  # noqa: F401  registers torch.npu

        return [torch.npu.current_stream(self.device_index)]
