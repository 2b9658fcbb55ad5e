"""Structures and numbers passed to CANN, against the headers in torch_npu's wheel."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.errors import PlatformError
from xllm_plugin.npu import acl
from xllm_plugin.testing.cann import Emulator

PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#include "acl/acl.h"
#include "acl/acl_rt.h"
#include "acl/error_codes/rt_error_codes.h"
int main(void)
{
    printf("%zu %zu %zu %zu %zu %zu\\n", sizeof(aclrtPhysicalMemProp),
           offsetof(aclrtPhysicalMemProp, memAttr), offsetof(aclrtPhysicalMemProp, location),
           offsetof(aclrtPhysicalMemProp, reserve), offsetof(aclrtMemLocation, type),
           sizeof(aclrtMemLocation));
    printf("%d %d %d %d %d %d %d %d %d %d %d\\n", ACL_HBM_MEM, ACL_MEM_HANDLE_TYPE_NONE,
           ACL_MEM_ALLOCATION_TYPE_PINNED, ACL_HBM_MEM_HUGE, ACL_MEM_LOCATION_TYPE_DEVICE,
           ACL_RT_MEM_ALLOC_GRANULARITY_RECOMMENDED, ACL_MEMCPY_HOST_TO_DEVICE,
           ACL_MEMCPY_DEVICE_TO_HOST, ACL_ERROR_RT_MEMORY_ALLOCATION, ACL_ERROR_RT_DEVICE_OOM,
           ACL_ERROR_BAD_ALLOC);
    printf("%zu %zu %d %d\\n", sizeof(aclCANNPackageVersion),
           offsetof(aclCANNPackageVersion, majorVersion), ACL_PKG_NAME_CANN, ACL_PKG_NAME_DRIVER);
    return 0;
}
"""


@pytest.mark.npu
def test_layouts_and_numbers_are_those_of_the_headers(emulator: Emulator, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    headers = emulator.site / "torch_npu" / "include" / "third_party" / "acl" / "inc"
    (tmp_path / "print.c").write_text(PROGRAM)
    command = [compiler, "-w", f"-I{headers}", "-o", str(tmp_path / "print")]
    subprocess.run([*command, str(tmp_path / "print.c")], check=True)
    done = subprocess.run([tmp_path / "print"], check=True, capture_output=True, text=True)
    layout, numbers, package = (
        [int(word) for word in line.split()] for line in done.stdout.splitlines()
    )
    version: Any = acl.PackageVersion
    assert package == [
        ctypes.sizeof(version),
        version.parts.offset,
        acl.PACKAGE_CANN,
        acl.PACKAGE_DRIVER,
    ]
    prop: Any = acl.PhysicalMemProp
    location: Any = acl.MemLocation
    assert layout == [
        ctypes.sizeof(prop),
        prop.memAttr.offset,
        prop.location.offset,
        prop.reserve.offset,
        location.type.offset,
        ctypes.sizeof(location),
    ]
    page = acl.huge_pages_of(3)
    assert page.location.id == 3
    assert numbers[:8] == [
        acl.HBM_MEM,
        page.handleType,
        page.allocationType,
        page.memAttr,
        page.location.type,
        acl.GRANULARITY_RECOMMENDED,
        acl.MEMCPY_HOST_TO_DEVICE,
        acl.MEMCPY_DEVICE_TO_HOST,
    ]
    assert set(numbers[8:]) == acl.OUT_OF_MEMORY


def test_a_machine_without_cann_is_told_what_to_do() -> None:
    with pytest.raises(PlatformError, match=r"cannot be loaded: libabsent\.so.*set_env\.sh"):
        acl.Acl("libabsent.so")
