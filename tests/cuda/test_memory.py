"""The CUDA memory driver: on a fake libcuda, and on a device where there is one."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from xllm_plugin.accelerator.memory import MemoryDriver
from xllm_plugin.cuda.memory import CudaMemoryDriver
from xllm_plugin.testing.conformance import (
    MEMORY,
    MemoryKit,
    MemoryProbe,
    UncheckedError,
    check_memory_driver,
)
from xllm_plugin.testing.fake_cuda import FakeCuda

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

SIZE = 64


def make_driver(**options: Any) -> CudaMemoryDriver:
    return CudaMemoryDriver(cuda=FakeCuda(**options))


def probe(driver: CudaMemoryDriver) -> MemoryProbe:
    cuda: FakeCuda = driver.cuda
    return MemoryProbe(
        read=cuda.read,
        write=cuda.write,
        max_pages=cuda.capacity_pages,
        fail_map=cuda.faults["cuMemMap"].set,
        busy=cuda.busy,
    )


def probe_with_failing_access(driver: CudaMemoryDriver) -> MemoryProbe:
    """As `probe`, but that mapping fails later, when access is set."""
    cuda: FakeCuda = driver.cuda
    return MemoryProbe(cuda.read, cuda.write, fail_map=cuda.faults["cuMemSetAccess"].set)


def test_it_keeps_the_contract() -> None:
    driver: MemoryDriver = make_driver()
    assert driver.granularity_bytes == SIZE
    assert check_memory_driver(make_driver, probe) == ()


@pytest.mark.parametrize(
    "clause",
    [
        "a_map_that_the_device_fails_changes_nothing",
        "a_batch_that_the_device_fails_changes_nothing",
    ],
)
def test_access_that_the_device_refuses_changes_nothing(clause: str) -> None:
    MEMORY.check_clause(clause, MemoryKit(make_driver, probe_with_failing_access))


def test_nothing_is_left_on_the_device() -> None:
    drivers: list[CudaMemoryDriver] = []

    def make() -> CudaMemoryDriver:
        drivers.append(make_driver(capacity_pages=4))
        return drivers[-1]

    check_memory_driver(make, probe)
    for driver in drivers:
        cuda = driver.cuda
        assert (cuda.num_pages, cuda.num_mapped, cuda.num_ranges) == (0, 0, 0)


def test_neighbours_get_access_and_lose_their_pages_in_one_call() -> None:
    driver = make_driver()
    start, pages = driver.reserve(5 * SIZE), driver.create(4)
    driver.cuda.calls.clear()
    placed = {start + slot * SIZE: page for slot, page in zip((4, 0, 2, 1), pages, strict=True)}
    driver.map(placed)
    assert driver.cuda.calls == [*3 * ["cuMemMap"], "cuMemSetAccess", "cuMemMap", "cuMemSetAccess"]
    driver.cuda.calls.clear()
    driver.unmap(list(placed))
    assert driver.cuda.calls == 2 * ["cuMemUnmap"]


def test_a_batch_of_creates_that_fails_leaves_no_page() -> None:
    driver = make_driver()
    driver.cuda.faults["cuMemCreate"].set(3)
    with pytest.raises(MemoryError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        driver.create(4)
    assert driver.cuda.num_pages == 0


def test_other_errors_of_the_device_are_no_lack_of_memory() -> None:
    driver = make_driver()
    (page,) = driver.create(1)
    driver.cuda._held.clear()
    with pytest.raises(RuntimeError, match="cuMemRelease: CUDA_ERROR_INVALID_VALUE"):
        driver.release([page])


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(RuntimeError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        CudaMemoryDriver(1, cuda=FakeCuda())


def test_a_thread_keeps_its_own_context() -> None:
    driver = make_driver()
    driver.cuda.cuCtxPushCurrent(77)
    driver.release(driver.create(1))
    driver.fence().wait()
    assert driver.cuda._stack() == [77]


def test_events_are_destroyed_with_their_fences() -> None:
    driver = make_driver()
    fences = [driver.fence() for _ in range(3)]
    assert len(driver.cuda._events) == 3
    fences.clear()
    gc.collect()
    assert driver.cuda._events == {}


@pytest.mark.cuda
@pytest.mark.parametrize("clause", MEMORY.clauses)
def test_a_device_keeps_the_contract(clause: str) -> None:
    from xllm_plugin.cuda.testkit import MEMORY_KIT

    try:
        CudaMemoryDriver()
    except RuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")
    try:
        MEMORY.check_clause(clause, MEMORY_KIT)
    except UncheckedError as error:
        pytest.skip(str(error))
