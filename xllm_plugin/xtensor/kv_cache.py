"""`ElasticKvCache`: the scheduler's side: owns the budget and decides what the workers do."""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from xllm_plugin.errors import ConfigError, MisuseError
from xllm_plugin.xtensor.block_pool import ElasticBlockPool, adopt_block_pool
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.contiguous import ContiguousBlockPool, adopt_contiguous
from xllm_plugin.xtensor.layout import KVLayout, slab_blocks_of
from xllm_plugin.xtensor.messages import MemoryChange, MemoryReport, MemorySection
from xllm_plugin.xtensor.request_ranges import RangeLedger, RangePlan, plan_ranges
from xllm_plugin.xtensor.share import RETURN_LOOK_S, BudgetShare, Demand, PoolDemand, join_pool
from xllm_plugin.xtensor.slabs import SlabLedger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["ElasticKvCache", "full_request_blocks"]


class _Size(NamedTuple):
    """Slabs of a cache: blocks of each, how many there are, and what one request takes at most."""

    slab_blocks: int
    num_slabs: int
    full_request_slabs: int
    plan: RangePlan | None  # where requests have ranges


class ElasticKvCache:
    """Decides at each step which slabs have memory.

    All calls come on the engine's thread.

    Args:
        pool: of vLLM's KV cache manager, adopted.
        layout: of the first rank's KV buffer.
        config: the settings.
        min_budget_slabs: that one request of full length takes, the null block included.
        share: of the pool that engines of this machine share, if this one does.
        clock: seconds, monotonic; the pool's.
    """

    def __init__(
        self,
        pool: ElasticBlockPool | ContiguousBlockPool,
        layout: KVLayout,
        config: XTensorConfig,
        *,
        min_budget_slabs: int,
        share: BudgetShare | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._ledger: SlabLedger | RangeLedger = pool.ledger
        self._layout = layout
        self._config = config
        self._min_budget_slabs = min_budget_slabs
        self._share = share
        self._clock = clock
        self._told_budget_slabs = self._num_changes = 0
        # Of the ledger: after the last plan, and when the workers were told last.
        self._planned_version = self._told_version = -1
        self._cold_s = self._report_due_s = math.inf
        self._report: MemoryReport | None = None
        self._num_dropped_slabs = 0

    @classmethod
    def adopt(
        cls,
        manager: KVCacheManager,
        kv_cache_config: KVCacheConfig,
        vllm_config: VllmConfig,
        config: XTensorConfig,
        *,
        page_bytes: int = mmap.PAGESIZE,
    ) -> ElasticKvCache:
        """Make vLLM's KV cache manager, which nobody has used yet, an elastic one.

        Args:
            manager: vLLM's.
            kv_cache_config: of the first rank.
            vllm_config: of the engine.
            config: the settings.
            page_bytes: the workers' smallest page.

        Raises:
            ConfigError: the budget cannot hold one request of full length, or the cache's layout
                cannot be taken apart, or `form` does not go with the model; says what would do.
        """
        layout = KVLayout.of_tensors(kv_cache_config.num_blocks, kv_cache_config.kv_cache_tensors)
        full_blocks = full_request_blocks(kv_cache_config, vllm_config)
        slab_blocks, num_slabs, needed, plan = _size_of(config, layout, full_blocks, page_bytes)
        slab_bytes = slab_blocks * layout.block_bytes
        max_len = vllm_config.model_config.max_model_len
        budget_slabs = num_slabs
        if config.budget_bytes is not None:
            budget_slabs = min(num_slabs, config.budget_bytes // slab_bytes)
        if budget_slabs < needed:
            seen = f"xtensor.budget_bytes={config.budget_bytes}"
            if needed > num_slabs:
                seen = f"--kv-cache-memory-bytes {layout.num_bytes}"
            while needed > num_slabs:  # of more memory, slabs may be larger
                more = replace(layout, num_blocks=needed * slab_blocks)
                slab_blocks, num_slabs, needed, _ = _size_of(config, more, full_blocks, page_bytes)
            needed_bytes = needed * slab_blocks * layout.block_bytes
            raise ConfigError(_too_small(seen, needed_bytes, max_len))
        share = None
        if config.pool is not None:
            share = join_pool(
                config,
                PoolDemand(
                    name=str(vllm_config.model_config.served_model_name),
                    slab_bytes=slab_bytes,
                    slab_blocks=slab_blocks,
                    full_request_slabs=needed,
                    max_slabs=budget_slabs,
                    max_requests=vllm_config.scheduler_config.max_num_seqs,
                ),
            )
            budget_slabs = share.num_leased_slabs
        pool: ElasticBlockPool | ContiguousBlockPool
        if plan is not None:
            pool = adopt_contiguous(manager, RangeLedger(plan, budget_slabs))
        else:
            ledger = SlabLedger(layout.num_blocks, slab_blocks, budget_slabs)
            pool = adopt_block_pool(manager.block_pool, ledger)
        return cls(pool, layout, config, min_budget_slabs=needed, share=share)

    # At each step

    def plan(self, *, num_requests: int = 1) -> None:
        """Decide what is given back; called before a step is scheduled.

        Not after: the step may still copy from blocks that are freed while it is scheduled.

        Args:
            num_requests: that are not finished.
        """
        ledger = self._ledger
        if self._share is not None:
            demand = Demand(ledger.num_in_use, ledger.num_resident, num_requests)
            ledger.budget_slabs = self._share.plan(demand)
        now_s = self._clock()
        if ledger.version == self._planned_version and now_s < self._cold_s:
            return
        self._num_dropped_slabs += self._pool.drop_cold(now_s - self._config.cache_idle_s)
        self._pool.rebalance()
        self._planned_version, self._cold_s = ledger.version, self._next_cold_s()

    @property
    def has_told(self) -> bool:
        """Whether `take_change` has nothing to say, and `next_work_s` is what it was then."""
        return (
            self._ledger.version == self._told_version
            and self._clock() < self._report_due_s
            and self._share is None
        )

    def take_change(self) -> MemoryChange | None:
        """What the step that was just scheduled has to tell the workers, or None."""
        now_s = self._clock()
        ledger = self._ledger
        self._told_version = ledger.version
        is_report_due = now_s >= self._report_due_s
        is_told = not ledger.has_changes and ledger.budget_slabs == self._told_budget_slabs
        if is_told and not is_report_due:
            return None
        # What the workers still keep ready goes later, by itself; then we want to hear of it.
        self._report_due_s = math.inf if is_told else now_s + self._config.keep_idle_s + 1.0
        self._told_budget_slabs = ledger.budget_slabs
        self._num_changes += 1
        if self._share is not None:
            self._share.tell(self._num_changes)
            if self._share.is_returning:
                self._report_due_s = now_s + RETURN_LOOK_S
        changes = ledger.take_changes()
        return MemoryChange(
            budget_slabs=ledger.budget_slabs,
            released=changes.released,
            committed=changes.committed,
            aliased=changes.aliased,
            expected=ledger.expected(self._config.premap_slabs),
            number=self._num_changes,
        )

    def has_work(self) -> bool:
        """Whether a step is wanted for the memory's sake, though no request asks for one."""
        return (
            self._ledger.has_changes
            or bool(self._ledger.releasable())
            or self._ledger.budget_slabs != self._told_budget_slabs
            or self._clock() >= self.next_work_s()
        )

    def next_work_s(self) -> float:
        """When, by the clock, something is to be done that no request brings about."""
        look_s = math.inf if self._share is None else self._share.next_look_s()
        return min(self._next_cold_s(), self._report_due_s, look_s)

    def _next_cold_s(self) -> float:
        oldest_s = self._ledger.oldest_idle_s()
        return math.inf if oldest_s is None else oldest_s + self._config.cache_idle_s

    def record(self, report: MemoryReport) -> None:
        """Take a worker's report in."""
        self._report = report
        if self._share is not None:
            self._share.record(report)

    # What is asked from outside

    def section(self) -> MemorySection:
        """The snapshot's section `MEMORY_SECTION`."""
        ledger = self._ledger
        return MemorySection(
            block_bytes=self._layout.block_bytes,
            slab_blocks=ledger.slab_blocks,
            num_slabs=ledger.num_slabs,
            budget_slabs=ledger.budget_slabs,
            min_budget_slabs=self._min_budget_slabs,
            num_resident_slabs=ledger.num_resident,
            num_draining_slabs=ledger.num_draining,
            num_used_blocks=ledger.num_used_blocks,
            num_cached_blocks=ledger.num_cached_blocks,
            num_dropped_slabs=self._num_dropped_slabs,
            num_aliased_slabs=ledger.num_aliases,
            pages=self._report,
            pool=None if self._share is None else self._share.section(),
        )

    def set_budget(self, budget_bytes: int) -> MemorySection:
        """Change how much memory the KV cache may take; what is beyond goes as requests end.

        Raises:
            MisuseError: it is no budget that the cache, or its pool, can have; nothing is changed.
        """
        slab_bytes = self._ledger.slab_blocks * self._layout.block_bytes
        if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
            raise MisuseError(f"budget_bytes={budget_bytes!r}: give a whole number of bytes.")
        least, most = self._min_budget_slabs, self._ledger.num_slabs
        of_least = "one request of full length"
        of_most = "what the engine was started with, --kv-cache-memory-bytes"
        if self._share is not None:
            if self._share.min_slabs > least:
                least, of_least = self._share.min_slabs, "its minimum, xtensor.min_bytes"
            if self._share.total_slabs < most:
                most, of_most = self._share.total_slabs, "all of the pool, xtensor.pool_bytes"
        if not least * slab_bytes <= budget_bytes <= most * slab_bytes:
            raise MisuseError(
                f"budget_bytes={budget_bytes}: give {least * slab_bytes} ({of_least}) to "
                f"{most * slab_bytes} ({of_most})."
            )
        if self._share is None:
            self._pool.set_budget(budget_bytes // slab_bytes)
        else:
            self._share.set_most(budget_bytes // slab_bytes)
        return self.section()

    def close(self) -> None:
        """Leave the pool; no step runs any more."""
        if self._share is not None:
            self._share.close()


def full_request_blocks(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> int:
    """Blocks that one request of full length holds, in all cache groups together.

    As vLLM counts its concurrency (vllm/v1/core/kv_cache_utils.py,
    `get_max_concurrency_for_kv_cache_config`).
    """
    specs: list[Any] = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return sum(
        -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in specs
    )


def _size_of(config: XTensorConfig, layout: KVLayout, full_blocks: int, page_bytes: int) -> _Size:
    if config.form == "contiguous":
        plan = plan_ranges(config, layout, full_blocks, page_bytes)
        return _Size(plan.slab_blocks, plan.num_slabs, plan.range_slabs + 1, plan)
    slab_blocks = slab_blocks_of(config, layout, page_bytes)
    full_slabs = -(-(full_blocks + 1) // slab_blocks)  # the null block
    return _Size(slab_blocks, layout.num_blocks // slab_blocks, full_slabs, None)


def _too_small(seen: str, needed_bytes: int, max_model_len: int) -> str:
    return (
        f"{seen}: elastic memory needs {needed_bytes} bytes for one request of {max_model_len} "
        f"tokens. Give {needed_bytes} or more, or a smaller --max-model-len."
    )
