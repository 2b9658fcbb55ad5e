"""The kernel's calls on virtual memory, by ctypes: Python's own mmap takes no address.

Every method raises `OSError` when the kernel refuses.  ctypes lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

__all__ = ["VmCalls"]

# <linux/mman.h>; Python's mmap module names only some of them.
PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4
MADV_DONTNEED = 4
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_HELD = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
_FAILED = ctypes.c_void_p(-1).value


class VmCalls:
    """mmap, munmap, mremap, madvise and fallocate of the C library."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        address, size, flag, offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_long
        self._mmap = _declared(libc.mmap, address, (address, size, flag, flag, flag, offset))
        self._munmap = _declared(libc.munmap, flag, (address, size))
        self._mremap = _declared(libc.mremap, address, (address, size, size, flag, address))
        self._madvise = _declared(libc.madvise, flag, (address, size, flag))
        self._fallocate = _declared(libc.fallocate, flag, (flag, flag, offset, offset))

    def reserve(self, num_bytes: int, alignment_bytes: int) -> int:
        """Take addresses that nothing is behind: an access is a segmentation fault."""
        system_page = mmap.PAGESIZE
        slack = alignment_bytes - system_page
        start = self._mapped(None, num_bytes + slack, PROT_NONE, _HELD, -1, 0)
        aligned = -(-start // alignment_bytes) * alignment_bytes
        if aligned > start:
            self.unmap(start, aligned - start)
        if start + slack > aligned:
            self.unmap(aligned + num_bytes, start + slack - aligned)
        return aligned

    def hold(self, address: int, num_bytes: int) -> None:
        """Put nothing behind addresses again, and keep them."""
        self._mapped(address, num_bytes, PROT_NONE, _HELD | MAP_FIXED, -1, 0)

    def show(self, address: int, num_bytes: int, file: int, offset_bytes: int) -> None:
        """Put a file's bytes behind addresses, to read and write."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._mapped(address, num_bytes, access, mmap.MAP_SHARED | MAP_FIXED, file, offset_bytes)

    def move(self, source: int, num_bytes: int, target: int) -> None:
        """Move a mapping with its page tables; the source stays mapped, its tables empty."""
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
        if self._mremap(source, num_bytes, num_bytes, flags, target) == _FAILED:
            raise _error("mremap")

    def unmap(self, address: int, num_bytes: int) -> None:
        """Give addresses back."""
        if self._munmap(address, num_bytes):
            raise _error("munmap")

    def advise_huge(self, address: int, num_bytes: int) -> None:
        """Ask for huge pages."""
        if self._madvise(address, num_bytes, MADV_HUGEPAGE):
            raise _error("madvise(MADV_HUGEPAGE)")

    def populate(self, address: int, num_bytes: int) -> None:
        """Fill memory and page tables in, so that no later access waits for it (Linux 5.14)."""
        if self._madvise(address, num_bytes, MADV_POPULATE_WRITE):
            raise _error("madvise(MADV_POPULATE_WRITE)")

    def drop(self, address: int, num_bytes: int) -> None:
        """Give the memory of private, anonymous pages back; they read as zeros from then on."""
        if self._madvise(address, num_bytes, MADV_DONTNEED):
            raise _error("madvise(MADV_DONTNEED)")

    def punch(self, file: int, offset_bytes: int, num_bytes: int) -> None:
        """Give a part of a file's memory back to the system; it reads as zeros from then on."""
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if self._fallocate(file, mode, offset_bytes, num_bytes):
            raise _error("fallocate(FALLOC_FL_PUNCH_HOLE)")

    def _mapped(self, *arguments: Any) -> int:
        address = self._mmap(*arguments)
        if address == _FAILED:
            raise _error("mmap")
        return int(address)


def _declared(function: Any, result: Any, arguments: tuple[Any, ...]) -> Any:
    function.restype = result
    function.argtypes = arguments
    return function


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
