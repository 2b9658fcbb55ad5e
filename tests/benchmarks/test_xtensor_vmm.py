"""The xTensor benchmark in small: its sides do the same, its checks can fail, its tables render."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.bench import readme, schema
from xllm_plugin.cpu.memory import PAGE_BYTES, CpuMemoryDriver

FOLDER = Path(__file__).parents[2] / "benchmarks" / "xtensor_vmm"
NUM_PAGES = 4


@pytest.fixture
def driver() -> Iterator[CpuMemoryDriver]:
    driver = CpuMemoryDriver(capacity_bytes=NUM_PAGES * PAGE_BYTES)
    yield driver
    driver.close()


def make_side(bench: ModuleType, kind: str, driver: CpuMemoryDriver) -> Any:
    if kind == "create":
        return bench.CreatePerMap(driver, NUM_PAGES)
    if kind == "lazy":
        return bench.Lazy(NUM_PAGES)
    return bench.Pooled(driver, NUM_PAGES, moving=kind == "moving")


@pytest.mark.parametrize("kind", ["create", "moving", "same", "lazy"])
def test_every_side_gives_memory_that_holds_what_is_written(
    bench: ModuleType, driver: CpuMemoryDriver, kind: str
) -> None:
    side = make_side(bench, kind, driver)
    for _ in range(3):
        for slots in ([0], [1, 2, 3]):
            addresses = side.get(slots)
            assert len(set(addresses)) == len(slots)
            bench.write_once(addresses)
            assert all(ctypes.string_at(at + PAGE_BYTES - 4096, 1) == b"\x01" for at in addresses)
            side.give(addresses)


def test_a_pool_that_moves_never_finds_its_page_there(
    bench: ModuleType, driver: CpuMemoryDriver
) -> None:
    moving = make_side(bench, "moving", driver)
    for _ in range(3):
        moving.give(moving.get(range(NUM_PAGES)))
    statistics = moving.pool.statistics()
    assert (statistics.num_created, statistics.num_reused) == (NUM_PAGES, 0)
    assert statistics.num_mapped == 3 * NUM_PAGES


def test_the_tables_can_be_rendered(bench: ModuleType, driver: CpuMemoryDriver) -> None:
    others = [CpuMemoryDriver(capacity_bytes=NUM_PAGES * PAGE_BYTES) for _ in range(2)]
    reference = make_side(bench, "create", driver)
    reuse = make_side(bench, "same", others[0])
    measured = bench.measure([reference, reuse], others[1], NUM_PAGES, 2)
    run = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench xtensor_vmm")
    result = run.finish(
        rows=bench.rows(measured, reference.name),
        checks=bench.checks(measured, reference.name, reuse),
        notes=bench.notes(NUM_PAGES),
    )
    text = readme.render(result)
    assert "| pool, same addresses | 4 |" in text
    assert "kvcached at e8e6406 | 193 | 1.45 | 36 | 25.6 |" in text
    assert result.checks[0].passed
    for driver_ in others:
        driver_.close()


def test_a_pool_that_is_not_cheaper_fails_the_run(
    bench: ModuleType, driver: CpuMemoryDriver
) -> None:
    reuse = make_side(bench, "same", driver)
    reuse.give(reuse.get(range(NUM_PAGES)))
    slow = bench.Times(get=[100.0], write=[10.0], give=[90.0])
    fast = bench.Times(get=[30.0], write=[10.0], give=[10.0])
    measured = bench.Measured({"reference": {1: slow}, reuse.name: {1: fast}}, {1: []})
    created, cheaper = bench.checks(measured, "reference", reuse)
    assert created.passed
    assert (cheaper.passed, cheaper.detail) == (False, "4.0 times, by medians")
