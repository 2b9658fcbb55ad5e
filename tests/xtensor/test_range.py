"""The elastic range: over a fake device, and as torch tensors on the CPU."""

from __future__ import annotations

import pytest
import torch

from xllm_plugin.cpu.memory import CpuMemoryDriver
from xllm_plugin.errors import ConfigError, InternalError, PagesExhaustedError
from xllm_plugin.testing.fakes import FakeMemoryDriver, ManualClock
from xllm_plugin.xtensor.layout import Column, KVLayout
from xllm_plugin.xtensor.page_pool import PagePool, PoolPolicy
from xllm_plugin.xtensor.range import ElasticRange

PAGE = 16
# Of 8 blocks: a page and two pages each in two columns; a slab of two is on 6 pages.
LAYOUT = KVLayout(8, (Column(0, PAGE), Column(8 * PAGE, 2 * PAGE)))


def make_range(budget_pages: int = 64) -> tuple[ElasticRange, FakeMemoryDriver]:
    driver = FakeMemoryDriver(granularity_bytes=PAGE, capacity_pages=64)
    policy = PoolPolicy(premap_pages=2, keep_mapped_pages=64, idle_s=1e9)
    pool = PagePool(driver, budget_pages=budget_pages, policy=policy, clock=ManualClock())
    return ElasticRange(pool, LAYOUT, 2, "range"), driver


def test_memory_is_there_for_committed_slabs_alone() -> None:
    range_, driver = make_range()
    assert (range_.num_slabs, range_.pages_per_slab, driver.num_pages) == (4, 6, 0)
    assert range_.commit([1, 3]) == 0
    assert driver.num_pages == 12
    for piece in LAYOUT.pieces(2, 2):
        driver.write(range_.start + piece.start, b"x" * len(piece))
    range_.check_integrity()
    range_.decommit([1, 3])
    assert range_.committed == frozenset()
    range_._pool.close()
    range_.close()
    assert (driver.num_pages, driver.num_ranges) == (0, 0)


def test_a_slab_that_comes_back_soon_has_its_pages_still() -> None:
    range_, driver = make_range()
    range_.commit([2])
    range_.decommit([2])
    assert range_.commit([2]) == 6
    assert driver.num_pages == 6


def test_slabs_without_pages_are_not_now_and_nothing_is_committed() -> None:
    range_, _ = make_range(budget_pages=8)
    range_.commit([0])
    with pytest.raises(PagesExhaustedError):
        range_.commit([1])
    assert range_.committed == {0}
    range_.check_integrity()


def test_what_is_expected_is_mapped_ahead() -> None:
    range_, driver = make_range()
    range_.commit([0])
    range_.expect([0, 1])
    range_._pool.maintain()
    assert driver.num_pages == 8, "the policy's two pages"


@pytest.mark.parametrize("slabs", [[1, 1], [0, 1]])
def test_a_slab_is_committed_once(slabs: list[int]) -> None:
    range_, _ = make_range()
    range_.commit([0])
    with pytest.raises(ValueError, match="committed already or named twice"):
        range_.commit(slabs)
    assert range_.committed == {0}


@pytest.mark.parametrize("slabs", [[0, 0], [0, 1]])
def test_what_is_not_committed_is_not_given_back(slabs: list[int]) -> None:
    range_, _ = make_range()
    range_.commit([0])
    with pytest.raises(ValueError, match="not committed or named twice"):
        range_.decommit(slabs)
    assert range_.committed == {0}


def test_a_slab_may_show_another_s_pages() -> None:
    range_, driver = make_range()
    range_.commit([0])
    range_.alias({2: 0, 3: 0})
    assert range_.committed == {0}
    assert range_.aliases == {2: 0, 3: 0}
    assert driver.num_pages == 6
    driver.write(range_.start, b"x" * PAGE)
    assert driver.read(range_.start + 4 * PAGE, PAGE) == b"x" * PAGE
    range_.check_integrity()
    range_.decommit([0, 2])  # the page lives as long as one address shows it
    range_._pool.maintain()
    assert driver.num_pages == 6
    assert driver.read(range_.start + 6 * PAGE, PAGE) == b"x" * PAGE
    range_.decommit([3])
    range_._pool.close()
    range_.close()
    assert driver.num_pages == 0


@pytest.mark.parametrize("shown", [{0: 1}, {2: 0}, {3: 2}, {3: 3}])
def test_only_a_committed_slab_is_shown_and_only_where_nothing_is(shown: dict[int, int]) -> None:
    range_, _ = make_range()
    range_.commit([0, 1])
    range_.alias({2: 0})
    with pytest.raises(ValueError, match="one is committed, or its source is not"):
        range_.alias(shown)
    with pytest.raises(ValueError, match="committed already"):
        range_.commit([2])
    assert range_.aliases == {2: 0}
    range_.check_integrity()


def test_an_alias_without_room_for_its_mappings_is_not_now() -> None:
    range_, driver = make_range()
    range_.commit([0])
    driver.fail_map(3)
    with pytest.raises(PagesExhaustedError):
        range_.alias({1: 0})
    assert range_.aliases == {}
    range_.check_integrity()
    range_.alias({1: 0})
    range_.check_integrity()


def test_integrity_notices_an_alias_that_shows_something_else() -> None:
    range_, _ = make_range()
    range_.commit([0, 1])
    range_.alias({2: 0})
    range_._aliases[2] = 1
    with pytest.raises(InternalError, match="slab 2 does not show the pages of slab 1"):
        range_.check_integrity()


def test_there_are_no_other_slabs() -> None:
    range_, _ = make_range()
    with pytest.raises(IndexError):
        range_.commit([4])


def test_a_range_in_use_stays() -> None:
    range_, _ = make_range()
    range_.commit([0])
    with pytest.raises(InternalError, match="1 slabs are committed"):
        range_.close()
    range_.decommit([0])
    with pytest.raises(ValueError, match="a page is mapped"):
        range_.close()


def test_integrity_notices_a_page_that_is_missing() -> None:
    range_, _ = make_range()
    range_.commit([0])
    range_._pool.retire("range", [range_.start])
    with pytest.raises(InternalError, match="the pool has"):
        range_.check_integrity()


def test_slabs_begin_and_end_with_pages() -> None:
    pool = PagePool(FakeMemoryDriver(granularity_bytes=2 * PAGE), budget_pages=1)
    ElasticRange(pool, LAYOUT, 2, "fits")
    with pytest.raises(ConfigError, match="slabs of 3 blocks of 16 bytes"):
        ElasticRange(pool, LAYOUT, 3, "range")


def test_torch_sees_the_range_as_one_tensor() -> None:
    """As vLLM makes them: one int8 backing, every layer a strided view of it."""
    page = 2**16
    driver = CpuMemoryDriver(page_bytes=page, capacity_bytes=8 * page)
    pool = PagePool(driver, budget_pages=8)
    layout = KVLayout(1000, tuple(Column(layer * 1000 * page, page) for layer in range(3)))
    range_ = ElasticRange(pool, layout, 1, "kv")
    backing = driver.tensor(range_.start, layout.num_bytes)
    layers = [
        torch.as_strided(backing, (1000, page), (page, 1), column.start_bytes)
        for column in layout.columns
    ]
    range_.commit([501, 502])
    for layer, view in enumerate(layers):
        view[501].fill_(layer + 1)
        view[502].view(torch.bfloat16).fill_(0.5)
    sums = [int(view[501].sum(dtype=torch.int64)) for view in layers]
    assert sums == [(layer + 1) * page for layer in range(3)]
    assert pool.statistics().num_created == 6
    range_.decommit([501, 502])
    pool.close()
    range_.close()
    driver.close()
