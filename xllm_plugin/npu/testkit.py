"""How the NPU family is checked: see `xllm_plugin.testing.conformance` and `.selftest`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from xllm_plugin.npu.acl import HBM_MEM, MEMCPY_DEVICE_TO_HOST, MEMCPY_HOST_TO_DEVICE, Acl
from xllm_plugin.npu.memory import NpuMemoryDriver
from xllm_plugin.testing.conformance import (
    GraphKit,
    GraphProbe,
    MemoryKit,
    MemoryProbe,
    check_memory_driver,
)
from xllm_plugin.testing.conformance.graphs import GraphWork
from xllm_plugin.testing.selftest import Check

if TYPE_CHECKING:
    from xllm_plugin.npu.graphs import NpuGraphBackend

__all__ = ["GRAPH_KIT", "MEMORY_KIT", "SELFTEST", "probe_memory", "selftest"]

MAX_PAGES = 1000
"""A device with room for more is not filled to see how it refuses."""


def probe_memory(driver: NpuMemoryDriver) -> MemoryProbe:
    """Reading and writing on a device; on the emulator also what it does on demand."""
    acl = driver.acl

    def read(address: int, num_bytes: int) -> bytes:
        data = ctypes.create_string_buffer(num_bytes)
        size = ctypes.c_size_t(num_bytes)
        with driver.current():
            acl.call(
                "aclrtMemcpy", data, size, ctypes.c_void_p(address), size, MEMCPY_DEVICE_TO_HOST
            )
        return data.raw

    def write(address: int, data: bytes) -> None:
        size = ctypes.c_size_t(len(data))
        with driver.current():
            acl.call(
                "aclrtMemcpy", ctypes.c_void_p(address), size, data, size, MEMCPY_HOST_TO_DEVICE
            )

    if not hasattr(acl.library, "emulator_hold"):
        return MemoryProbe(read=read, write=write)

    @contextmanager
    def busy() -> Iterator[None]:
        acl.library.emulator_hold()
        try:
            yield
        finally:
            acl.library.emulator_release()

    num_pages = num_free_bytes(driver) // driver.granularity_bytes
    return MemoryProbe(
        read=read,
        write=write,
        max_pages=num_pages if num_pages <= MAX_PAGES else None,
        fail_map=acl.library.emulator_fail_map,
        busy=busy,
    )


def num_free_bytes(driver: NpuMemoryDriver) -> int:
    """The device's free memory."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with driver.current():
        driver.acl.call("aclrtGetMemInfo", HBM_MEM, ctypes.byref(free), ctypes.byref(total))
    return free.value


MEMORY_KIT = MemoryKit(NpuMemoryDriver, probe_memory)


def selftest() -> Iterator[Check]:
    """Operators first, then the memory driver; see `xllm_plugin.npu.selftest`."""
    from xllm_plugin.npu.selftest import check_operators

    yield from check_operators()
    try:
        unchecked = check_memory_driver(NpuMemoryDriver, probe_memory)
    except AssertionError as broken:
        yield Check("memory driver", "contract", problem=str(broken))
        return
    yield Check("memory driver", f"contract but for {len(unchecked)} clauses", 0.0)


SELFTEST = selftest


def probe_graphs(backend: NpuGraphBackend) -> GraphProbe:
    """Work on the current device; on the emulator it also runs out of memory on demand."""
    import torch

    del backend
    library = Acl().library

    def make_work() -> GraphWork:
        source = torch.zeros(1, dtype=torch.int32, device="npu")
        return GraphWork(
            write=source.fill_,
            run=lambda: source + 1,
            read=lambda output: int(output.item()),
        )

    return GraphProbe(
        make_work=make_work, fail_next_capture=getattr(library, "emulator_fail_capture", None)
    )


def make_graph_backend() -> NpuGraphBackend:
    """One without graphs; its module is imported only here, as it imports torch_npu."""
    from xllm_plugin.npu.graphs import NpuGraphBackend

    return NpuGraphBackend()


GRAPH_KIT = GraphKit(make_graph_backend, probe_graphs)
