"""The elastic range: over a fake device, against a model, and as torch tensors on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xllm_plugin.cpu.memory import CpuMemoryDriver
from xllm_plugin.errors import InternalError, PagesExhaustedError
from xllm_plugin.testing.fakes import FakeMemoryDriver, ManualClock
from xllm_plugin.xtensor.layout import KVLayout
from xllm_plugin.xtensor.page_pool import PagePool, PoolPolicy
from xllm_plugin.xtensor.range import ElasticRange

SIZE = 16
LAYOUTS = {
    # 3 blocks on 2 pages in each of 2 layers; 3 blocks on 2 pages.
    "layers": KVLayout.layer_outermost(num_layers=2, num_blocks=7, block_bytes=11, page_bytes=SIZE),
    "blocks": KVLayout.block_outermost(num_layers=2, num_blocks=7, block_bytes=5, page_bytes=SIZE),
}


def make_range(kind: str, budget_pages: int = 32) -> tuple[ElasticRange, FakeMemoryDriver]:
    driver = FakeMemoryDriver(granularity_bytes=SIZE, capacity_pages=64)
    policy = PoolPolicy(premap_pages=2, keep_mapped_pages=4, idle_s=1e9)
    pool = PagePool(driver, budget_pages=budget_pages, policy=policy, clock=ManualClock())
    return ElasticRange(pool, LAYOUTS[kind], "range"), driver


def write_block(range_: ElasticRange, driver: FakeMemoryDriver, block: int, data: bytes) -> None:
    layout = range_.layout
    for layer in range(layout.num_layers):
        driver.write(range_.start + layout.offset_bytes(layer, block), data * layout.block_bytes)


def read_block(range_: ElasticRange, driver: FakeMemoryDriver, block: int) -> bytes:
    layout = range_.layout
    return b"".join(
        driver.read(range_.start + layout.offset_bytes(layer, block), layout.block_bytes)
        for layer in range(layout.num_layers)
    )


@pytest.mark.parametrize("kind", LAYOUTS)
def test_memory_is_there_for_the_blocks_in_use_alone(kind: str) -> None:
    range_, driver = make_range(kind)
    assert driver.num_pages == 0
    needed = range_.num_pages_for([2, 3])
    range_.back([2, 3])
    assert driver.num_pages == range_.num_backed_pages == needed
    range_.free([2, 3])
    assert range_.num_backed_pages == 0
    with pytest.raises(ValueError, match="a page is mapped"):
        range_.close()
    range_._pool.close()
    range_.close()
    assert (driver.num_pages, driver.num_ranges) == (0, 0)


def test_a_page_stays_until_the_last_block_on_it_is_free() -> None:
    range_, driver = make_range("blocks")  # block 1 lies on pages 0 and 1, block 0 on page 0
    range_.back([0, 1])
    write_block(range_, driver, 0, b"x")
    range_.free([1])
    assert range_.num_backed_pages == 1
    assert read_block(range_, driver, 0) == b"x" * 10


def test_blocks_without_pages_are_not_now() -> None:
    range_, _ = make_range("layers", budget_pages=4)
    range_.back([0, 1])
    assert range_.num_pages_for([5]) == 4
    with pytest.raises(PagesExhaustedError):
        range_.back([2, 5])
    range_.check_integrity()
    range_.free([0, 1])
    range_.back([5])


def test_blocks_on_pages_that_are_there_come_first() -> None:
    range_, _ = make_range("blocks")
    range_.back([3])  # pages 1 and 2
    range_.back([6])
    range_.free([6])  # pages 3 and 4 stay mapped
    # 2: no new page; 4 and 5: one, still mapped; 0 and 1: one that is not; 6: two.
    assert range_.order_for_backing(range(3)) == [2, 0, 1]
    assert range_.order_for_backing([0, 1, 2, 4, 5, 6]) == [2, 4, 5, 0, 1, 6]


def test_what_is_expected_is_mapped_ahead() -> None:
    range_, driver = make_range("blocks")
    range_.expect([4, 5])
    range_._pool.maintain()
    assert driver.num_mapped == 2
    before = range_._pool.statistics().num_mapped
    range_.back([4])
    assert range_._pool.statistics().num_mapped == before


def test_misuse_is_refused() -> None:
    range_, _ = make_range("layers")
    range_.back([0])
    for blocks in ([0], [1, 1]):
        with pytest.raises(ValueError, match="backed already or named twice"):
            range_.back(blocks)
    for blocks in ([1], [0, 0]):
        with pytest.raises(ValueError, match="not backed or named twice"):
            range_.free(blocks)
    with pytest.raises(IndexError, match="block 7 of 7"):
        range_.back([7])
    with pytest.raises(InternalError, match="1 blocks are in use"):
        range_.close()
    pool = PagePool(FakeMemoryDriver(granularity_bytes=32), budget_pages=1)
    with pytest.raises(ValueError, match="pages of 16 bytes"):
        ElasticRange(pool, LAYOUTS["layers"], "range")
    range_.check_integrity()


class RangeMachine(RuleBasedStateMachine):
    """Blocks keep what was written to them while they are in use, and cost what was said."""

    blocks = st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True)

    @initialize(kind=st.sampled_from(sorted(LAYOUTS)), budget=st.integers(2, 16))
    def start(self, kind: str, budget: int) -> None:
        self.range, self.driver = make_range(kind, budget)
        self.pool = self.range._pool
        self.shows: dict[int, bytes] = {}
        self.stamps = 0

    @rule(blocks=blocks, fault=st.sampled_from(["", "", "map", "create"]))
    def back(self, blocks: list[int], fault: str) -> None:
        if self.shows.keys() & set(blocks):
            return
        needed = self.range.num_pages_for(blocks)
        if fault:
            {"map": self.driver.fail_map, "create": self.driver.fail_create}[fault]()
        try:
            self.range.back(blocks)
        except PagesExhaustedError:
            assert fault or needed > self.pool.num_available() or self.driver._work._pending
            return
        finally:
            self.driver._map_fault._left = self.driver._create_fault._left = None
        for block in blocks:
            self.stamps = self.stamps % 250 + 1
            self.shows[block] = bytes([self.stamps])
            write_block(self.range, self.driver, block, self.shows[block])

    @precondition(lambda self: self.shows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        going = data.draw(st.lists(st.sampled_from(sorted(self.shows)), min_size=1, unique=True))
        self.range.free(going)
        for block in going:
            del self.shows[block]

    @precondition(lambda self: self.shows)
    @rule(data=st.data())
    def launch(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.shows)))
        layout = self.range.layout
        self.driver.launch(*(self.range.start + p * SIZE for p in layout.pages_of_block(block)))

    @rule(blocks=blocks, finish=st.booleans())
    def maintain(self, blocks: list[int], finish: bool) -> None:
        if finish:
            self.driver.finish_work()
        self.range.expect(blocks)
        self.pool.maintain()

    @invariant()
    def blocks_keep_their_contents(self) -> None:
        if not hasattr(self, "range"):
            return
        self.range.check_integrity()
        self.pool.check_integrity()
        layout = self.range.layout
        for block, stamp in self.shows.items():
            expected = stamp * layout.num_layers * layout.block_bytes
            assert read_block(self.range, self.driver, block) == expected


RangeMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestElasticRange = RangeMachine.TestCase


def test_torch_sees_the_range_as_one_tensor() -> None:
    """As vLLM makes them: one int8 backing, every layer a strided view of it."""
    page = 2**16
    driver = CpuMemoryDriver(page_bytes=page, capacity_bytes=8 * page)
    pool = PagePool(driver, budget_pages=8)
    layout = KVLayout.layer_outermost(
        num_layers=3, num_blocks=1000, block_bytes=page // 4, page_bytes=page
    )
    range_ = ElasticRange(pool, layout, "kv")
    backing = driver.tensor(range_.start, range_.num_bytes)
    layers = [
        torch.as_strided(
            backing,
            (layout.num_blocks, layout.block_bytes),
            (layout.block_stride_bytes, 1),
            layout.offset_bytes(layer, 0),
        )
        for layer in range(layout.num_layers)
    ]
    range_.back([501, 502])
    for layer, view in enumerate(layers):
        view[501].fill_(layer + 1)
        view[502].view(torch.bfloat16).fill_(0.5)
    assert [int(view[501].sum(dtype=torch.int64)) for view in layers] == [
        (layer + 1) * layout.block_bytes for layer in range(3)
    ]
    assert pool.statistics().num_created == 3  # both blocks on one page a layer
    range_.free([501, 502])
    pool.close()
    range_.close()
    driver.close()
