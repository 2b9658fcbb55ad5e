"""CANN's runtime (libascendcl) by ctypes: what torch_npu has no call for.

Structures and numbers are those of CANN's headers, which torch_npu's wheel carries
(torch_npu/include/third_party/acl/inc/acl/acl_rt.h); `tests/npu/test_acl.py` compares them.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from xllm_plugin.errors import PlatformError

__all__ = ["Acl", "PackageVersion", "PhysicalMemProp", "huge_pages_of"]

LIBRARY = "libascendcl.so"

# aclrtMemcpyKind, aclrtMemAttr, aclrtMemLocationType, aclrtMemGranularityOptions
MEMCPY_HOST_TO_DEVICE = 1
MEMCPY_DEVICE_TO_HOST = 2
HBM_MEM = 1
HBM_MEM_HUGE = 4
LOCATION_DEVICE = 1
GRANULARITY_RECOMMENDED = 1
# aclrtReserveMemAddress: addresses for huge pages.
RESERVE_HUGE = 1
# aclCANNPackageName
PACKAGE_CANN = 0
PACKAGE_DRIVER = 7
# ACL_ERROR_RT_MEMORY_ALLOCATION, ACL_ERROR_RT_DEVICE_OOM, ACL_ERROR_BAD_ALLOC
OUT_OF_MEMORY = frozenset({207001, 207018, 200000})


class MemLocation(ctypes.Structure):
    """`aclrtMemLocation`."""

    _fields_ = (("id", ctypes.c_uint32), ("type", ctypes.c_int))


class PhysicalMemProp(ctypes.Structure):
    """`aclrtPhysicalMemProp`."""

    _fields_ = (
        ("handleType", ctypes.c_int),
        ("allocationType", ctypes.c_int),
        ("memAttr", ctypes.c_int),
        ("location", MemLocation),
        ("reserve", ctypes.c_uint64),
    )


def huge_pages_of(device_index: int) -> PhysicalMemProp:
    """Pinned huge pages in a device's own memory, shared with no other process."""
    location = MemLocation(device_index, LOCATION_DEVICE)
    return PhysicalMemProp(0, 0, HBM_MEM_HUGE, location, 0)


class PackageVersion(ctypes.Structure):
    """`aclCANNPackageVersion`."""

    _fields_ = (
        ("version", ctypes.c_char * 128),
        ("parts", ctypes.c_char * 64 * 4),
        ("reserved", ctypes.c_char * 128),
    )


class Acl:
    """The library, its functions called by name.

    Args:
        library: file name or path.

    Raises:
        PlatformError: it cannot be loaded.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self.library: Any = ctypes.CDLL(library)
        except OSError as error:
            raise PlatformError(
                f"CANN's runtime cannot be loaded: {error}. Install CANN and source its "
                "set_env.sh, which puts it on LD_LIBRARY_PATH (now: "
                f"{os.environ.get('LD_LIBRARY_PATH') or 'empty'})."
            ) from error
        self.library.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self.library.aclrtGetSocName.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns an `aclError`.

        Raises:
            MemoryError: the device is out of memory.
            RuntimeError: anything else went wrong.
        """
        code = getattr(self.library, name)(*arguments)
        if code:
            detail = (self.library.aclGetRecentErrMsg() or b"").decode(errors="replace")
            error = MemoryError if code in OUT_OF_MEMORY else RuntimeError
            raise error(f"{name}: error {code}: {detail.strip() or 'no message'}")

    def num_devices(self) -> int:
        """How many devices this process may use; initialises none."""
        count = ctypes.c_uint32()
        try:
            self.call("aclrtGetDeviceCount", ctypes.byref(count))
        except RuntimeError:
            return 0
        return count.value

    def soc_name(self) -> str | None:
        """CANN's name of the chip, such as Ascend910B3; None where it does not say."""
        name: bytes | None = self.library.aclrtGetSocName()
        return name.decode() if name else None

    def package_version(self, package: int) -> str | None:
        """The version of CANN or its driver, such as 8.5.0; None where it does not say."""
        version = PackageVersion()
        try:
            self.call("aclsysGetCANNVersion", package, ctypes.byref(version))
        except (AttributeError, RuntimeError):  # the function is younger than CANN 7
            return None
        return version.version.decode(errors="replace") or None
