"""Ranges for requests: vLLM's cache manager with our classes, and pages of a fake device.

A small scheduler does what vLLM's does: running requests first, preemption from the end, then
those that wait, with what the prefix cache has of them.  Steps are scheduled ahead of their
execution, and what they launch on the device ends later still.  What a token's KV shows is a digest
of the tokens up to it, so whoever reads another request's, or none, is found out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xllm_plugin import shims
from xllm_plugin.errors import ConfigError, InternalError, PagesExhaustedError, SeamError
from xllm_plugin.testing.fakes import FakeMemoryDriver, ManualClock
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import Column, KVLayout
from xllm_plugin.xtensor.memory import ElasticMemory
from xllm_plugin.xtensor.messages import MemoryChange
from xllm_plugin.xtensor.request_ranges import RangeLedger, plan_ranges

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

PAGE = 4
BLOCK_TOKENS = 2
MAX_TOKENS = 12
FULL_BLOCKS = MAX_TOKENS // BLOCK_TOKENS
NUM_BLOCKS = 25
BLOCK_BYTES = 3 * PAGE
LAYOUT = KVLayout(NUM_BLOCKS, (Column(0, PAGE), Column(NUM_BLOCKS * PAGE, 2 * PAGE)))
# As with latent attention: a block is a page and a half, and a slab has an even number of them.
UNEVEN = KVLayout(
    NUM_BLOCKS, (Column(0, 3 * PAGE // 2), Column(NUM_BLOCKS * 3 * PAGE // 2, 3 * PAGE // 2))
)
MAX_MAPPINGS = 10 * NUM_BLOCKS  # each slab of a block, at two addresses
STEP_TOKENS = 5
CACHE_IDLE_S = 60.0


@dataclass(eq=False)
class Step:
    """One step: what it says about memory, and tokens by their place: (block, offset) -> digest."""

    change: MemoryChange | None
    writes: dict[tuple[int, int], int]
    reads: dict[tuple[int, int], int]


@dataclass
class Job:
    """What a request is to become."""

    request: Any
    num_tokens: int
    answer: list[int] = field(default_factory=list)


class Engine:
    """A scheduler, both sides of the memory, and a queue of steps between them."""

    def __init__(
        self,
        slab_blocks: int = 1,
        *,
        budget_slabs: int | None = None,
        max_aliases: int | None = None,
        caching: bool = True,
        layout: KVLayout = LAYOUT,
    ) -> None:
        shims.install()
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        from xllm_plugin.xtensor.contiguous import adopt_contiguous
        from xllm_plugin.xtensor.kv_cache import ElasticKvCache

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.clock = ManualClock()
        config = XTensorConfig(
            enabled=True,
            form="contiguous",
            slab_blocks=slab_blocks,
            cache_idle_s=CACHE_IDLE_S,
            keep_idle_s=5.0,
        )
        plan = plan_ranges(config, layout, FULL_BLOCKS, PAGE, max_mappings=MAX_MAPPINGS)
        if max_aliases is not None:
            plan = replace(plan, max_aliases=max_aliases)
        self.plan = plan
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.manager: Any = KVCacheManager(
            KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=MAX_TOKENS,
            scheduler_block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
            enable_caching=caching,
            enable_kv_cache_events=True,
        )
        ledger = RangeLedger(plan, plan.num_slabs if budget_slabs is None else budget_slabs)
        self.pool = adopt_contiguous(self.manager, ledger, self.clock)
        self.ledger = ledger
        self.cache = ElasticKvCache(
            self.pool,
            layout,
            config,
            min_budget_slabs=plan.range_slabs + 1,
            clock=self.clock,
        )
        self.layout = replace(layout, num_blocks=plan.num_blocks).aligned(PAGE)
        num_bytes = plan.num_slabs * plan.slab_blocks * BLOCK_BYTES
        self.driver = FakeMemoryDriver(
            granularity_bytes=PAGE, capacity_pages=num_bytes // PAGE, finish_on_wait=True
        )
        self.memory = ElasticMemory(
            self.driver,
            self.layout,
            plan.slab_blocks,
            config,
            num_slabs=plan.num_slabs,
            clock=self.clock,
        )
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.steps: deque[Step] = deque()
        self.num_requests = self.num_preemptions = self.num_found_tokens = 0

    # What vLLM's scheduler does

    def submit(self, prompt: list[int], num_answered: int = 1) -> Job:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.num_requests += 1
        request = Request(
            str(self.num_requests),
            prompt,
            SamplingParams(max_tokens=num_answered),
            None,
            block_hasher=self.hasher,
        )
        job = Job(request, min(len(prompt) + num_answered, MAX_TOKENS))
        self.waiting.append(job)
        return job

    def schedule(self) -> None:
        self.cache.plan(num_requests=len(self.waiting) + len(self.running))
        version = self.pool.ledger.version
        self.pool.rebalance()
        assert self.pool.ledger.version == version, "there was more to plan"
        chunks: dict[str, int] = {}
        was_preempted = False
        left = STEP_TOKENS
        for job in list(self.running):
            if job not in self.running or not left:
                continue
            num_tokens = min(job.request.num_tokens - job.request.num_computed_tokens, left)
            while self.manager.allocate_slots(job.request, num_tokens) is None:
                was_preempted = True
                victim = self.running.pop()
                left += chunks.pop(victim.request.request_id, 0)
                self.preempt(victim)
                if victim is job:
                    break
            else:
                chunks[job.request.request_id] = num_tokens
                left -= num_tokens
        while self.waiting and left and not was_preempted:
            num_tokens = self.admit(self.waiting[0], left)
            if not num_tokens:
                break
            job = self.waiting.pop(0)
            self.running.append(job)
            chunks[job.request.request_id] = num_tokens
            left -= num_tokens
        self.steps.append(self.step_of(chunks))
        self.end_those_that_are_done()

    def admit(self, job: Job, left: int) -> int:
        """Tokens that the step computes of it; 0: not now."""
        found, num_found, _ = self.manager.get_computed_blocks(job.request)
        num_tokens: int = min(job.request.num_tokens - num_found, left)
        slots = self.manager.allocate_slots(
            job.request,
            num_tokens,
            num_found,
            found,
            full_sequence_must_fit=True,
            has_scheduled_reqs=bool(self.running),
        )
        if slots is None:
            return 0
        self.num_found_tokens += num_found
        job.request.num_computed_tokens = num_found
        return num_tokens

    def preempt(self, job: Job) -> None:
        self.num_preemptions += 1
        self.manager.free(job.request)
        job.request.num_computed_tokens = 0
        self.waiting.insert(0, job)

    def abort(self, job: Job) -> None:
        (self.running if job in self.running else self.waiting).remove(job)
        self.manager.free(job.request)

    def step_of(self, chunks: dict[str, int]) -> Step:
        writes: dict[tuple[int, int], int] = {}
        reads: dict[tuple[int, int], int] = {}
        for job in self.running:
            request = job.request
            num_tokens = chunks.get(request.request_id, 0)
            if not num_tokens:
                continue
            (table,) = self.manager.get_block_ids(request.request_id)
            assert table == list(range(table[0], table[0] + len(table))), "no plain range"
            computed = request.num_computed_tokens + num_tokens
            shows = {
                (table[at // BLOCK_TOKENS], at % BLOCK_TOKENS): digest(
                    request.all_token_ids[: at + 1]
                )
                for at in range(computed)
            }
            reads |= shows
            writes |= dict(list(shows.items())[request.num_computed_tokens :])
            request.num_computed_tokens = computed
            if computed == request.num_tokens < job.num_tokens:
                request.append_output_token_ids(digest(request.all_token_ids) % 2)
        has_told, next_s = self.cache.has_told, self.cache.next_work_s()
        change = self.cache.take_change()
        assert not has_told or (change, self.cache.next_work_s()) == (None, next_s)
        return Step(change, writes, reads)

    def end_those_that_are_done(self) -> None:
        for job in list(self.running):
            if job.request.num_computed_tokens == job.num_tokens:
                job.answer = list(job.request.all_token_ids)
                self.abort(job)

    # What a worker does

    def execute(self) -> None:
        """The oldest step; a block without memory is a fault of the device."""
        step = self.steps.popleft()
        if step.change is not None:
            self.memory.apply(step.change)
            self.cache.record(self.memory.report())
        elif self.memory.owes:
            self.memory.settle()
        for place, value in step.writes.items():
            for piece in self.bytes_of(*place):
                self.driver.write(piece.start, bytes([value]) * len(piece))
        used = set[int]()
        for place, value in step.reads.items():
            for piece in self.bytes_of(*place):
                used |= {at - at % PAGE for at in piece}
                found = self.driver.read(piece.start, len(piece))
                assert found == bytes([value]) * len(piece), f"token at {place} shows another's KV"
        self.driver.launch(*used)

    def bytes_of(self, block: int, offset: int) -> list[range]:
        start = self.memory.range.start
        pieces = []
        for piece in self.layout.pieces(block, 1):
            size = len(piece) // BLOCK_TOKENS
            first = start + piece.start + offset * size
            pieces.append(range(first, first + size))
        return pieces

    def run(self) -> None:
        """Schedule a step, execute all, and let the device finish."""
        self.schedule()
        while self.steps:
            self.execute()
        self.driver.finish_work()

    def run_all(self) -> None:
        """Until every request is answered; a bound, for a scheduler that stands still."""
        for _ in range(200):
            if not (self.waiting or self.running):
                self.check()
                return
            self.run()
        raise AssertionError("requests wait and nothing moves")

    def table(self, job: Job) -> list[int]:
        (table,) = self.manager.get_block_ids(job.request.request_id)
        return list(table)

    def sleep(self, *, after_a_step: bool) -> None:
        """As vLLM: no request and no cached block is left, no step under way.

        Without a step in between, the worker has not heard that what requests had is free.
        """
        for job in [*self.running, *self.waiting]:
            self.abort(job)
        if after_a_step:
            self.schedule()
        while self.steps:
            self.execute()
        assert self.manager.reset_prefix_cache()
        self.memory.sleep()
        assert self.driver.num_pages == 0

    def check(self) -> None:
        self.pool.check_integrity()
        self.memory.range.check_integrity()
        self.memory.pool.check_integrity()
        if not self.steps and not self.ledger.has_changes:
            owed = self.memory._owed
            behind = self.memory.range.aliases | dict.fromkeys(self.memory.range.committed)
            assert behind.keys() | owed.keys() == self.ledger.resident | self.ledger.aliases.keys()
            shown = {slab: source for slab, source in owed.items() if slab != source}
            assert self.memory.range.aliases | shown == self.ledger.aliases


def digest(tokens: Any) -> int:
    return hash(tuple(tokens)) % 251


class ContiguousMachine(RuleBasedStateMachine):
    """Every request reads what was written for its own tokens, whatever happens around it."""

    @initialize(
        slab_blocks=st.integers(1, 3),
        is_uneven=st.booleans(),
        caching=st.sampled_from([True, True, True, False]),
        max_aliases=st.sampled_from([None, 1, 3]),
    )
    def start(
        self, slab_blocks: int, is_uneven: bool, caching: bool, max_aliases: int | None
    ) -> None:
        self.engine = Engine(
            slab_blocks,
            layout=UNEVEN if is_uneven else LAYOUT,
            caching=caching,
            max_aliases=max_aliases,
        )
        self.is_asleep = False

    @rule(after_a_step=st.booleans())
    def sleep(self, after_a_step: bool) -> None:
        self.engine.sleep(after_a_step=after_a_step)
        self.is_asleep = True

    @rule()
    def wake(self) -> None:
        self.engine.memory.wake()
        self.is_asleep = False

    @precondition(lambda self: len(self.engine.waiting) < 5)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), more=st.integers(1, 5))
    def submit(self, tokens: list[int], more: int) -> None:
        self.engine.submit(tokens, more)

    @precondition(lambda self: len(self.engine.waiting) < 5)
    @rule(num_prompts=st.integers(2, 4), num_tokens=st.integers(3, 11))
    def submit_prefixes(self, num_prompts: int, num_tokens: int) -> None:
        """Several with the same beginning, at once."""
        for number in range(num_prompts):
            self.engine.submit([*([1] * num_tokens), number][:MAX_TOKENS])

    @precondition(lambda self: self.engine.running or self.engine.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        jobs = [*self.engine.running, *self.engine.waiting]
        self.engine.abort(data.draw(st.sampled_from(jobs)))

    @precondition(lambda self: self.engine.running)
    @rule()
    def preempt(self) -> None:
        self.engine.preempt(self.engine.running.pop())

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(1, self.engine.plan.num_blocks - 1))
        self.engine.pool.evict_blocks({block})

    @rule()
    def reset_prefix_cache(self) -> None:
        is_idle = self.engine.ledger.num_in_use == 1
        assert self.engine.manager.reset_prefix_cache() is is_idle

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        plan = self.engine.plan
        budget_slabs = data.draw(st.integers(plan.range_slabs + 1, plan.num_slabs))
        self.engine.cache.set_budget(budget_slabs * plan.slab_blocks * BLOCK_BYTES)

    @rule(seconds=st.sampled_from([1.0, 10.0, 2 * CACHE_IDLE_S]))
    def let_time_pass(self, seconds: float) -> None:
        self.engine.clock.advance(seconds)

    @precondition(
        lambda self: (
            len(self.engine.steps) < 3
            and not (self.is_asleep and (self.engine.running or self.engine.waiting))
        )
    )
    @rule()
    def schedule(self) -> None:
        self.engine.schedule()

    @precondition(lambda self: not self.is_asleep)
    @rule(num_steps=st.integers(1, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.run()

    @precondition(lambda self: not self.is_asleep)
    @rule(num_requests=st.integers(2, 5), num_same=st.integers(2, 11), data=st.data())
    def serve(self, num_requests: int, num_same: int, data: st.DataObject) -> None:
        """Some that come one after the other and begin in the same way."""
        if len(self.engine.waiting) < 5:
            for number in range(num_requests):
                self.engine.submit([*([0] * num_same), number][:MAX_TOKENS], 4)
                for _ in range(data.draw(st.integers(0, 3))):
                    self.engine.run()

    @precondition(lambda self: self.engine.steps)
    @rule(fault=st.sampled_from(["", "", "map", "create", "unmap"]), at=st.integers(1, 4))
    def execute(self, fault: str, at: int) -> None:
        driver = self.engine.driver
        if fault:
            # Pages that wait for their fence are a first refusal, and only one is made good.
            driver.finish_work()
        with driver.failing(fault, at):
            self.engine.execute()

    @rule(finish=st.booleans())
    def keep(self, finish: bool) -> None:
        if finish:
            self.engine.driver.finish_work()
        self.engine.memory.pool.maintain()

    @invariant()
    def the_books_are_right(self) -> None:
        self.engine.check()
        num_pages = self.engine.driver.num_pages
        assert num_pages <= self.engine.plan.num_slabs * self.engine.memory.range.pages_per_slab

    def teardown(self) -> None:
        """All are answered, and when time has passed memory is as at the start."""
        engine = self.engine
        engine.memory.wake()
        engine.run_all()
        engine.run()
        for _ in range(2):
            engine.clock.advance(2 * CACHE_IDLE_S)
            engine.run()
        engine.memory.range.expect(())
        engine.memory.pool.maintain()
        engine.check()
        assert engine.ledger.resident == {0}
        assert engine.driver.num_pages == engine.memory.range.pages_per_slab
        assert engine.driver.num_mapped == engine.memory.range.pages_per_slab
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


ContiguousMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=50, deadline=None
)
TestContiguous = ContiguousMachine.TestCase


def test_a_prefix_is_shown_and_takes_no_memory_again() -> None:
    engine = Engine(slab_blocks=2)
    first = engine.submit([1] * 8, 4)
    engine.run()
    engine.run()
    second = engine.submit([1] * 8 + [0], 3)
    engine.run()
    (first_table, second_table) = engine.table(first), engine.table(second)
    assert not set(first_table) & set(second_table)
    assert len(engine.ledger.aliases) == 2
    assert engine.num_found_tokens == 8
    # The null block's slab, three of the first request, one of the second.
    assert engine.ledger.num_resident == 5
    assert engine.driver.num_pages == 5 * engine.memory.range.pages_per_slab
    engine.abort(first)
    engine.run()
    assert set(engine.ledger.aliases.values()) <= engine.ledger.resident, "pinned by the second"
    engine.run_all()
    assert engine.ledger.aliases == {}


def test_requests_of_one_step_share_what_that_step_computes() -> None:
    """VLLM lets a request find blocks that another will have filled in the same step."""
    engine = Engine()
    engine.submit([1, 1], 2)
    engine.submit([1, 1, 0], 2)
    engine.schedule()
    assert engine.num_found_tokens == 2
    (step,) = engine.steps
    assert step.change is not None
    ((alias, source),) = step.change.aliased
    assert source in step.change.committed
    assert alias not in step.change.committed
    engine.execute()
    engine.run_all()


def test_what_lies_behind_the_last_whole_slab_is_computed_again() -> None:
    engine = Engine(slab_blocks=2)
    engine.submit([1] * 10, 1)
    engine.run_all()
    engine.submit([1] * 7 + [0], 1)
    engine.run_all()
    assert engine.num_found_tokens == 4, "of six that vLLM's cache has"


def test_a_slab_that_nobody_could_share_is_not_kept() -> None:
    engine = Engine(slab_blocks=2)
    engine.submit([1] * 6, 1)
    engine.run_all()
    engine.run()
    assert engine.ledger.num_cached_blocks == 2
    assert engine.ledger.num_resident == 2


def test_of_two_copies_of_a_block_that_of_the_whole_slab_is_found() -> None:
    engine = Engine(slab_blocks=2)
    for prompt, num_found in (
        ([1] * 8, 0),
        ([1] * 6 + [0] * 3, 4),  # its third block is the first one's, computed again
        ([1] * 6 + [0] * 2 + [1] * 2, 8),  # goes on from the second
    ):
        before = engine.num_found_tokens
        engine.submit(prompt)
        engine.run_all()
        assert engine.num_found_tokens - before == num_found


def removed(engine: Engine) -> int:
    from vllm.distributed.kv_events import BlockRemoved

    events = [e for e in engine.manager.take_events() if isinstance(e, BlockRemoved)]
    return sum(len(event.block_hashes) for event in events)


def test_events_tell_that_a_prefix_is_gone_when_its_last_copy_goes() -> None:
    engine = Engine(slab_blocks=3)
    engine.submit([1] * 10, 1)
    engine.run_all()
    assert removed(engine) == 2, "behind the last whole slab"
    engine.submit([1] * 5 + [0] * 6, 1)  # computes two blocks again that are there
    engine.run_all()
    assert removed(engine) == 0
    assert engine.ledger.num_cached_blocks == 3 + 6
    engine.clock.advance(2 * CACHE_IDLE_S)
    engine.run()
    assert removed(engine) == 7, "for two of them are there twice"


def test_a_range_is_taken_again_with_its_pages() -> None:
    """Without a cached block in it, it goes whole to the next request of its size."""
    engine = Engine(slab_blocks=2, caching=False)
    small, large = engine.submit([1] * 3), engine.submit([1] * 2, 10)
    engine.run()
    tables = engine.table(large)[0]
    engine.run_all()
    engine.run()
    assert small.answer
    before = engine.memory.report()
    again = engine.submit([0] * 11, 1)
    engine.run()
    assert engine.table(again)[0] == tables
    engine.run_all()
    after = engine.memory.report()
    assert after.num_maps == before.num_maps
    assert after.num_reused > before.num_reused


def test_the_next_slab_is_mapped_before_it_is_needed() -> None:
    engine = Engine(slab_blocks=1)
    engine.submit([1] * 2, 6)
    engine.run()
    (expected,) = engine.ledger.expected(1)
    engine.memory.pool.maintain()
    before = engine.memory.report()
    engine.run()
    after = engine.memory.report()
    assert engine.ledger.source_of(expected) == expected
    assert after.num_maps == before.num_maps
    assert after.num_reused - before.num_reused == engine.memory.range.pages_per_slab


def test_too_little_memory_is_waiting_and_preemption() -> None:
    engine = Engine(slab_blocks=2, budget_slabs=4)
    jobs = [engine.submit([number % 2] * 4, 8) for number in range(4)]
    engine.run_all()
    assert engine.num_preemptions
    assert all(job.answer for job in jobs)


def test_without_aliases_left_a_prefix_is_computed_again() -> None:
    engine = Engine(slab_blocks=1, max_aliases=1)
    first = engine.submit([1] * 8, 4)
    engine.run()
    engine.run()
    engine.submit([1] * 8 + [0], 1)
    engine.run()
    assert engine.num_found_tokens == 2
    engine.submit([1] * 8 + [0, 0], 1)
    engine.run()
    assert engine.num_found_tokens == 2
    engine.run_all()
    assert first.answer


def test_a_shrink_waits_for_requests() -> None:
    engine = Engine(slab_blocks=2)
    jobs = [engine.submit([number] * 5, 6) for number in range(3)]
    for _ in range(4):
        engine.run()
    most = engine.ledger.num_resident
    engine.cache.set_budget(4 * 2 * BLOCK_BYTES)
    assert engine.cache.section().num_draining_slabs == most - 4 > 0
    assert engine.pool.get_num_free_blocks() == 0
    engine.run_all()
    engine.run()
    assert all(job.answer for job in jobs)
    assert engine.ledger.num_resident <= 4
    assert engine.cache.section().num_draining_slabs == 0


def test_a_device_without_room_is_tried_again_and_then_told_of() -> None:
    engine = Engine(slab_blocks=1)
    engine.submit([1] * 4, 8)
    engine.driver.fail_create()
    engine.run()
    engine.driver.capacity_pages = engine.driver.num_pages
    engine.submit([0] * 4, 8)
    with pytest.raises(PagesExhaustedError):
        engine.run()
    engine.memory.range.check_integrity()


def test_blocks_for_nobody_are_refused() -> None:
    engine = Engine()
    with pytest.raises(InternalError, match="form=paged"):
        engine.pool.get_new_blocks(1)


def test_only_vllm_s_own_classes_are_adopted() -> None:
    from xllm_plugin.xtensor.contiguous import adopt_contiguous

    engine = Engine()
    with pytest.raises(ConfigError, match="form=paged"):
        adopt_contiguous(engine.manager, engine.ledger)
    other = Engine()
    (group,) = other.manager.coordinator.single_type_managers
    group.__class__ = type(group).__mro__[1]
    with pytest.raises(SeamError, match="block-pool-class"):
        adopt_contiguous(other.manager, other.ledger)


def test_models_with_several_groups_are_refused() -> None:
    from xllm_plugin.xtensor.contiguous import group_refusal

    (group,) = Engine().manager.coordinator.single_type_managers
    manager: Any = SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=[group] * 2))
    assert group_refusal(manager) == "this model's are FullAttentionSpec, FullAttentionSpec"


@pytest.mark.parametrize("after_a_step", [False, True])
def test_what_slept_is_there_again_for_those_that_come(after_a_step: bool) -> None:
    engine = Engine()
    for _ in range(2):
        for number in range(2):
            engine.submit([1] * 8 + [number], 2)
        for _ in range(2):
            engine.run()
        assert engine.memory.range.aliases
        engine.sleep(after_a_step=after_a_step)
        engine.check()
        engine.memory.wake()
        engine.check()
    assert engine.num_found_tokens
    engine.submit([1] * 4)
    engine.run_all()
