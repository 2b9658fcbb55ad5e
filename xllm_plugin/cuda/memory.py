"""`CudaMemoryDriver`: CUDA's virtual memory management, through `cuda-bindings`.

Each page is one allocation of cuMemCreate.  cuMemMap takes one of them at a time; access is set,
and taken away by cuMemUnmap, for a whole run of neighbours at once.

Tested against `xllm_plugin.testing.fake_cuda` alone so far, not on a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from xllm_plugin.accelerator.page_books import BookedMemoryDriver, Placement

__all__ = ["CudaFence", "CudaMemoryDriver"]


class CudaFence:
    """An event that stands behind everything that the context was given before.

    Args:
        driver: on whose device.
    """

    def __init__(self, driver: CudaMemoryDriver) -> None:
        self._driver = driver
        cuda = driver.cuda
        # Blocking: a wait that spins takes a core from the engine.
        flags = (
            cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING | cuda.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        )
        with driver.current():
            self._event = driver.call("cuEventCreate", int(flags))
            weakref.finalize(self, cuda.cuEventDestroy, self._event).atexit = False
            driver.call("cuCtxRecordEvent", driver.context, self._event)

    def is_done(self) -> bool:
        """Ask the event."""
        cuda = self._driver.cuda
        with self._driver.current():
            (result,) = cuda.cuEventQuery(self._event)
        if result == cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._driver.check("cuEventQuery", result)
        return True

    def wait(self) -> None:
        """Wait for the event; other threads run meanwhile."""
        with self._driver.current():
            self._driver.call("cuEventSynchronize", self._event)


class CudaMemoryDriver(BookedMemoryDriver[int]):
    """A `MemoryDriver` over the memory of one device.

    A fence covers all streams of the device's primary context, which is torch's too.  It cannot be
    taken while a stream of that context is being captured into a graph: CUDA then breaks the
    capture off.

    Args:
        device_index: as CUDA counts, after CUDA_VISIBLE_DEVICES.
        cuda: the module `cuda.bindings.driver`, or a fake of it.

    Raises:
        RuntimeError: there is no such device, or no driver library.
    """

    def __init__(self, device_index: int = 0, *, cuda: Any = None) -> None:
        if cuda is None:
            from cuda.bindings import driver

            cuda = driver
        self.cuda = cuda
        self.call("cuInit", 0)
        device = self.call("cuDeviceGet", device_index)
        self.context = self.call("cuDevicePrimaryCtxRetain", device)
        weakref.finalize(self, cuda.cuDevicePrimaryCtxRelease, device).atexit = False
        self._properties = _pinned_on(cuda, device_index)
        self._access = _read_and_write_from(cuda, device_index)
        recommended = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        with self.current():
            size = self.call("cuMemGetAllocationGranularity", self._properties, recommended)
        super().__init__(int(size))

    def fence(self) -> CudaFence:
        """Mark the end of all work that the context has been given."""
        return CudaFence(self)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside the context the calling thread uses this device; before and after, its own."""
        self.call("cuCtxPushCurrent", self.context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call CUDA; return its one value, if it has one.

        Raises:
            MemoryError: the device is out of memory.
            RuntimeError: anything else went wrong.
        """
        result, *values = getattr(self.cuda, name)(*arguments)
        self.check(name, result)
        return values[0] if values else None

    def check(self, name: str, result: Any) -> None:
        """Raise, as `call` does, unless `result` says success."""
        codes = self.cuda.CUresult
        if result == codes.CUDA_SUCCESS:
            return
        error = MemoryError if result == codes.CUDA_ERROR_OUT_OF_MEMORY else RuntimeError
        raise error(f"{name}: {codes(result).name}")

    # What the books ask for

    def _reserve(self, num_bytes: int) -> int:
        with self.current():
            try:
                start = self.call("cuMemAddressReserve", num_bytes, self._granularity_bytes, 0, 0)
            except (RuntimeError, OverflowError) as error:
                # The size is right, so what CUDA calls an invalid value is that there is no room.
                raise MemoryError(f"no room for a range of {num_bytes} bytes: {error}") from error
        return int(start)

    def _unreserve(self, address: int, num_bytes: int) -> None:
        with self.current():
            self.call("cuMemAddressFree", address, num_bytes)

    def _create(self, num_pages: int) -> Sequence[int]:
        created: list[int] = []
        with self.current():
            try:
                for _ in range(num_pages):
                    page = self.call("cuMemCreate", self._granularity_bytes, self._properties, 0)
                    created.append(int(page))
            except BaseException:  # also Ctrl-C: nobody else knows these pages
                self._release(created)
                raise
        return created

    def _release(self, physicals: Sequence[int]) -> None:
        with self.current():
            for page in physicals:
                self.call("cuMemRelease", page)

    def _map_run(self, run: Sequence[Placement]) -> None:
        start, size, num_mapped = run[0].address, self._granularity_bytes, 0
        with self.current():
            try:
                for placement in run:
                    self.call("cuMemMap", placement.address, size, 0, placement.physical, 0)
                    num_mapped += 1
                self.call("cuMemSetAccess", start, num_mapped * size, [self._access], 1)
            except BaseException:  # as in `_create`
                if num_mapped:
                    self.call("cuMemUnmap", start, num_mapped * size)
                raise

    def _unmap_run(self, run: Sequence[Placement]) -> None:
        with self.current():
            self.call("cuMemUnmap", run[0].address, len(run) * self._granularity_bytes)


def _pinned_on(cuda: Any, device_index: int) -> Any:
    """The properties of an allocation in a device's own memory."""
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device_index
    return properties


def _read_and_write_from(cuda: Any, device_index: int) -> Any:
    """The right of a device to read and write."""
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device_index
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access
