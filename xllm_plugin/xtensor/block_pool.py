"""`ElasticBlockPool`: vLLM's block pool over slabs whose memory comes and goes.

vLLM builds its `BlockPool` itself and hands it to every part of its KV cache manager, so ours is
put on afterwards as the class of that very object (`adopt_block_pool`, seam "block-pool-class").

What vLLM does with blocks stays vLLM's: prefix cache, LRU order, KV events, metrics.  Ours is which
block comes next: its free queue holds blocks with memory only, and before blocks are popped from it
those chosen are moved to its head.  The order is: free blocks of the fullest slab; a further slab,
within the budget; then cached blocks, least recently used first.

A count of free blocks is what could be handed out now, so too small a budget is vLLM's ordinary
"not now": a request waits, or another is preempted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockPool

from xllm_plugin.errors import SeamError
from xllm_plugin.xtensor.slabs import BlockKind, SlabLedger

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

__all__ = ["ElasticBlockPool", "adopt_block_pool", "kind_of", "require_plain"]


class ElasticBlockPool(BlockPool):
    """See the module.

    `__init__` of this class never runs: state belongs into `setup_elastic`.
    """

    ledger: SlabLedger
    _clock: Callable[[], float]

    def setup_elastic(self, ledger: SlabLedger, clock: Callable[[], float]) -> None:
        """Start with the blocks of slab 0 alone; called once, on a pool that nobody has used."""
        self.ledger = ledger
        self._clock = clock
        for block in self.blocks[ledger.slab_blocks :]:
            self.free_block_queue.remove(block)
        self._note([self.null_block])
        self._count_capacity()

    # What vLLM calls

    def get_num_free_blocks(self) -> int:
        """Blocks that can be handed out now: those with memory, and what the budget has left."""
        # vLLM's own constructor asks before there is a ledger; it has no class of ours then.
        ledger = self.ledger
        # Asked for each request of each step, so it calls nothing.
        num_free: int = self.free_block_queue.num_free_blocks
        return num_free + ledger.num_committable * ledger.slab_blocks

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Hand blocks out, those that keep slabs full first; see vLLM's."""
        if num_blocks <= self.get_num_free_blocks():
            self._bring_to_the_head(num_blocks)
        blocks: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        self._note(blocks)
        return blocks

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Let a request share cached blocks; see vLLM's."""
        super().touch(blocks)
        self._note(blocks)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Take blocks back; see vLLM's."""
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        self._note_given_back(blocks)

    def unpin_blocks(self, blocks: Iterable[KVCacheBlock], on_reuse: Callable[..., Any]) -> None:
        """Take blocks back that stay readable; see vLLM's."""
        blocks = list(blocks)
        super().unpin_blocks(blocks, on_reuse)
        self._note_given_back(blocks)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; see vLLM's."""
        self.rebalance()  # what drains and is of nobody would count as used
        was_reset: bool = super().reset_prefix_cache()
        if was_reset:
            ledger = self.ledger
            self._note(b for slab in ledger.resident for b in self._blocks_on(slab))
        return was_reset

    def _remove_cached_block_hashes(self, block: KVCacheBlock) -> Any:
        removed = super()._remove_cached_block_hashes(block)
        if removed:
            self._note([block])
        return removed

    # What the budget's owner calls

    def set_budget(self, budget_slabs: int) -> None:
        """Change how many slabs may have memory; what is beyond goes when requests end."""
        self.ledger.budget_slabs = budget_slabs
        self.rebalance()

    def rebalance(self) -> None:
        """Release slabs of free blocks, and bring what drains in line with the budget."""
        ledger = self.ledger
        for slab in ledger.beyond_budget():
            ledger.drain(slab)
            for block in self._blocks_on(slab):
                self._forget(block)
        for slab in ledger.releasable():
            self._release(slab)
        for slab in ledger.to_undrain():
            ledger.undrain(slab)
            free = [b for b in self._blocks_on(slab) if ledger.kind(b.block_id) == BlockKind.FREE]
            self.free_block_queue.prepend_n(free)
        self._count_capacity()

    def drop_cold(self, before_s: float) -> int:
        """Forget cached blocks on slabs that nobody has used since then, and release those slabs.

        Returns:
            How many slabs that were.
        """
        cold = self.ledger.idle_since(before_s)
        for slab in cold:
            for block in self._blocks_on(slab):
                self._maybe_evict_cached_block(block)
        if cold:
            self.rebalance()
        return len(cold)

    def check_integrity(self) -> None:
        """Check the ledger, and that it agrees with what vLLM's pool says.

        Raises:
            InternalError: they differ; the message says where.
        """
        ledger = self.ledger
        ledger.check_integrity()
        queued = [block.block_id for block in self.free_block_queue.get_all_free_blocks()]
        expected = []
        for slab in range(ledger.num_slabs):
            for block in self._blocks_on(slab):
                assert ledger.kind(block.block_id) == kind_of(block), f"{block} is noted wrong"
                has_memory = slab in ledger.resident and not ledger.is_draining(slab)
                if has_memory and kind_of(block) != BlockKind.USED:
                    expected.append(block.block_id)
        assert sorted(queued) == expected, "the free queue is not that of blocks with memory"
        assert super().get_num_free_blocks() == len(expected), "the free queue is counted wrong"

    # Inside

    def _blocks_on(self, slab: int) -> list[KVCacheBlock]:
        return [self.blocks[block] for block in self.ledger.blocks_of(slab)]

    def _note(self, blocks: Iterable[KVCacheBlock]) -> None:
        now_s = self._clock()
        for block in blocks:
            self.ledger.note(block.block_id, kind_of(block), now_s)

    def _note_given_back(self, blocks: Iterable[KVCacheBlock]) -> None:
        own = {block.block_id: block for block in blocks if block.pool in {None, self}}
        given_back = [b for b in own.values() if kind_of(b) != BlockKind.USED]
        self._note(given_back)
        for block in given_back:
            if self.ledger.is_draining(self.ledger.slab_of(block.block_id)):
                self._forget(block)

    def _forget(self, block: KVCacheBlock) -> None:
        """Of a draining slab: find it by no prefix, and hand it out to nobody."""
        self._maybe_evict_cached_block(block)
        if kind_of(block) == BlockKind.FREE:
            self.free_block_queue.remove(block)

    def _release(self, slab: int) -> None:
        if not self.ledger.is_draining(slab):
            for block in self._blocks_on(slab):
                self.free_block_queue.remove(block)
        self.ledger.release(slab)

    def _bring_to_the_head(self, num_blocks: int) -> None:
        ledger = self.ledger
        chosen = ledger.choose_free(num_blocks)
        while len(chosen) < num_blocks and (slab := ledger.commit()) is not None:
            self.free_block_queue.append_n(self._blocks_on(slab))
            chosen += ledger.blocks_of(slab)
        first = [self.blocks[block] for block in chosen[:num_blocks]]
        for block in first:
            self.free_block_queue.remove(block)
        self.free_block_queue.prepend_n(first)

    def _count_capacity(self) -> None:
        """Let vLLM's usage (and its test for "all blocks are free") count by the budget."""
        ledger = self.ledger
        num_slabs = min(ledger.num_slabs, max(ledger.budget_slabs, ledger.num_resident))
        self.num_gpu_blocks = num_slabs * ledger.slab_blocks


def kind_of(block: KVCacheBlock) -> BlockKind:
    """What a block is, by what vLLM says of it."""
    if block.ref_cnt > 0 or block.is_null:
        return BlockKind.USED
    return BlockKind.FREE if block.block_hash is None else BlockKind.CACHED


def require_plain(pool: Any) -> None:
    """See that a block pool is one that our classes extend.

    Raises:
        SeamError: it is not vLLM's plain `BlockPool`.
    """
    if type(pool) is not BlockPool:
        raise SeamError(
            f"seam 'block-pool-class': vLLM built a {type(pool).__module__}."
            f"{type(pool).__qualname__}, which elastic memory does not extend. Set "
            "xtensor.enabled to false, or install a supported vLLM."
        )


def adopt_block_pool(
    pool: Any, ledger: SlabLedger, clock: Callable[[], float] = time.monotonic
) -> ElasticBlockPool:
    """Make vLLM's unused block pool an elastic one (seam "block-pool-class").

    Raises:
        SeamError: see `require_plain`.
    """
    require_plain(pool)
    pool.__class__ = ElasticBlockPool
    pool.setup_elastic(ledger, clock)
    assert isinstance(pool, ElasticBlockPool)
    return pool
