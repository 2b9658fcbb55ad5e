"""How the NPU family is checked: see `xllm_plugin.testing.conformance` and `.selftest`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from xllm_plugin.errors import NotNowError, PlatformError
from xllm_plugin.npu import availability
from xllm_plugin.npu.accelerator import FAMILY
from xllm_plugin.npu.acl import HBM_MEM, MEMCPY_DEVICE_TO_HOST, MEMCPY_HOST_TO_DEVICE, Acl
from xllm_plugin.npu.availability import DeviceMemory, gib
from xllm_plugin.npu.memory import NpuMemoryDriver
from xllm_plugin.testing.conformance import (
    GraphKit,
    GraphProbe,
    MemoryKit,
    MemoryProbe,
    Unchecked,
    check_device_family,
    check_graph_backend,
    check_memory_driver,
)
from xllm_plugin.testing.conformance.graphs import GraphWork
from xllm_plugin.testing.selftest import Check

if TYPE_CHECKING:
    from xllm_plugin.npu.graph_backend import NpuGraphBackend

__all__ = ["GRAPH_KIT", "MEMORY_KIT", "SELFTEST", "probe_memory", "selftest"]

MAX_PAGES = 1000
"""A device with room for more is not filled to see how it refuses."""

NEEDED_BYTES = 2**30
"""For the operators' cases, and for the small model beside them."""

DEVICE_ERRORS = (AssertionError, AttributeError, MemoryError, OSError, RuntimeError)
"""A broken clause; and what torch, CANN and a library that lacks a function raise."""


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
    """Each operator, then the contracts of the family's parts.

    Raises:
        NotNowError: the device cannot be taken, or others hold its memory.
        PlatformError: it has too little.
    """
    check_room(availability.ask(0))
    from xllm_plugin.npu.selftest import check_operators

    yield from check_operators()
    for name, contract in {
        "device family": lambda: check_device_family(FAMILY),
        "memory driver": lambda: check_memory_driver(NpuMemoryDriver, probe_memory),
        "graph backend": lambda: check_graph_backend(make_graph_backend, probe_graphs),
    }.items():
        yield check_contract(name, contract)


SELFTEST = selftest


def check_room(memory: DeviceMemory) -> None:
    """See that there is memory for the checks.

    Raises:
        NotNowError: others hold it.
        PlatformError: the device has too little.
    """
    if memory.free_bytes >= NEEDED_BYTES:
        return
    free, total, needed = map(gib, (memory.free_bytes, memory.total_bytes, NEEDED_BYTES))
    found = f"device 0 has {free} of its {total} GiB free, and the self-test needs {needed}"
    if memory.total_bytes < NEEDED_BYTES:
        raise PlatformError(f"{found}. Take a device with more memory.")
    raise NotNowError(
        f"{found}: other processes hold the rest, and `npu-smi info` names them. End them, or name "
        "another device in ASCEND_RT_VISIBLE_DEVICES."
    )


def check_contract(name: str, check: Callable[[], tuple[Unchecked, ...]]) -> Check:
    """The conformance checks of a part as one row: what no device should do ends no self-test."""
    try:
        unchecked = check()
    except DEVICE_ERRORS as broken:
        return Check(name, "contract", problem=str(broken) or type(broken).__name__)
    left_out = f" but for {len(unchecked)} clauses" if unchecked else ""
    return Check(name, f"contract{left_out}", 0.0)


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
    from xllm_plugin.npu.graph_backend import NpuGraphBackend

    return NpuGraphBackend()


GRAPH_KIT = GraphKit(make_graph_backend, probe_graphs)
