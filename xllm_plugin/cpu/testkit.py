"""How the CPU family's parts are checked; see `xllm_plugin.testing.conformance`."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from xllm_plugin.cpu.memory import CpuMemoryDriver
from xllm_plugin.cpu.vm_calls import VmCalls
from xllm_plugin.testing.conformance import MemoryKit, MemoryProbe
from xllm_plugin.testing.fakes import Countdown

__all__ = ["MEMORY_KIT", "FaultyVmCalls", "make_memory_driver", "probe_memory"]

CHECKED_PAGE_BYTES = 2**16
"""Small, so that the checks fill a device in no time; the kernel treats all sizes alike."""

CHECKED_CAPACITY_PAGES = 16


class FaultyVmCalls(VmCalls):
    """The kernel, with faults on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.map_fault = Countdown()
        self.drop_fault = Countdown()
        self.punch_fault = Countdown()
        self.can_move = True
        self.can_populate = True

    def move(self, source: int, num_bytes: int, target: int) -> None:
        """Move, unless this kernel cannot."""
        if not self.can_move:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().move(source, num_bytes, target)

    def show(self, address: int, num_bytes: int, file: int, offset_bytes: int) -> None:
        """Fail having unmapped what was there, as mmap does when it runs out of mappings late."""
        if self.map_fault.fires():
            self.unmap(address, num_bytes)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        super().show(address, num_bytes, file, offset_bytes)

    def drop(self, address: int, num_bytes: int) -> None:
        """Fail having dropped most of it, as madvise does when it meets pages that it may not."""
        if self.drop_fault.fires():
            super().drop(address, max(num_bytes - mmap.PAGESIZE, mmap.PAGESIZE))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().drop(address, num_bytes)

    def punch(self, file: int, offset_bytes: int, num_bytes: int) -> None:
        """Fail having done nothing."""
        if self.punch_fault.fires():
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        super().punch(file, offset_bytes, num_bytes)

    def populate(self, address: int, num_bytes: int) -> None:
        """Populate, unless this kernel cannot."""
        if not self.can_populate:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().populate(address, num_bytes)


def make_memory_driver(
    page_bytes: int = CHECKED_PAGE_BYTES, *, can_move: bool = True
) -> CpuMemoryDriver:
    """A driver over a kernel that fails on demand."""
    calls = FaultyVmCalls()
    calls.can_move = can_move
    capacity_bytes = page_bytes * CHECKED_CAPACITY_PAGES
    return CpuMemoryDriver(page_bytes=page_bytes, capacity_bytes=capacity_bytes, calls=calls)


def probe_memory(driver: CpuMemoryDriver) -> MemoryProbe:
    """Everything the checks can ask for."""
    calls = driver._calls  # noqa: SLF001 - the kernel under it, made above
    assert isinstance(calls, FaultyVmCalls)

    def fail_map(at: int) -> None:
        # Page tables that move need nothing of the kernel; a mapping that it must make can fail.
        calls.can_move = False
        calls.map_fault.set(at)

    def write(address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    return MemoryProbe(
        read=ctypes.string_at,
        write=write,
        max_pages=driver.capacity_pages,
        fail_map=fail_map,
        busy=driver.working,
    )


MEMORY_KIT = MemoryKit(make_memory_driver, probe_memory)
