"""Scheduler's and worker's side together: vLLM's block pool, ours over it, pages of a fake device.

Steps are scheduled ahead of their execution, as with asynchronous scheduling, and what they launch
on the device ends later still.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xllm_plugin import shims
from xllm_plugin.errors import (
    ConfigError,
    MisuseError,
    NotNowError,
    PagesExhaustedError,
    SeamError,
)
from xllm_plugin.testing.fakes import FakeMemoryDriver, ManualClock
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import Column, KVLayout
from xllm_plugin.xtensor.memory import ElasticMemory
from xllm_plugin.xtensor.messages import MemoryChange
from xllm_plugin.xtensor.page_pool import PoolPolicy
from xllm_plugin.xtensor.share import BudgetShare, Demand, PoolDemand, join_pool
from xllm_plugin.xtensor.slabs import SlabLedger

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

PAGE = 4
NUM_BLOCKS = 13
BLOCK_BYTES = 3 * PAGE
LAYOUT = KVLayout(NUM_BLOCKS, (Column(0, PAGE), Column(NUM_BLOCKS * PAGE, 2 * PAGE)))
# As with latent attention: a block is a page and a half, and a slab has an even number of them.
UNEVEN = KVLayout(
    NUM_BLOCKS,
    (Column(0, BLOCK_BYTES // 2), Column(NUM_BLOCKS * BLOCK_BYTES // 2, BLOCK_BYTES // 2)),
).aligned(PAGE)
CACHE_IDLE_S = 60.0


@dataclass(eq=False)
class Step:
    """One step: what it says about memory, what it writes, and what it must find."""

    change: MemoryChange | None
    writes: dict[int, int]
    shows: dict[int, int]


@dataclass(eq=False)
class FakeRequest:
    """A request's blocks, and what each of them shows once its step has run."""

    blocks: list[Any] = field(default_factory=list)


class Engine:
    """Both sides, and a queue of steps between them."""

    def __init__(
        self,
        slab_blocks: int,
        budget_slabs: int,
        share: BudgetShare | None = None,
        clock: ManualClock | None = None,
        layout: KVLayout = LAYOUT,
    ) -> None:
        shims.install()
        from vllm.v1.core.block_pool import BlockPool

        from xllm_plugin.xtensor.block_pool import adopt_block_pool
        from xllm_plugin.xtensor.kv_cache import ElasticKvCache

        self.clock = clock or ManualClock()
        self.layout = layout
        config = XTensorConfig(
            enabled=True, slab_blocks=slab_blocks, cache_idle_s=CACHE_IDLE_S, keep_idle_s=5.0
        )
        ledger = SlabLedger(NUM_BLOCKS, slab_blocks, budget_slabs)
        vllm_pool = BlockPool(
            NUM_BLOCKS, enable_caching=True, hash_block_size=1, enable_kv_cache_events=True
        )
        self.pool = adopt_block_pool(vllm_pool, ledger, self.clock)
        self.cache = ElasticKvCache(
            self.pool, layout, config, min_budget_slabs=1, share=share, clock=self.clock
        )
        self.share = share
        num_bytes = NUM_BLOCKS * BLOCK_BYTES
        self.driver = FakeMemoryDriver(
            granularity_bytes=PAGE, capacity_pages=num_bytes // PAGE, finish_on_wait=True
        )
        self.memory = ElasticMemory(self.driver, layout, slab_blocks, config, clock=self.clock)
        self.requests: list[FakeRequest] = []
        self.steps: deque[Step] = deque()
        self.writes: dict[int, int] = {}  # by the next step
        self.shows: dict[int, int] = {}  # block -> stamp, once all scheduled steps have run
        self.stamp = 0

    @property
    def slab_bytes(self) -> int:
        return self.pool.ledger.slab_blocks * BLOCK_BYTES

    def allocate(self, num_blocks: int) -> FakeRequest:
        request = FakeRequest(self.pool.get_new_blocks(num_blocks))
        for block in request.blocks:
            self.stamp = self.stamp % 250 + 1
            self.writes[block.block_id] = self.shows[block.block_id] = self.stamp
        self.requests.append(request)
        return request

    def hash_of(self, stamp: int) -> Any:
        from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

        return make_block_hash_with_group_id(BlockHash(bytes([stamp])), 0)

    def cache_blocks(self, request: FakeRequest) -> None:
        """Let other requests find the blocks; the stamp stands for the tokens."""
        for block in request.blocks:
            if block.block_hash is None:
                stamp = self.shows[block.block_id]
                self.pool._insert_block_hash(self.hash_of(stamp), block, num_tokens=1)

    def find(self, stamp: int) -> FakeRequest | None:
        from vllm.v1.core.kv_cache_utils import BlockHash

        found = self.pool.get_cached_block(BlockHash(bytes([stamp])), [0])
        if found is None:
            return None
        assert self.shows[found[0].block_id] == stamp, "the block shows another prefix"
        self.pool.touch(found)
        request = FakeRequest(list(found))
        self.requests.append(request)
        return request

    def end(self, request: FakeRequest) -> None:
        self.requests.remove(request)
        self.pool.free_blocks(reversed(request.blocks))

    def schedule(self) -> None:
        held = {block.block_id for request in self.requests for block in request.blocks}
        writes = {block: stamp for block, stamp in self.writes.items() if block in held}
        self.writes = {}
        shows = {block: self.shows[block] for block in held}
        self.cache.plan(num_requests=len(self.requests))
        version = self.pool.ledger.version
        self.pool.rebalance()
        assert self.pool.ledger.version == version, "there was more to plan"
        has_told, next_s = self.cache.has_told, self.cache.next_work_s()
        change = self.cache.take_change()
        assert not has_told or (change, self.cache.next_work_s()) == (None, next_s)
        self.steps.append(Step(change, writes, shows))

    def execute(self) -> None:
        """The oldest step, as a worker does; a block without memory is a fault of the device."""
        step = self.steps.popleft()
        if step.change is not None:
            self.memory.apply(step.change)
            self.cache.record(self.memory.report())
        elif self.memory.owes:
            self.memory.settle()
        start = self.memory.range.start
        for block, stamp in step.writes.items():
            for piece in self.layout.pieces(block, 1):
                self.driver.write(start + piece.start, bytes([stamp]) * len(piece))
        used = []
        for block, stamp in step.shows.items():
            for piece in self.layout.pieces(block, 1):
                used += [start + at for at in piece[::PAGE]]
                found = self.driver.read(start + piece.start, len(piece))
                assert found == bytes([stamp]) * len(piece), f"block {block} has lost its contents"
        self.driver.launch(*used)

    def run(self) -> None:
        """Schedule a step, execute all, and let the device finish."""
        self.schedule()
        while self.steps:
            self.execute()
        self.driver.finish_work()

    def sleep(self) -> None:
        """As vLLM: no request and no cached block is left, no step under way."""
        for request in list(self.requests):
            self.end(request)
        self.run()
        assert self.pool.reset_prefix_cache()
        self.memory.sleep()
        assert self.driver.num_pages == 0

    def check(self) -> None:
        self.pool.check_integrity()
        ledger = self.pool.ledger
        if ledger.draining:
            undrained = ledger.num_resident - len(ledger.draining)
            assert undrained <= ledger.budget_slabs or ledger.beyond_budget()
        self.memory.range.check_integrity()
        self.memory.pool.check_integrity()
        if not self.steps and not ledger.has_changes:
            assert self.memory.range.committed | self.memory._owed.keys() == ledger.resident


class ElasticMachine(RuleBasedStateMachine):
    """Requests keep what they wrote, whatever comes and goes around them."""

    @initialize(slab_blocks=st.integers(1, 4), is_uneven=st.booleans(), data=st.data())
    def start(self, slab_blocks: int, is_uneven: bool, data: st.DataObject) -> None:
        layout = UNEVEN if is_uneven else LAYOUT
        slab_blocks *= layout.unit_blocks(PAGE)
        self.num_slabs = NUM_BLOCKS // slab_blocks
        budget_slabs = data.draw(st.integers(1, self.num_slabs))
        self.engine = Engine(slab_blocks, budget_slabs, layout=layout)
        self.is_asleep = False

    @rule()
    def sleep(self) -> None:
        self.engine.sleep()
        self.is_asleep = True

    @rule()
    def wake(self) -> None:
        self.engine.memory.wake()
        self.is_asleep = False

    @precondition(lambda self: not self.is_asleep)
    @rule(num_blocks=st.integers(1, 5))
    def allocate(self, num_blocks: int) -> None:
        if num_blocks > self.engine.pool.get_num_free_blocks():
            with pytest.raises(ValueError, match="Cannot get"):
                self.engine.pool.get_new_blocks(num_blocks)
            return
        self.engine.allocate(num_blocks)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        self.engine.cache_blocks(data.draw(st.sampled_from(self.engine.requests)))

    @rule(stamp=st.integers(1, 30))
    def share(self, stamp: int) -> None:
        self.engine.find(stamp)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.engine.end(data.draw(st.sampled_from(self.engine.requests)))

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        self.engine.pool.evict_blocks({data.draw(st.integers(1, NUM_BLOCKS - 1))})

    @rule()
    def reset_prefix_cache(self) -> None:
        assert self.engine.pool.reset_prefix_cache() is not bool(self.engine.requests)

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        budget_slabs = data.draw(st.integers(1, self.num_slabs))
        self.engine.cache.set_budget(budget_slabs * self.engine.slab_bytes)

    @rule(seconds=st.sampled_from([1.0, 10.0, 2 * CACHE_IDLE_S]))
    def let_time_pass(self, seconds: float) -> None:
        self.engine.clock.advance(seconds)

    @precondition(lambda self: len(self.engine.steps) < 3)
    @rule()
    def schedule(self) -> None:
        self.engine.schedule()

    @precondition(lambda self: self.engine.steps)
    @rule(fault=st.sampled_from(["", "", "map", "create", "unmap"]), at=st.integers(1, 4))
    def execute(self, fault: str, at: int) -> None:
        with self.engine.driver.failing(fault, at):
            self.engine.execute()

    @rule(finish=st.booleans())
    def keep(self, finish: bool) -> None:
        if finish:
            self.engine.driver.finish_work()
        self.engine.memory.pool.maintain()

    @invariant()
    def the_books_are_right(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        """When all have ended and time has passed, memory is as at the start."""
        engine = self.engine
        engine.memory.wake()
        for request in list(engine.requests):
            engine.end(request)
        engine.run()
        engine.clock.advance(2 * CACHE_IDLE_S)
        engine.run()
        engine.clock.advance(2 * CACHE_IDLE_S)
        engine.memory.range.expect(())
        engine.memory.pool.maintain()
        engine.check()
        assert engine.pool.ledger.resident == {0}
        assert engine.driver.num_pages == engine.memory.range.pages_per_slab
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


ElasticMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestElastic = ElasticMachine.TestCase


def removed(engine: Engine) -> list[Any]:
    """Hashes that KV events say are gone, as numbers: those of the stamps."""
    from vllm.distributed.kv_events import BlockRemoved

    events = [event for event in engine.pool.take_events() if isinstance(event, BlockRemoved)]
    return [block_hash for event in events for block_hash in event.block_hashes]


def test_blocks_fill_a_slab_before_another_gets_memory() -> None:
    engine = Engine(slab_blocks=4, budget_slabs=3)
    first, second = engine.allocate(2), engine.allocate(2)
    third = engine.allocate(1)
    slabs = [{engine.pool.ledger.slab_of(b.block_id) for b in r.blocks} for r in engine.requests]
    assert slabs == [{0}, {0, 1}, {1}]
    engine.end(second)
    engine.allocate(1)
    assert engine.requests[-1].blocks[0].block_id in engine.pool.ledger.blocks_of(0)
    engine.end(third)
    engine.run()
    assert engine.pool.ledger.resident == {0}
    assert engine.requests[0] is first


def test_a_cached_block_keeps_its_memory_until_it_is_evicted() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=3)
    request = engine.allocate(2)
    engine.run()
    engine.cache_blocks(request)
    engine.end(request)
    engine.run()
    assert engine.pool.ledger.num_resident == 3
    assert engine.find(1) is not None
    engine.allocate(1)  # takes the other one, for the budget is full
    assert removed(engine) == [2]
    engine.run()
    assert engine.find(2) is None


def test_cold_slabs_are_dropped_and_said_so() -> None:
    engine = Engine(slab_blocks=2, budget_slabs=4)
    request = engine.allocate(5)
    engine.cache_blocks(request)
    engine.run()
    engine.end(request)
    assert engine.cache.next_work_s() == 6.0, "then the workers are asked what they still keep"
    engine.clock.advance(6.0)
    engine.run()
    assert engine.cache.next_work_s() == CACHE_IDLE_S
    assert not engine.cache.has_work()
    engine.clock.advance(CACHE_IDLE_S - 6.0)
    assert engine.cache.has_work()
    engine.run()
    # The block beside the null block has no slab of its own, and stays cached.
    assert sorted(removed(engine)) == [2, 3, 4, 5]
    assert engine.pool.ledger.resident == {0}
    assert engine.cache.section().num_dropped_slabs == 2
    assert engine.find(1) is not None


def test_a_shrink_waits_for_requests_and_a_growth_stops_it() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=6)
    held, going = engine.allocate(3), engine.allocate(2)
    engine.run()
    engine.cache.set_budget(3 * engine.slab_bytes)
    section = engine.cache.section()
    assert (section.num_resident_slabs, section.num_draining_slabs) == (6, 3)
    assert engine.pool.get_num_free_blocks() == 0
    engine.end(going)
    engine.run()
    assert engine.pool.ledger.num_resident == 4, "three of the request, one of the null block"
    engine.cache.set_budget(5 * engine.slab_bytes)
    assert not engine.pool.ledger.draining
    assert engine.pool.get_num_free_blocks() == 1
    engine.end(held)
    engine.run()


def test_what_drains_is_found_by_no_prefix() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=4)
    request = engine.allocate(3)
    engine.cache_blocks(request)
    engine.cache.set_budget(2 * engine.slab_bytes)
    assert len(removed(engine)) == 2
    engine.cache_blocks(request)  # as when it fills further blocks
    engine.end(request)
    engine.run()
    assert engine.pool.ledger.num_resident == 2
    assert len([stamp for stamp in (1, 2, 3) if engine.find(stamp)]) == 1


def test_a_block_freed_while_a_step_is_scheduled_keeps_its_memory_for_that_step() -> None:
    """VLLM copies from such blocks in that very step."""
    engine = Engine(slab_blocks=1, budget_slabs=3)
    request = engine.allocate(1)
    engine.run()
    engine.cache.plan()
    engine.end(request)
    change = engine.cache.take_change()
    assert change is None or not change.released
    engine.cache.plan()
    change = engine.cache.take_change()
    assert change is not None
    assert len(change.released) == 1


def test_a_step_that_changes_nothing_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(slab_blocks=2, budget_slabs=4)
    request = engine.allocate(4)
    engine.run()
    assert engine.cache.has_told
    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "rebalance", lambda: pytest.fail("nothing has changed"))
        engine.cache.plan()
    changes: tuple[Callable[[], object], ...] = (
        lambda: engine.allocate(1),
        lambda: engine.end(request),
        lambda: engine.cache.set_budget(3 * engine.slab_bytes),
        lambda: engine.clock.advance(6.0),  # it is time to ask what the workers still keep
    )
    for change in changes:
        change()
        assert not engine.cache.has_told
        engine.run()
        assert engine.cache.has_told


def test_memory_that_comes_back_before_the_workers_hear_of_it_is_not_spoken_of() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=3)
    engine.run()
    request = engine.allocate(1)
    engine.end(request)
    engine.pool.rebalance()
    assert not engine.pool.ledger.has_changes


@pytest.mark.parametrize("budget_bytes", [0, BLOCK_BYTES - 1, (NUM_BLOCKS + 1) * BLOCK_BYTES, True])
def test_budgets_that_cannot_be_are_refused(budget_bytes: int) -> None:
    engine = Engine(slab_blocks=1, budget_slabs=3)
    with pytest.raises(MisuseError, match="give"):
        engine.cache.set_budget(budget_bytes)
    assert engine.pool.ledger.budget_slabs == 3


def test_a_device_without_memory_is_tried_again_and_then_told_of() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=3)
    engine.allocate(1)
    engine.driver.fail_create()
    engine.run()  # what was kept ready has made room
    engine.allocate(1)
    engine.driver.capacity_pages = engine.driver.num_pages
    with pytest.raises(PagesExhaustedError):
        engine.run()
    engine.memory.range.check_integrity()


def test_the_report_counts_pages_and_calls() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=5)
    request = engine.allocate(2)
    engine.run()
    engine.end(request)
    engine.run()
    report = engine.cache.section().pages
    assert report is not None
    assert (report.num_mapped, report.num_reusable, report.num_created) == (3, 6, 9)
    assert (report.num_commits, report.num_releases) == (1, 1)
    assert report.num_bytes == 9 * PAGE
    section = engine.cache.section()
    assert (section.num_resident_slabs, section.fragmentation) == (1, 0.0)
    assert section.budget_bytes == 5 * BLOCK_BYTES


class TickingClock(ManualClock):
    """Passes a second whenever it is asked."""

    def __call__(self) -> float:
        self.advance(1.0)
        return super().__call__()


def test_time_is_counted_where_something_was_done() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=5)
    engine.run()
    memory = engine.memory
    memory._clock = TickingClock()
    before = memory.report()
    memory.apply(MemoryChange(budget_slabs=4, expected=(3,), number=9))
    report = memory.report()
    assert (report.commit_s, report.release_s) == (before.commit_s, before.release_s)
    memory.apply(MemoryChange(budget_slabs=4, committed=(3,), number=10))
    memory.apply(MemoryChange(budget_slabs=4, released=(3,), number=11))
    report = memory.report()
    assert (report.commit_s - before.commit_s, report.release_s) == (1.0, 1.0)
    memory.pool.policy = PoolPolicy(keep_mapped_pages=0)
    memory.pool.maintain()
    assert memory.report().num_unmap_calls == before.num_unmap_calls + 1


def test_only_vllm_s_own_pool_is_adopted() -> None:
    engine = Engine(slab_blocks=1, budget_slabs=3)
    from xllm_plugin.xtensor.block_pool import adopt_block_pool

    with pytest.raises(SeamError, match="block-pool-class"):
        adopt_block_pool(engine.pool, engine.pool.ledger)


class Spec:
    """As vLLM's `KVCacheSpec`: a request of full length takes eleven blocks."""

    page_size_bytes = BLOCK_BYTES

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return 10 * BLOCK_BYTES + 1


def adopt(config: XTensorConfig, num_blocks: int = NUM_BLOCKS) -> Any:
    """An elastic cache as a scheduler makes it, of one group of one layer."""
    shims.install()
    from vllm.v1.core.block_pool import BlockPool

    from xllm_plugin.xtensor.kv_cache import ElasticKvCache

    size = num_blocks * BLOCK_BYTES
    tensor = SimpleNamespace(
        size=size, layers=["a"], layer_stride=size, block_stride=BLOCK_BYTES, offset=0
    )
    return ElasticKvCache.adopt(
        SimpleNamespace(block_pool=BlockPool(num_blocks, enable_caching=True, hash_block_size=1)),
        SimpleNamespace(
            num_blocks=num_blocks,
            kv_cache_tensors=[tensor],
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=Spec())],
        ),
        SimpleNamespace(model_config=SimpleNamespace(max_model_len=77)),
        config,
        page_bytes=PAGE,
    )


def test_a_budget_that_holds_no_full_request_is_refused_with_one_that_does() -> None:
    too_small = 12 * BLOCK_BYTES - 1
    with pytest.raises(ConfigError, match=rf"budget_bytes={too_small}.* 77 tokens") as refused:
        adopt(XTensorConfig(budget_bytes=too_small))
    assert f"Give {12 * BLOCK_BYTES} or more" in str(refused.value)
    section = adopt(XTensorConfig(budget_bytes=12 * BLOCK_BYTES)).section()
    assert (section.budget_slabs, section.min_budget_slabs, section.num_slabs) == (12, 12, 13)


def test_slabs_round_what_a_request_takes_up() -> None:
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes 156"):
        adopt(XTensorConfig(slab_blocks=8))
    section = adopt(XTensorConfig(slab_blocks=8), num_blocks=20).section()
    assert (section.min_budget_slabs, section.num_slabs) == (2, 2)


def test_sleep_gives_all_memory_back_and_the_first_step_afterwards_has_it_again() -> None:
    engine = Engine(slab_blocks=2, budget_slabs=6)
    engine.allocate(7)
    engine.run()
    engine.sleep()
    assert engine.pool.ledger.num_resident == 1 < engine.memory.range.num_slabs
    assert engine.memory.range.committed == set()
    engine.memory.sleep()  # a second call changes nothing
    engine.run()
    assert engine.driver.num_pages == 0, "a step asleep takes no memory"
    engine.memory.wake()
    assert engine.memory.range.committed == {0}, "vLLM may write to its null block at any time"
    engine.allocate(5)
    engine.run()
    engine.check()


def test_an_engine_that_takes_no_step_asleep_has_its_slabs_with_the_first_one_awake() -> None:
    engine = Engine(slab_blocks=2, budget_slabs=6)
    held = engine.allocate(7)
    engine.run()
    engine.end(held)
    engine.memory.sleep()
    engine.memory.wake()
    assert engine.memory.owes
    engine.memory.settle()
    assert engine.memory.range.committed == engine.pool.ledger.resident
    assert not engine.memory.owes


def test_who_closes_has_given_all_memory_back() -> None:
    engine = Engine(slab_blocks=2, budget_slabs=6)
    engine.memory.start()
    engine.allocate(7)
    engine.run()
    assert engine.driver.num_pages > 0
    engine.memory.close()
    assert engine.driver.num_pages == 0
    engine.memory.close()  # vLLM may do so twice


def test_a_sleep_that_the_kernel_refuses_changes_nothing() -> None:
    engine = Engine(slab_blocks=2, budget_slabs=6)
    engine.allocate(5)
    engine.run()
    engine.driver.fail_unmap(1)
    with pytest.raises(PagesExhaustedError):
        engine.memory.sleep()
    engine.memory.settle()
    assert engine.memory.range.committed == engine.pool.ledger.resident
    engine.check()


class Machine:
    """Engines of one machine that share a pool."""

    def __init__(self, slab_blocks: int, total_slabs: int, wait_s: float = 0.0) -> None:
        self.slab_bytes = slab_blocks * BLOCK_BYTES
        self.slab_blocks = slab_blocks
        self.total_slabs = total_slabs
        self.wait_s = wait_s
        self.clock = ManualClock()
        self.folder = TemporaryDirectory()
        self.engines: list[Engine] = []

    def start(
        self, min_slabs: int = 1, max_requests: int = 1, max_slabs: int = NUM_BLOCKS
    ) -> Engine:
        share = join_pool(
            XTensorConfig(
                enabled=True,
                pool="p",
                pool_bytes=self.total_slabs * self.slab_bytes,
                min_bytes=min_slabs * self.slab_bytes,
                keep_idle_s=5.0,
                pool_wait_s=self.wait_s,
            ),
            PoolDemand(
                name=f"model {len(self.engines)}",
                slab_bytes=self.slab_bytes,
                slab_blocks=self.slab_blocks,
                full_request_slabs=-(-2 // self.slab_blocks),  # of one block, and the null block
                max_slabs=min(max_slabs, NUM_BLOCKS // self.slab_blocks),
                max_requests=max_requests,
            ),
            path=Path(self.folder.name) / "p.pool",
            sleep=lambda seconds: self.run(),
            clock=self.clock,
        )
        self.engines.append(Engine(self.slab_blocks, share.num_leased_slabs, share, self.clock))
        return self.engines[-1]

    def run(self) -> None:
        for engine in self.engines:
            engine.run()
            engine.memory.pool.maintain()
            self.clock.advance(0.1)  # for the workers to be asked again
            engine.run()

    def kill(self, engine: Engine) -> None:
        self.engines.remove(engine)
        assert engine.share is not None
        engine.share._member.abandon()

    def close(self) -> None:
        for engine in list(self.engines):
            self.kill(engine)
        self.folder.cleanup()

    def check(self) -> None:
        num_bytes = sum(engine.driver.num_pages * PAGE for engine in self.engines)
        assert num_bytes <= self.total_slabs * self.slab_bytes, "more than the machine has"
        for engine in self.engines:
            engine.check()
            assert engine.share is not None
            leased = engine.share.num_leased_slabs
            assert leased >= engine.share.min_slabs
            assert engine.driver.num_pages * PAGE <= leased * self.slab_bytes


class SharingMachine(RuleBasedStateMachine):
    """Two engines never have more pages than their pool, and each keeps what its requests wrote."""

    @initialize(
        slab_blocks=st.integers(1, 3),
        max_requests=st.sampled_from([1, 4, 128]),
        max_slabs=st.sampled_from([2, 5, NUM_BLOCKS]),
        total_slabs=st.integers(4, NUM_BLOCKS),
    )
    def start(self, slab_blocks: int, max_requests: int, max_slabs: int, total_slabs: int) -> None:
        self.machine = Machine(slab_blocks, total_slabs, wait_s=1.0)
        self.limits = {"max_requests": max_requests, "max_slabs": max_slabs}
        for _ in range(2):
            self.machine.start(**self.limits)

    def drawn(self, data: st.DataObject) -> Engine:
        return data.draw(st.sampled_from(self.machine.engines))

    @rule(data=st.data(), num_blocks=st.integers(1, 5))
    def allocate(self, data: st.DataObject, num_blocks: int) -> None:
        engine = self.drawn(data)
        if num_blocks <= engine.pool.get_num_free_blocks() and not engine.memory._is_asleep:
            request = engine.allocate(num_blocks)
            if data.draw(st.booleans()):
                engine.cache_blocks(request)

    @rule(data=st.data(), which=st.integers(0, 9))
    def end(self, data: st.DataObject, which: int) -> None:
        engine = self.drawn(data)
        if engine.requests:
            engine.end(engine.requests[which % len(engine.requests)])

    @rule(data=st.data())
    def schedule(self, data: st.DataObject) -> None:
        engine = self.drawn(data)
        if len(engine.steps) < 3:
            engine.schedule()

    @rule(data=st.data())
    def execute(self, data: st.DataObject) -> None:
        engine = self.drawn(data)
        if engine.steps:
            engine.execute()

    @rule(data=st.data(), finish=st.booleans())
    def keep(self, data: st.DataObject, finish: bool) -> None:
        engine = self.drawn(data)
        if finish:
            engine.driver.finish_work()
        engine.memory.pool.maintain()

    @rule(data=st.data(), budget_slabs=st.integers(0, NUM_BLOCKS + 1))
    def resize(self, data: st.DataObject, budget_slabs: int) -> None:
        engine = self.drawn(data)
        assert engine.share is not None
        most = min(self.machine.total_slabs, engine.pool.ledger.num_slabs)
        if engine.share.min_slabs <= budget_slabs <= most:
            engine.cache.set_budget(budget_slabs * engine.slab_bytes)
        else:
            with pytest.raises(MisuseError, match="give"):
                engine.cache.set_budget(budget_slabs * engine.slab_bytes)

    @rule(data=st.data())
    def sleep(self, data: st.DataObject) -> None:
        self.drawn(data).sleep()

    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        self.drawn(data).memory.wake()

    @rule(seconds=st.sampled_from([0.1, 6.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.machine.clock.advance(seconds)

    @precondition(lambda self: len(self.machine.engines) == 2)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.machine.kill(self.drawn(data))

    @precondition(lambda self: len(self.machine.engines) == 1)
    @rule()
    def start_again(self) -> None:
        (other,) = self.machine.engines
        try:
            self.machine.start(**self.limits)
        except NotNowError:
            # Cached blocks and what is leased ahead the other has given up: requests use the rest.
            assert other.share is not None
            num_left = self.machine.total_slabs - other.pool.ledger.num_in_use
            assert num_left < other.share.min_slabs, "there was memory for the minimum"

    @invariant()
    def the_pool_is_never_overdrawn(self) -> None:
        self.machine.check()

    def teardown(self) -> None:
        """When all requests have ended and time has passed, only minima are leased."""
        for engine in self.machine.engines:
            engine.memory.wake()
            for request in list(engine.requests):
                engine.end(request)
        for _ in range(3):
            self.machine.run()
            self.machine.clock.advance(2 * CACHE_IDLE_S)
        self.machine.run()
        for engine in self.machine.engines:
            assert engine.share is not None
            assert engine.share.num_leased_slabs == engine.share.min_slabs
        self.machine.close()


SharingMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestSharing = SharingMachine.TestCase


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine(slab_blocks=1, total_slabs=10, wait_s=1.0)
    yield made
    made.close()


def test_what_one_engine_leaves_another_has(machine: Machine) -> None:
    first, second = machine.start(), machine.start()
    held = [grown(machine, first) for _ in range(7)]
    assert (free(first), free(second)) == (0, 1), "eight for the first, two for the second"
    assert first.share is not None
    assert second.share is not None
    for request in held:
        first.end(request)
    machine.run()
    assert first.share.num_leased_slabs == 8, "nobody else wants it yet"
    for _ in range(4):
        grown(machine, second)
    machine.check()
    section = second.cache.section()
    assert section.pool is not None
    assert section.pool.leased_bytes >= 5 * machine.slab_bytes
    assert [member.name for member in section.pool.members] == ["model 0", "model 1"]


def test_cached_blocks_go_before_another_s_requests_wait(machine: Machine) -> None:
    first, second = machine.start(), machine.start()
    for _ in range(7):
        first.cache_blocks(grown(machine, first))
    for request in list(first.requests):
        first.end(request)
    machine.run()
    assert first.pool.ledger.num_cached_blocks == 7
    for _ in range(4):
        grown(machine, second)
    assert 0 < first.pool.ledger.num_cached_blocks < 6


def test_what_requests_use_stays_until_they_end(machine: Machine) -> None:
    first, second = machine.start(), machine.start()
    for _ in range(7):
        grown(machine, first)
    grown(machine, second)
    waiting = second.allocate(0)
    for _ in range(3):
        machine.run()
    assert free(second) == 0
    assert len(first.requests) == 7
    for request in first.requests[:3]:
        first.end(request)
    for _ in range(3):
        machine.run()
    assert free(second) > 0
    second.end(waiting)


def test_an_engine_starts_when_its_minimum_is_free(machine: Machine) -> None:
    first = machine.start()
    for _ in range(9):
        grown(machine, first)
    with pytest.raises(NotNowError, match=r"in use by model 0 \d+.*pool_wait_s"):
        machine.start()
    for request in list(first.requests):
        first.end(request)
    second = machine.start(min_slabs=4)
    assert second.share is not None
    assert second.share.num_leased_slabs == 4
    machine.check()


def test_a_minimum_over_what_a_server_can_take_is_refused(machine: Machine) -> None:
    with pytest.raises(ConfigError, match=r"min_bytes=\d+: this server can take \d+ bytes"):
        machine.start(min_slabs=NUM_BLOCKS + 1)


def test_the_minimum_and_the_most_of_an_engine_hold(machine: Machine) -> None:
    engine = machine.start(min_slabs=3)
    assert free(engine) == 2
    engine.cache.set_budget(4 * machine.slab_bytes)
    for _ in range(3):
        grown(machine, engine)
    assert free(engine) == 0
    section = engine.cache.section()
    assert section.pool is not None
    assert (section.pool.min_bytes, section.pool.max_bytes) == (
        3 * machine.slab_bytes,
        4 * machine.slab_bytes,
    )


def test_the_most_of_an_engine_may_rise_above_what_it_started_with(machine: Machine) -> None:
    engine = machine.start(max_slabs=4)
    engine.cache.set_budget(8 * machine.slab_bytes)
    for _ in range(7):
        grown(machine, engine)
    section = engine.cache.section()
    assert section.budget_slabs == 8
    assert section.pool is not None
    assert section.pool.max_bytes == 8 * machine.slab_bytes
    assert section.pool.members[0].max_bytes == 8 * machine.slab_bytes


def test_the_most_of_an_engine_may_fall_below_what_its_requests_use(machine: Machine) -> None:
    engine = machine.start()
    held = [grown(machine, engine) for _ in range(6)]
    engine.cache.set_budget(3 * machine.slab_bytes)
    machine.run()
    assert engine.share is not None
    assert engine.share.num_leased_slabs >= 7, "they stay until they end"
    for request in held:
        engine.end(request)
    machine.run()
    assert engine.share.num_leased_slabs == 3


@pytest.mark.parametrize(
    ("budget_slabs", "accepted"),
    [
        (2, r"give \d+ \(its minimum, xtensor\.min_bytes\) to"),
        (11, r"to \d+ \(all of the pool, xtensor\.pool_bytes\)"),
    ],
)
def test_a_budget_that_the_pool_cannot_give_is_refused_and_nothing_changes(
    machine: Machine, budget_slabs: int, accepted: str
) -> None:
    engine = machine.start(min_slabs=3, max_slabs=5)
    before = engine.cache.section()
    with pytest.raises(MisuseError, match=accepted):
        engine.cache.set_budget(budget_slabs * machine.slab_bytes)
    assert engine.cache.section() == before


def grown(machine: Machine, engine: Engine) -> FakeRequest:
    """One more request of one block, when the pool has given it."""
    request = engine.allocate(0)  # a request that waits makes the engine busy
    for _ in range(4):
        machine.run()
        if free(engine):
            break
    request.blocks += engine.allocate(1).blocks
    engine.requests.pop()
    machine.run()
    return request


def free(engine: Engine) -> int:
    num_blocks: int = engine.pool.get_num_free_blocks()
    return num_blocks


def test_a_report_from_before_a_shrink_gives_nothing_back(machine: Machine) -> None:
    """A step that was scheduled between may still take what the lease had."""
    engine = machine.start()
    share = engine.share
    assert share is not None
    assert share.plan(Demand(num_in_use=1, num_resident=1, num_requests=1)) == 3
    share.tell(1)
    machine.clock.advance(6.0)
    assert share.plan(Demand(num_in_use=1, num_resident=1, num_requests=0)) == 2
    share.tell(2)
    assert share.is_returning
    report = engine.memory.report()
    share.record(msgspec.structs.replace(report, change=1))
    assert share.num_leased_slabs == 3
    share.record(msgspec.structs.replace(report, change=2))
    assert share.num_leased_slabs == 2
    assert not share.is_returning
