"""`ElasticMemory`: the worker's side: does what a step's `MemoryChange` says, and measures it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from xllm_plugin.accelerator.memory import MemoryDriver
from xllm_plugin.errors import NotNowError, PagesExhaustedError
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.keeper import PoolKeeper
from xllm_plugin.xtensor.layout import KVLayout
from xllm_plugin.xtensor.messages import MemoryChange, MemoryReport
from xllm_plugin.xtensor.page import PageState
from xllm_plugin.xtensor.page_pool import PagePool, PoolPolicy
from xllm_plugin.xtensor.range import ElasticRange
from xllm_plugin.xtensor.slabs import NULL_SLAB

__all__ = ["ElasticMemory"]


class ElasticMemory:
    """Owns the pages of a worker's KV cache, the thread that keeps them, and its range.

    Args:
        driver: of the device; nobody else uses it.
        layout: of the KV buffer.
        slab_blocks: blocks of a slab, by `slab_blocks_of`.
        config: the settings.
        num_slabs: that may have memory at once; all by default.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the layout does not fit the driver's pages.
        MemoryError: the address space has no room.
    """

    def __init__(
        self,
        driver: MemoryDriver,
        layout: KVLayout,
        slab_blocks: int,
        config: XTensorConfig,
        *,
        num_slabs: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        slab_pages = slab_blocks * layout.block_bytes // driver.granularity_bytes
        if num_slabs is None:
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
        self._budget_slabs, self._num_changes = num_slabs, 0
        self._is_asleep = False
        self._owed: dict[int, int] = {}  # slab -> the one whose pages it will show; or itself
        self._clock = clock
        self._commit_s = self._release_s = 0.0
        self._num_commits = self._num_releases = 0
        self._keeper = ExitStack()

    def start(self) -> None:
        """Start the keeper's thread."""
        self._keeper.enter_context(PoolKeeper(self.pool))

    def close(self) -> None:
        """End the keeper's thread and give all memory back; nothing may use the range from then on.

        Raises:
            NotNowError: the kernel takes no memory back; see `sleep`.
        """
        self._keeper.close()
        self.sleep()

    # Asleep the memory is with the system.  The scheduler does not know: what it has told to commit
    # is owed from then on, until the first step after waking.

    def sleep(self) -> None:
        """Give all memory back to the system; every block's contents are lost.

        No step that uses a block may run until `wake`; a second call does nothing.

        Raises:
            NotNowError: the kernel has no room to take mappings apart, or takes no memory back; it
                is awake, unless `wake` failed as well.
        """
        self._is_asleep = True
        behind = self.range.aliases | {slab: slab for slab in self.range.committed}
        self.range.decommit(behind)
        self._owed |= behind
        self.pool.expect(())
        self.pool.set_budget(0)
        self.pool.driver.fence().wait()
        try:
            self.pool.maintain()
        except NotNowError:
            self.wake()
            raise

    def wake(self) -> None:
        """Let slabs have memory again: the null block's now, the others with the next step.

        Raises:
            PagesExhaustedError: see `apply`; the memory is still asleep.
        """
        if not self._is_asleep:
            return
        self._set_budget()
        if NULL_SLAB in self._owed:
            self._commit({NULL_SLAB: NULL_SLAB})
            del self._owed[NULL_SLAB]
        self._is_asleep = False

    @property
    def owes(self) -> bool:
        """Whether `settle` is to be called before a step that brings no change."""
        return bool(self._owed) and not self._is_asleep

    def settle(self) -> None:
        """Give what is owed since it woke; see `apply`."""
        self.apply(MemoryChange(self._budget_slabs, number=self._num_changes))

    def apply(self, change: MemoryChange) -> None:
        """Carry a change out; called between two steps, in their order.

        Raises:
            PagesExhaustedError: the device has not the memory that the budget promises; what was to
                be released is released, and what is not there is still owed.
        """
        self._budget_slabs, self._num_changes = change.budget_slabs, change.number
        released = [slab for slab in change.released if self.range.has(slab)]
        for slab in change.released:
            self._owed.pop(slab, None)
        self._owed |= {slab: slab for slab in change.committed} | dict(change.aliased)
        if released:
            started_s = self._clock()
            self.range.decommit(released)
            self._num_releases += 1
            self._release_s += self._clock() - started_s
        if self._is_asleep:
            return
        self._set_budget()
        if self._owed:
            started_s = self._clock()
            self._commit(self._owed)
            self._owed.clear()
            self._num_commits += 1
            self._commit_s += self._clock() - started_s
        self.range.expect(change.expected)

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
            num_premap_failures=pool.num_premap_failures,
            num_map_calls=pool.num_map_calls,
            num_unmap_calls=pool.num_unmap_calls,
            map_s=pool.map_s,
            unmap_s=pool.unmap_s,
            commit_s=self._commit_s,
            release_s=self._release_s,
            num_commits=self._num_commits,
            num_releases=self._num_releases,
            change=self._num_changes,
        )

    def _set_budget(self) -> None:
        # Slabs beyond the budget are still in use, and one of them may be new to this worker.
        num_owed = sum(
            slab == source and not self.range.has(slab) for slab, source in self._owed.items()
        )
        num_slabs = max(self._budget_slabs, len(self.range.committed) + num_owed)
        self.pool.set_budget(num_slabs * self.range.pages_per_slab)

    def _commit(self, owed: Mapping[int, int]) -> None:
        try:
            self._put_behind(owed)
        except PagesExhaustedError:
            # Work that was launched may still use pages that were given back; and pages kept ready
            # elsewhere may be in the way, or their mappings.
            self.pool.driver.fence().wait()
            self.pool.expect(())
            self.pool.evict(self.pool.statistics().num_by_state[PageState.REUSABLE.value])
            self.pool.maintain()
            self._put_behind(owed)

    def _put_behind(self, owed: Mapping[int, int]) -> None:
        new = {slab: source for slab, source in owed.items() if not self.range.has(slab)}
        if own := [slab for slab, source in new.items() if slab == source]:
            self.range.commit(own)
        if shown := {slab: source for slab, source in new.items() if slab != source}:
            self.range.alias(shown)
