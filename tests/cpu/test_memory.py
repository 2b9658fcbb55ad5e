"""The CPU's memory driver, on the real kernel."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from xllm_plugin.accelerator.memory import Fence, MemoryDriver
from xllm_plugin.cpu.memory import PAGE_BYTES, CpuMemoryDriver
from xllm_plugin.cpu.testkit import FaultyVmCalls, make_memory_driver, probe_memory
from xllm_plugin.errors import NotNowError
from xllm_plugin.testing.conformance import check_memory_driver
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import Column, KVLayout
from xllm_plugin.xtensor.memory import ElasticMemory
from xllm_plugin.xtensor.messages import MemoryChange

SIZE = 2**16


@pytest.fixture
def driver() -> Iterator[CpuMemoryDriver]:
    driver = make_memory_driver(SIZE)
    yield driver
    driver.close()


def num_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def file_bytes(driver: CpuMemoryDriver) -> int:
    """Memory that the driver's file holds."""
    return os.fstat(driver._file).st_blocks * 512


def fill(address: int, byte: bytes, num_bytes: int = SIZE) -> None:
    ctypes.memmove(address, byte * num_bytes, num_bytes)


def calls_of(driver: CpuMemoryDriver) -> FaultyVmCalls:
    assert isinstance(driver._calls, FaultyVmCalls)
    return driver._calls


@pytest.mark.parametrize("page_bytes", [mmap.PAGESIZE, 3 * mmap.PAGESIZE, SIZE])
@pytest.mark.parametrize("can_move", [True, False])
def test_it_keeps_the_contract(page_bytes: int, can_move: bool) -> None:
    made: MemoryDriver = make_memory_driver()
    assert made.granularity_bytes == SIZE
    assert (
        check_memory_driver(
            partial(make_memory_driver, page_bytes, can_move=can_move), probe_memory
        )
        == ()
    )


def test_pages_as_large_as_huge_ones() -> None:
    driver = CpuMemoryDriver(capacity_bytes=4 * PAGE_BYTES)
    start, pages = driver.reserve(8 * PAGE_BYTES), driver.create(2)
    driver.map({start: pages[1], start + PAGE_BYTES: pages[0]})
    fill(start, b"a", PAGE_BYTES)
    fill(start + PAGE_BYTES, b"b", PAGE_BYTES)
    driver.unmap([start, start + PAGE_BYTES])
    driver.map({start + 5 * PAGE_BYTES: pages[0]})
    assert ctypes.string_at(start + 5 * PAGE_BYTES, PAGE_BYTES) == b"b" * PAGE_BYTES
    driver.close()


@pytest.mark.parametrize(
    ("page_bytes", "capacity_bytes"),
    [(0, 2**20), (1024, 2**20), (3 * 4096 + 1, 2**20), (2**21, 2**20)],
)
def test_sizes_that_cannot_be_are_refused(page_bytes: int, capacity_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"bytes|above one"):
        CpuMemoryDriver(page_bytes=page_bytes, capacity_bytes=capacity_bytes)


def test_a_range_may_be_larger_than_the_machine() -> None:
    driver = CpuMemoryDriver()
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    num_bytes = 4 * memory_bytes // PAGE_BYTES * PAGE_BYTES
    start = driver.reserve(num_bytes)
    (page,) = driver.create(1)
    driver.map({start + num_bytes - PAGE_BYTES: page})
    fill(start + num_bytes - 1, b"z", 1)
    driver.close()


def test_memory_is_there_once_created_and_gone_once_released(driver: CpuMemoryDriver) -> None:
    assert file_bytes(driver) == 0
    pages = driver.create(4)
    assert file_bytes(driver) == 4 * SIZE
    driver.release(pages[1:3])
    assert file_bytes(driver) == 2 * SIZE
    driver.create(1)
    assert file_bytes(driver) == 3 * SIZE


def test_memory_is_there_also_on_a_kernel_that_cannot_populate(driver: CpuMemoryDriver) -> None:
    calls_of(driver).can_populate = False
    start, pages = driver.reserve(SIZE), driver.create(2)
    assert file_bytes(driver) == 2 * SIZE
    driver.map({start: pages[0]})
    fill(start, b"a")


def test_a_kernel_that_lacks_memory_for_a_page_leaves_nothing_behind(
    driver: CpuMemoryDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    populate = driver._calls.populate

    def fail_on_the_second_run(address: int, num_bytes: int) -> None:
        if address != driver._parking:
            raise OSError(12, "Cannot allocate memory")
        populate(address, num_bytes)

    pages = driver.create(3)
    driver.release([pages[0], pages[2]])
    monkeypatch.setattr(driver._calls, "populate", fail_on_the_second_run)
    with pytest.raises(MemoryError, match="no memory for 2 pages"):
        driver.create(2)
    assert file_bytes(driver) == SIZE
    monkeypatch.undo()
    assert len(driver.create(15)) == 15


def test_pages_that_the_kernel_does_not_take_back_are_kept(driver: CpuMemoryDriver) -> None:
    pages = driver.create(16)
    going = [pages[0], pages[2]]  # two runs of neighbours
    for at in (1, 2):
        calls_of(driver).punch_fault.set(at)
        with pytest.raises(MemoryError, match="did not take 2 pages back"):
            driver.release(going)
        with pytest.raises(MemoryError, match="0 left of 16"):
            driver.create(1)
    driver.release(going)
    assert file_bytes(driver) == 14 * SIZE
    start = driver.reserve(2 * SIZE)
    driver.map(dict(zip((start, start + SIZE), driver.create(2), strict=True)))


def test_slots_are_not_lost_when_memory_comes_neither_nor_goes(
    driver: CpuMemoryDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: int, num_bytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(driver._calls, "populate", refuse)
        calls_of(driver).punch_fault.set(1)
        with pytest.raises(MemoryError, match="no memory for 3 pages"):
            driver.create(3)
    assert len(driver.create(16)) == 16


def test_an_elastic_sleep_whose_memory_the_kernel_does_not_take_is_undone(
    driver: CpuMemoryDriver,
) -> None:
    layout = KVLayout(8, (Column(0, SIZE), Column(8 * SIZE, SIZE)))
    memory = ElasticMemory(driver, layout, 1, XTensorConfig())
    memory.apply(MemoryChange(budget_slabs=8, committed=(0, 3, 4)))
    calls_of(driver).punch_fault.set(1)
    with pytest.raises(NotNowError, match="did not take 6 pages back"):
        memory.sleep()
    memory.settle()
    assert memory.range.committed == {0, 3, 4}
    memory.pool.check_integrity()
    assert memory.pool.statistics().num_released == 0
    assert file_bytes(driver) == 6 * SIZE
    memory.sleep()
    assert (file_bytes(driver), memory.pool.statistics().num_released) == (0, 6)


def test_neighbours_are_one_mapping_of_the_kernel(driver: CpuMemoryDriver) -> None:
    start, pages = driver.reserve(12 * SIZE), driver.create(12)
    before = num_mappings()
    addresses = [start + at * SIZE for at in range(12)]
    for at in range(0, 12, 3):  # in four batches
        driver.map(dict(zip(addresses[at : at + 3], pages[at : at + 3], strict=True)))
    assert num_mappings() <= before + 2
    driver.unmap(addresses)
    assert num_mappings() <= before + 2


def test_a_batch_is_few_calls(driver: CpuMemoryDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    move = driver._calls.move
    monkeypatch.setattr(
        driver._calls, "move", lambda s, n, t: (moved.append(n // SIZE), move(s, n, t))
    )
    start, pages = driver.reserve(8 * SIZE), driver.create(8)
    placed = {start + at * SIZE: page for at, page in enumerate(pages) if at != 3}
    driver.map(placed)
    driver.unmap(list(placed))
    assert moved == [3, 4, 3, 4]


def test_pages_that_go_back_are_taken_away_in_one_call(
    driver: CpuMemoryDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they are in the file, and without their page tables."""
    start, pages = driver.reserve(8 * SIZE), driver.create(8)
    placed = {start + at * SIZE: page for at, page in enumerate(reversed(pages))}
    driver.map(placed)
    calls: list[int] = []
    hold = driver._calls.hold
    with monkeypatch.context() as patch:
        patch.setattr(driver._calls, "hold", lambda s, n: (calls.append(n // SIZE), hold(s, n)))
        patch.setattr(driver._calls, "move", lambda s, n, t: calls.append(-n))
        driver.unmap(list(placed), keep=False)
    assert calls == [8]
    driver.release(pages[1:])
    assert file_bytes(driver) == SIZE
    driver.map({start + SIZE: pages[0]})
    fill(start + SIZE, b"a")


def test_page_tables_move_with_the_page(driver: CpuMemoryDriver) -> None:
    """A page mapped anew needs no page faults: they are what costs."""
    start, pages = driver.reserve(2 * SIZE), driver.create(1)
    driver.map({start: pages[0]})
    fill(start, b"a")
    driver.unmap([start])
    driver.map({start + SIZE: pages[0]})
    before = page_faults()
    for at in range(0, SIZE, mmap.PAGESIZE):
        fill(start + SIZE + at, b"b", 1)
    assert page_faults() - before < SIZE // mmap.PAGESIZE


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def test_a_page_that_is_shared_keeps_its_bytes_whichever_address_goes_first(
    driver: CpuMemoryDriver,
) -> None:
    start, (page,) = driver.reserve(3 * SIZE), driver.create(1)
    for first, second in ((0, 1), (1, 0)):
        driver.map({start: page, start + SIZE: page})
        fill(start + SIZE, b"ab"[first : first + 1])
        driver.unmap([start + first * SIZE])
        expected = b"ab"[first : first + 1] * SIZE
        assert ctypes.string_at(start + second * SIZE, SIZE) == expected
        driver.unmap([start + second * SIZE])
        driver.map({start + 2 * SIZE: page})
        assert ctypes.string_at(start + 2 * SIZE, SIZE) == expected
        driver.unmap([start + 2 * SIZE])


@pytest.mark.parametrize("keep", [True, False])
def test_an_unmap_that_the_kernel_refuses_changes_nothing(
    driver: CpuMemoryDriver, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    start, pages = driver.reserve(4 * SIZE), driver.create(2)
    placed = {start: pages[0], start + 2 * SIZE: pages[1]}
    driver.map(placed)
    fill(start, b"a")
    fill(start + 2 * SIZE, b"b")
    hold = driver._calls.hold

    def refuse_the_second(address: int, num_bytes: int) -> None:
        if address != start:
            raise OSError(12, "Cannot allocate memory")
        hold(address, num_bytes)

    monkeypatch.setattr(driver._calls, "hold", refuse_the_second)
    with pytest.raises(MemoryError, match=r"vm\.max_map_count"):
        driver.unmap(list(placed), keep=keep)
    monkeypatch.undo()
    assert ctypes.string_at(start, SIZE) == b"a" * SIZE
    assert ctypes.string_at(start + 2 * SIZE, SIZE) == b"b" * SIZE
    driver.unmap(list(placed))


def test_only_what_is_gone_is_mapped_again(
    driver: CpuMemoryDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the limit of mappings every call may be refused."""
    start, pages = driver.reserve(6 * SIZE), driver.create(3)
    at = [start, start + 2 * SIZE, start + 4 * SIZE]
    driver.map(dict(zip(at, pages, strict=True)))
    hold, map_run = driver._calls.hold, driver._map_run
    mapped: list[int] = []

    def refuse_the_last(address: int, num_bytes: int) -> None:
        if address == at[2]:
            raise OSError(12, "Cannot allocate memory")
        hold(address, num_bytes)

    monkeypatch.setattr(driver._calls, "hold", refuse_the_last)
    monkeypatch.setattr(driver, "_map_run", lambda run: (mapped.append(run[0][0]), map_run(run)))
    with pytest.raises(MemoryError):
        driver.unmap(at, keep=False)
    assert mapped == [at[1], at[0]]


@pytest.mark.parametrize("keep", [True, False])
def test_pages_that_cannot_be_put_back_are_no_not_now(
    driver: CpuMemoryDriver, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    start, pages = driver.reserve(6 * SIZE), driver.create(3)
    at = [start, start + 2 * SIZE, start + 4 * SIZE]
    driver.map(dict(zip(at, pages, strict=True)))
    for address in at:
        fill(address, b"a")
    hold, map_run = driver._calls.hold, driver._map_run

    def refuse_the_last(address: int, num_bytes: int) -> None:
        if address == at[2]:
            raise OSError(12, "Cannot allocate memory")
        hold(address, num_bytes)

    def refuse_the_second(run: Any) -> None:
        if run[0].address == at[1]:
            raise MemoryError("no mapping left")
        map_run(run)

    monkeypatch.setattr(driver._calls, "hold", refuse_the_last)
    monkeypatch.setattr(driver, "_map_run", refuse_the_second)
    with pytest.raises(RuntimeError, match=r"1 pages could not be put back: no mapping.*Restart"):
        driver.unmap(at, keep=keep)
    monkeypatch.undo()
    assert ctypes.string_at(at[0], SIZE) == ctypes.string_at(at[2], SIZE) == b"a" * SIZE


def test_a_fence_waits_for_the_work_of_all_threads(driver: CpuMemoryDriver) -> None:
    assert driver.fence().is_done()
    with driver.working():
        with driver.working():
            both: Fence = driver.fence()
        later = driver.fence()
        assert not both.is_done()
    assert both.is_done()
    with driver.working():
        assert later.is_done()
        waiting = threading.Thread(target=driver.fence().wait)
        waiting.start()
        assert waiting.is_alive()
    waiting.join()


def test_a_tensor_over_a_range_is_the_range(driver: CpuMemoryDriver) -> None:
    start, (page,) = driver.reserve(4 * SIZE), driver.create(1)
    tensor = driver.tensor(start, 4 * SIZE)
    assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == ((4 * SIZE,), torch.int8, start)
    driver.map({start + SIZE: page})
    tensor[SIZE : 2 * SIZE] = 7
    assert ctypes.string_at(start + SIZE, SIZE) == b"\x07" * SIZE
    driver.unmap([start + SIZE])
    driver.map({start + 3 * SIZE: page})
    assert int(tensor[3 * SIZE :].view(torch.int16)[5]) == 0x0707
    with pytest.raises(ValueError, match="not in one reserved range"):
        driver.tensor(start, 4 * SIZE + 1)


def test_a_tensor_keeps_its_memory(driver: CpuMemoryDriver) -> None:
    other = make_memory_driver(SIZE)
    start, (page,) = other.reserve(SIZE), other.create(1)
    other.map({start: page})
    tensor = other.tensor(start, SIZE)
    del other
    gc.collect()
    tensor[:] = 3
    assert int(tensor.sum(dtype=torch.int64)) == 3 * SIZE


def test_everything_is_given_back(driver: CpuMemoryDriver) -> None:
    before = num_mappings()
    files = num_files()
    other = make_memory_driver(SIZE)
    start, pages = other.reserve(4 * SIZE), other.create(2)
    other.map({start + SIZE: pages[0]})
    other.close()
    other.close()
    assert (num_mappings(), num_files()) == (before, files)
