"""`ElasticMemory`: the worker's side: does what a step's `MemoryChange` says, and measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from xllm_plugin.accelerator.memory import MemoryDriver
from xllm_plugin.errors import PagesExhaustedError
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.keeper import PoolKeeper
from xllm_plugin.xtensor.layout import KVLayout, slab_blocks_of
from xllm_plugin.xtensor.messages import MemoryChange, MemoryReport
from xllm_plugin.xtensor.page import PageState
from xllm_plugin.xtensor.page_pool import PagePool, PoolPolicy
from xllm_plugin.xtensor.range import ElasticRange

__all__ = ["ElasticMemory"]


class ElasticMemory:
    """Owns the pages of a worker's KV cache, the thread that keeps them, and its range.

    Args:
        driver: of the device; nobody else uses it.
        layout: of the KV buffer.
        config: the settings.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the layout does not fit the driver's pages.
        MemoryError: the address space has no room.
    """

    def __init__(
        self,
        driver: MemoryDriver,
        layout: KVLayout,
        config: XTensorConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        slab_blocks = slab_blocks_of(config, layout)
        slab_pages = slab_blocks * layout.block_bytes // driver.granularity_bytes
        num_slabs = layout.num_blocks // slab_blocks
        policy = PoolPolicy(
            premap_pages=config.premap_slabs * slab_pages,
            keep_mapped_pages=num_slabs * slab_pages,
            idle_s=config.keep_idle_s,
        )
        self.pool = PagePool(
            driver, budget_pages=num_slabs * slab_pages, policy=policy, clock=clock
        )
        self.range = ElasticRange(self.pool, layout, slab_blocks, owner="kv")
        self._clock = clock
        self._commit_s = self._release_s = 0.0
        self._num_commits = self._num_releases = 0
        self._keeper = ExitStack()

    def start(self) -> None:
        """Start the keeper's thread."""
        self._keeper.enter_context(PoolKeeper(self.pool))

    def close(self) -> None:
        """End the keeper's thread."""
        self._keeper.close()

    def apply(self, change: MemoryChange) -> None:
        """Carry a change out; called between two steps, in their order.

        Raises:
            PagesExhaustedError: the device has not the memory that the budget promises; what was to
                be released is released, and nothing is committed.
        """
        started_s = self._clock()
        if change.released:
            self.range.decommit(change.released)
            self._num_releases += 1
        # Slabs beyond the budget are still in use, and one of them may be new to this worker.
        num_slabs = len(self.range.committed) + len(change.committed)
        self.pool.set_budget(max(change.budget_slabs, num_slabs) * self.range.pages_per_slab)
        released_s = self._clock()
        if change.committed:
            self._commit(change.committed)
            self._num_commits += 1
        self.range.expect(change.expected)
        self._release_s += released_s - started_s
        self._commit_s += self._clock() - released_s

    def report(self) -> MemoryReport:
        """The pages as they are now."""
        pool = self.pool.statistics()
        num = pool.num_by_state
        return MemoryReport(
            page_bytes=self.pool.driver.granularity_bytes,
            num_free=num[PageState.FREE.value],
            num_allocated=num[PageState.ALLOCATED.value],
            num_mapped=num[PageState.MAPPED.value],
            num_retired=num[PageState.RETIRED.value],
            num_reusable=num[PageState.REUSABLE.value],
            num_created=pool.num_created,
            num_released=pool.num_released,
            num_maps=pool.num_mapped,
            num_unmaps=pool.num_unmapped,
            num_reused=pool.num_reused,
            num_premapped=pool.num_premapped,
            commit_s=self._commit_s,
            release_s=self._release_s,
            num_commits=self._num_commits,
            num_releases=self._num_releases,
        )

    def _commit(self, slabs: tuple[int, ...]) -> None:
        try:
            self.range.commit(slabs)
        except PagesExhaustedError:
            # Work that was launched may still use pages that were given back; and pages kept ready
            # elsewhere may be in the way, or their mappings.
            self.pool.driver.fence().wait()
            self.pool.expect(())
            self.pool.evict(self.pool.statistics().num_by_state[PageState.REUSABLE.value])
            self.pool.maintain()
            self.range.commit(slabs)
