"""Ranges for requests: how many of what size, which one a request gets, what may not be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.errors import ConfigError, InternalError
from xllm_plugin.xtensor.config import XTensorConfig, form_refusal
from xllm_plugin.xtensor.layout import MAX_MAPPINGS, MOST_PAGE_BYTES, Column, KVLayout
from xllm_plugin.xtensor.request_ranges import (
    MAX_VIRTUAL_BLOCKS,
    RangeLedger,
    RangePlan,
    mapping_limit,
    plan_ranges,
    slab_mappings,
)
from xllm_plugin.xtensor.slabs import BlockKind

PAGE = 4096


def layout(num_blocks: int, num_columns: int) -> KVLayout:
    columns = (Column(at * num_blocks * PAGE, PAGE) for at in range(num_columns))
    return KVLayout(num_blocks, tuple(columns))


def contiguous(slab_blocks: int = 0) -> XTensorConfig:
    return XTensorConfig(enabled=True, form="contiguous", slab_blocks=slab_blocks)


@given(st.integers(2, 50_000), st.integers(1, 60), st.integers(1, 3000))
def test_slabs_keep_within_the_mappings_of_a_process(
    num_blocks: int, num_columns: int, full_blocks: int
) -> None:
    plan = plan_ranges(
        contiguous(), layout(num_blocks, num_columns), full_blocks, PAGE, max_mappings=MAX_MAPPINGS
    )
    positions = plan.num_slabs + plan.max_aliases
    assert 2 * num_columns * positions <= MAX_MAPPINGS
    assert plan.max_aliases >= plan.num_slabs
    assert plan.slab_blocks & (plan.slab_blocks - 1) == 0, "of which large pages are made"
    assert plan.num_slabs * plan.slab_blocks <= num_blocks
    assert plan.range_blocks >= full_blocks
    assert plan.num_blocks <= MAX_VIRTUAL_BLOCKS + num_blocks + plan.slab_blocks


def test_slabs_of_too_few_blocks_are_refused_with_a_number_that_does() -> None:
    wide = layout(11_650, 30)
    with pytest.raises(
        ConfigError, match=r"slab_blocks=8.*max_map_count.*Give slab_blocks 64, or 0"
    ):
        plan_ranges(contiguous(8), wide, 256, PAGE, max_mappings=MAX_MAPPINGS)
    assert plan_ranges(contiguous(43), wide, 256, PAGE, max_mappings=MAX_MAPPINGS).slab_blocks == 43
    assert plan_ranges(contiguous(), wide, 256, PAGE, max_mappings=MAX_MAPPINGS).slab_blocks == 64
    more = plan_ranges(contiguous(8), wide, 256, PAGE, max_mappings=8 * MAX_MAPPINGS)
    assert more.slab_blocks == 8, "where the system allows more"


def test_a_slab_of_several_pages_may_take_a_mapping_for_each() -> None:
    """Layers inside the blocks, and blocks of 16 MiB: after a while no two pages lie in a row."""
    inside = KVLayout(4096, (Column(0, 8 * MOST_PAGE_BYTES),))
    assert slab_mappings(inside, 1) == 9
    with pytest.raises(ConfigError, match=r"Set vm\.max_map_count to \d+, ") as caught:
        plan_ranges(contiguous(), inside, 64, PAGE, max_mappings=MAX_MAPPINGS)
    wanted = int(str(caught.value).split("max_map_count to ")[1].split(",")[0])
    plan = plan_ranges(contiguous(), inside, 64, PAGE, max_mappings=wanted // 2)
    assert plan.max_aliases >= plan.num_slabs > plan.range_slabs


def test_a_slab_is_no_larger_than_the_memory() -> None:
    plan = plan_ranges(contiguous(99), layout(10, 2), 4, PAGE, max_mappings=MAX_MAPPINGS)
    assert (plan.slab_blocks, plan.num_slabs, plan.num_ranges) == (10, 1, 0)


def test_the_limit_is_half_of_the_system_s(tmp_path: Path) -> None:
    said = tmp_path / "max_map_count"
    said.write_text("1048576\n")
    assert mapping_limit(said) == 2**19
    assert mapping_limit(tmp_path / "none") == MAX_MAPPINGS


def test_a_form_needs_elastic_memory_and_no_pool() -> None:
    assert form_refusal(XTensorConfig()) is None
    assert form_refusal(contiguous()) is None
    assert "enabled=true" in str(form_refusal(XTensorConfig(form="contiguous")))
    pooled = XTensorConfig(enabled=True, form="contiguous", pool="box")
    assert "xtensor.pool=box" in str(form_refusal(pooled))


PLAN = RangePlan(slab_blocks=2, range_slabs=3, num_slabs=6, max_aliases=2)


class Book:
    """A ledger, and requests that fill ranges of it."""

    def __init__(self) -> None:
        self.ledger = RangeLedger(PLAN, 6)
        self.ledger.note(0, BlockKind.USED, 0.0)

    def begin(self, num_slabs: int, num_expected: int | None = None) -> int:
        first = self.ledger.begin(num_expected or num_slabs)
        assert first is not None
        for slab in range(first, first + num_slabs):
            self.ledger.commit(slab)
            self.note(slab, BlockKind.USED)
        return first

    def note(self, slab: int, kind: BlockKind) -> None:
        for block in self.ledger.blocks_of(slab):
            self.ledger.note(block, kind, 0.0)
        self.ledger.check_integrity()

    def end(self, first: int, num_slabs: int) -> None:
        self.ledger.end(first)
        for slab in range(first, first + num_slabs):
            self.note(slab, BlockKind.FREE)
            self.ledger.release(slab)
        self.ledger.check_integrity()


def test_a_request_gets_the_range_that_had_as_many_slabs_with_pages() -> None:
    book = Book()
    one, three = book.begin(1), book.begin(3)
    book.end(one, 1)
    book.end(three, 3)
    assert book.begin(2) == three, "one of three serves two"
    assert book.begin(1) == one
    book.ledger.check_integrity()


def test_a_request_that_none_fits_gets_the_largest() -> None:
    book = Book()
    one, two = book.begin(1), book.begin(2)
    book.end(two, 2)
    book.end(one, 1)
    assert book.begin(1, num_expected=3) == two


def test_ranges_last_as_long_as_slabs() -> None:
    book = Book()
    assert [book.begin(1) for _ in range(5)] == [1, 4, 7, 10, 13]
    assert book.ledger.begin(1) is None
    assert book.ledger.num_available == 0


def test_a_range_with_cached_slabs_is_nobody_s() -> None:
    book = Book()
    first = book.begin(2)
    book.note(first, BlockKind.CACHED)
    book.ledger.end(first)
    book.note(first + 1, BlockKind.FREE)
    assert book.ledger.longest_idle() == first + 1, "what nobody wants goes first"
    book.ledger.release(first + 1)
    assert book.ledger.longest_idle() == first
    assert book.begin(1) != first
    book.note(first, BlockKind.FREE)
    book.ledger.release(first)
    assert book.begin(2) == first


def test_workers_are_told_what_changed_and_no_more() -> None:
    book = Book()
    first = book.begin(2)
    assert book.ledger.take_changes() == ((0, first, first + 1), (), ())
    second = book.ledger.begin(1)
    assert second is not None
    book.ledger.alias(second, first)
    book.note(second, BlockKind.USED)
    assert book.ledger.take_changes().aliased == ((second, first),)
    # The alias goes and its slab has pages of its own at once: that is a change.
    book.note(second, BlockKind.FREE)
    book.ledger.commit(second)
    assert book.ledger.take_changes() == ((second,), (second,), ())
    # Pages that go and come back before anybody is told are not spoken of.
    book.ledger.note(2 * second, BlockKind.USED, 0.0)
    book.ledger.note(2 * second, BlockKind.FREE, 0.0)
    book.ledger.release(second)
    book.ledger.commit(second)
    assert not book.ledger.has_changes
    assert book.ledger.take_changes() == ((), (), ())


def test_what_is_shown_stays_as_it_is() -> None:
    book = Book()
    first = book.begin(1)
    second = book.ledger.begin(1)
    assert second is not None
    book.ledger.alias(second, first)
    book.note(second, BlockKind.USED)
    with pytest.raises(InternalError, match="becomes CACHED, was USED"):
        book.ledger.note(2 * first, BlockKind.CACHED, 0.0)
    with pytest.raises(InternalError, match="becomes CACHED"):
        book.ledger.note(2 * second, BlockKind.CACHED, 0.0)
    with pytest.raises(InternalError, match="in use and cannot go"):
        book.ledger.release(first)


def test_what_may_not_be_is_our_bug() -> None:
    book = Book()
    first = book.begin(1)
    with pytest.raises(InternalError, match="of nobody"):
        book.ledger.commit(first + PLAN.range_slabs)
    with pytest.raises(InternalError, match="cannot show"):
        book.ledger.alias(first + 1, first + 2)
    book.begin(3)
    with pytest.raises(InternalError, match="beyond the budget"):
        book.begin(2)
    book.ledger.check_integrity()


def test_slabs_that_come_soonest_are_expected_first() -> None:
    book = Book()
    first, second = book.begin(1), book.begin(1)
    book.ledger.note(2 * first + 1, BlockKind.FREE, 0.0)
    assert book.ledger.expected(2) == (second + 1, first + 1)
    assert book.ledger.expected(1) == (second + 1,)
    book.begin(3)
    assert book.ledger.expected(2) == (), "the budget is full"
