"""vLLM's block pool and cache manager where each request's KV blocks lie in a row.

vLLM's pool hands blocks out by count, whoever asks.  Here the request matters, so two of vLLM's
objects are given classes of ours after they are made: the pool (`ContiguousBlockPool`, seam
"block-pool-class") and the manager of the one cache group (`ContiguousManager`, seam
"kv-manager-class").  A request gets a range (`request_ranges`), and its blocks are that range's,
from the first on.

What a request finds in the prefix cache, it shows: whole slabs of found blocks are *pinned*, held
by the request as vLLM has it hold them, and blocks of its own range that show the same pages stand
in its table.  These have no hash, are of nobody else and go with the request; the pinned ones
return to the cache.  Found blocks behind the last whole slab are computed again.

A *free block* is here one that a request could have: a slab within the budget that no request uses,
times its blocks.  The blocks that a request's last slab has left are its own.  vLLM asks how many a
request needs (`get_num_blocks_to_allocate`) and compares, so what it is told is in whole slabs too.

The prefix cache, its events and metrics stay vLLM's; its free queue has cached blocks alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from xllm_plugin.errors import ConfigError, InternalError
from xllm_plugin.xtensor.block_pool import kind_of, require_plain
from xllm_plugin.xtensor.request_ranges import RangeLedger
from xllm_plugin.xtensor.slabs import BlockKind

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

__all__ = ["ContiguousBlockPool", "ContiguousManager", "adopt_contiguous", "group_refusal"]


class ContiguousBlockPool(BlockPool):
    """See the module.

    `__init__` of this class never runs: state belongs into `setup_ranges`.
    """

    ledger: RangeLedger
    _clock: Callable[[], float]

    def setup_ranges(self, ledger: RangeLedger, clock: Callable[[], float]) -> None:
        """Start with the null block alone; called once, on a pool that nobody has used."""
        self.ledger = ledger
        self._clock = clock
        self.free_block_queue.popleft_n(self.free_block_queue.num_free_blocks)
        num_blocks = ledger.plan.num_blocks
        del self.blocks[num_blocks:]
        self.blocks += [KVCacheBlock(at, pool=self) for at in range(len(self.blocks), num_blocks)]
        self._note([self.null_block])
        self._count_capacity()

    # What vLLM calls

    def get_num_free_blocks(self) -> int:
        """Blocks that requests could be given now, in whole slabs."""
        return self.ledger.num_available * self.ledger.slab_blocks

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Refused: only `take` hands blocks out, for it is told whose they are.

        Raises:
            InternalError: always.
        """
        raise InternalError(
            f"vLLM asks for {num_blocks} KV blocks of no request, which xtensor.form=contiguous "
            "cannot give. Use xtensor.form=paged, and report this with vLLM's options."
        )

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Let a request hold cached blocks; see vLLM's."""
        super().touch(blocks)
        self._note(blocks)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Take blocks back; see vLLM's.  Cached ones stay where a request can share them."""
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        given_back = [b for b in blocks if not b.ref_cnt and not b.is_null]
        for block in given_back:
            if block.block_hash is None:
                self.free_block_queue.remove(block)
        ledger = self.ledger
        slabs = dict.fromkeys(ledger.slab_of(block.block_id) for block in given_back)
        aliases = {slab for slab in slabs if ledger.source_of(slab) != slab}
        # What shows another's pages goes before that other may be given up.
        self._note(b for b in given_back if ledger.slab_of(b.block_id) in aliases)
        self._note(b for b in given_back if ledger.slab_of(b.block_id) not in aliases)
        for slab in slabs:
            if ledger.is_incomplete(slab):
                self._forget(slab)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; see vLLM's."""
        was_reset: bool = super().reset_prefix_cache()
        if was_reset:
            blocks = self.free_block_queue.get_all_free_blocks()
            for block in blocks:
                self.free_block_queue.remove(block)
            self._note(blocks)
        return was_reset

    def _remove_cached_block_hashes(self, block: KVCacheBlock) -> Any:
        was_cached = block.block_hash is not None
        removed = super()._remove_cached_block_hashes(block)
        if was_cached and not block.ref_cnt:
            self.free_block_queue.remove(block)
            self._note([block])
        return removed

    def _emit_block_removed_events(self, block_hashes: Any) -> None:
        # A prefix is often there twice: what lies behind the last whole slab is computed again.
        cache = self.cached_block_hash_to_block
        gone = [each for each in block_hashes if cache.get_one_block(each) is None]
        super()._emit_block_removed_events(gone)

    # What the cache group's manager calls

    def shareable(self, found: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """The blocks to hold instead of those found: whole slabs, while aliases are left.

        Args:
            found: cached blocks of a prefix, from its first block on.
        """
        ledger, shared = self.ledger, list[KVCacheBlock]()
        num_slabs = min(len(found) // ledger.slab_blocks, ledger.alias_room)
        for at in range(num_slabs):
            blocks = found[at * ledger.slab_blocks : (at + 1) * ledger.slab_blocks]
            slab = self._slab_with([block.block_hash for block in blocks])
            if slab is None:
                break
            shared += self._blocks_on(slab)
        return shared

    def begin(self, num_blocks: int) -> int:
        """Give a request a range, in which it will probably take so many blocks.

        Returns:
            The first block of it.
        """
        ledger = self.ledger
        for slab in ledger.releasable():
            ledger.release(slab)
        num_slabs = -(-num_blocks // ledger.slab_blocks)
        first = ledger.begin(num_slabs)
        if first is None:  # then each range has one slab with pages, and one of these is idle
            self._evict_one()
            first = ledger.begin(num_slabs)
        if first is None:
            raise InternalError("there is memory for a request and no range; please report this")
        return first * ledger.slab_blocks

    def end(self, first_block: int) -> None:
        """Take a range from its request; the blocks are given back apart."""
        self.ledger.end(self.ledger.slab_of(first_block))

    def show(self, first_block: int, pinned: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """Let a range begin with the pages of whole slabs that the request holds.

        Returns:
            The blocks of the range that show them.
        """
        ledger = self.ledger
        first_slab = ledger.slab_of(first_block)
        sources = dict.fromkeys(ledger.slab_of(block.block_id) for block in pinned)
        for slab, source in enumerate(sources, first_slab):
            ledger.alias(slab, source)
        return self._hand_out(first_block, len(pinned))

    def take(self, first_block: int, num_blocks: int) -> list[KVCacheBlock]:
        """Hand out the next blocks of a request's range; see vLLM's `get_new_blocks`."""
        ledger = self.ledger
        last_slab = ledger.slab_of(first_block + num_blocks - 1)
        for slab in range(ledger.slab_of(first_block), last_slab + 1):
            if ledger.source_of(slab) is None:
                while ledger.num_resident >= ledger.budget_slabs:
                    self._evict_one()
                ledger.commit(slab)
        return self._hand_out(first_block, num_blocks)

    # What the budget's owner calls

    def set_budget(self, budget_slabs: int) -> None:
        """Change how many slabs may have memory; what is beyond goes when requests end."""
        self.ledger.budget_slabs = budget_slabs
        self.rebalance()

    def rebalance(self) -> None:
        """Release slabs of free blocks, and the longest unused of those beyond the budget."""
        ledger = self.ledger
        for slab in ledger.releasable():
            ledger.release(slab)
        while ledger.num_draining and ledger.longest_idle() is not None:
            self._evict_one()
        self._count_capacity()

    def drop_cold(self, before_s: float) -> int:
        """Forget cached blocks on slabs that nobody has used since then.

        Returns:
            How many slabs that were.
        """
        cold = self.ledger.idle_since(before_s)
        for slab in cold:
            self._forget(slab)
        return len(cold)

    def check_integrity(self) -> None:
        """Check the ledger, and that it agrees with what vLLM's pool says.

        Raises:
            InternalError: they differ; the message says where.
        """
        ledger = self.ledger
        ledger.check_integrity()
        behind = ledger.resident | ledger.aliases.keys()
        cached = []
        for block in self.blocks:
            kind = kind_of(block)
            assert ledger.kind(block.block_id) == kind, f"{block} is noted wrong"
            assert kind == BlockKind.FREE or ledger.slab_of(block.block_id) in behind
            if kind == BlockKind.CACHED:
                cached.append(block.block_id)
        queued = [block.block_id for block in self.free_block_queue.get_all_free_blocks()]
        assert sorted(queued) == cached, "the free queue is not that of cached blocks"

    # Inside

    def _blocks_on(self, slab: int) -> list[KVCacheBlock]:
        blocks = self.ledger.blocks_of(slab)
        return self.blocks[blocks.start : blocks.stop]

    def _slab_with(self, hashes: Sequence[Any]) -> int | None:
        """A slab whose blocks have these hashes, or None.

        Several may have the last one: a prompt's tail that was computed again lies in two ranges.
        """
        # vLLM's own reader gives one block a hash.
        held = self.cached_block_hash_to_block._cache.get(hashes[-1])  # noqa: SLF001
        if held is None:
            return None
        for block in held.values() if isinstance(held, dict) else (held,):
            slab = self.ledger.slab_of(block.block_id)
            if [other.block_hash for other in self._blocks_on(slab)] == hashes:
                return slab
        return None

    def _hand_out(self, first_block: int, num_blocks: int) -> list[KVCacheBlock]:
        blocks = self.blocks[first_block : first_block + num_blocks]
        for block in blocks:
            assert block.ref_cnt == 0
            block.ref_cnt = 1
            if self.metrics_collector:
                self.metrics_collector.on_block_allocated(block)
        self._note(blocks)
        return blocks

    def _note(self, blocks: Iterable[KVCacheBlock]) -> None:
        now_s = self._clock()
        for block in blocks:
            self.ledger.note(block.block_id, kind_of(block), now_s)

    def _forget(self, slab: int) -> None:
        for block in self._blocks_on(slab):
            self._maybe_evict_cached_block(block)

    def _evict_one(self) -> None:
        slab = self.ledger.longest_idle()
        if slab is None:
            raise InternalError("a request was promised memory and there is none; please report")
        self._forget(slab)
        self.ledger.release(slab)

    def _count_capacity(self) -> None:
        """Let vLLM's usage (and its test for "all blocks are free") count by the budget."""
        self.num_gpu_blocks = (self.ledger.budget_slabs - 1) * self.ledger.slab_blocks + 1


class ContiguousManager(FullAttentionManager):
    """Gives each request the blocks of its range; see the module.

    `__init__` of this class never runs: state belongs into `setup_ranges`.
    """

    block_pool: ContiguousBlockPool
    _pinned: dict[str, list[KVCacheBlock]]
    _asked: tuple[str, int]
    """The request that was asked about last before it was let in, and all tokens of its prompt."""

    def setup_ranges(self) -> None:
        """Called once, on a manager that nobody has used."""
        self._pinned = {}
        self._asked = ("", 0)

    @classmethod
    def find_longest_cache_hit(
        cls, *args: Any, block_pool: BlockPool, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find a prefix, as far as whole slabs of it can be shared; see vLLM's."""
        found, num_tokens = super().find_longest_cache_hit(*args, block_pool=block_pool, **kwargs)
        assert isinstance(block_pool, ContiguousBlockPool)
        if not num_tokens:
            return found, 0
        block_tokens = num_tokens // len(found[0])
        shared = block_pool.shareable(found[0])
        return (shared,), len(shared) * block_tokens

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *_: Any,
        apply_admission_cap: bool = False,
        **__: Any,
    ) -> int:
        """The blocks of the slabs that a request will need further, and of those it will pin."""
        ledger = self.block_pool.ledger
        if apply_admission_cap:  # the whole prompt, asked about before the request is let in
            self._asked = (request_id, num_tokens)
        pinned = dict.fromkeys(ledger.slab_of(block.block_id) for block in new_computed_blocks)
        num_held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        num_slabs = max(0, self._slabs(self._blocks(num_tokens)) - self._slabs(num_held))
        num_slabs += sum(not ledger.is_used(slab) for slab in pinned)
        if len(pinned) > ledger.alias_room:  # more than there ever are: not now
            num_slabs = ledger.num_slabs + 1
        return num_slabs * ledger.slab_blocks

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Pin what was found, and begin a range that shows it; see vLLM's."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        pinned = self.req_to_blocks[request_id]
        if pinned:
            self._pinned[request_id] = pinned
            first_block = self._begin(request_id, len(pinned) + 1)
            self.req_to_blocks[request_id] = self.block_pool.show(first_block, pinned)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *_: Any) -> list[KVCacheBlock]:
        """The next blocks of the request's range; see vLLM's."""
        blocks = self.req_to_blocks[request_id]
        num_blocks = self._blocks(num_tokens) - len(blocks)
        if num_blocks <= 0:
            return []
        if self._blocks(num_tokens) > self.block_pool.ledger.plan.range_blocks:
            raise InternalError(
                f"request {request_id} has come to {num_tokens} tokens, more than --max-model-len; "
                "please report this"
            )
        next_block = blocks[-1].block_id + 1 if blocks else self._begin(request_id, num_blocks)
        new_blocks = self.block_pool.take(next_block, num_blocks)
        blocks.extend(new_blocks)
        return new_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request; its blocks, those it pinned first, for the caller to give back."""
        blocks = super().pop_blocks_for_free(request_id)
        if blocks:
            self.block_pool.end(blocks[0].block_id)
        return [*self._pinned.pop(request_id, ()), *blocks]

    def _begin(self, request_id: str, num_blocks: int) -> int:
        asked_id, num_tokens = self._asked
        if asked_id == request_id:
            num_blocks = max(num_blocks, self._blocks(num_tokens))
        return self.block_pool.begin(num_blocks)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _slabs(self, num_blocks: int) -> int:
        return -(-num_blocks // self.block_pool.ledger.slab_blocks)


def group_refusal(manager: KVCacheManager) -> str | None:
    """Why requests cannot have ranges with this model's cache groups, or None."""
    managers = manager.coordinator.single_type_managers
    names = ", ".join(type(each.kv_cache_spec).__name__ for each in managers)
    if [type(each) for each in managers] != [FullAttentionManager]:
        return f"this model's are {names}"
    if managers[0].block_size != managers[0].kv_cache_spec.block_size:
        return "ranks share each block (context parallelism)"
    return None


def adopt_contiguous(
    manager: KVCacheManager, ledger: RangeLedger, clock: Callable[[], float] = time.monotonic
) -> ContiguousBlockPool:
    """Give vLLM's unused pool and cache manager our classes.

    Raises:
        ConfigError: see `group_refusal`.
        SeamError: see `require_plain`.
    """
    if reason := group_refusal(manager):
        raise ConfigError(
            "xtensor.form=contiguous needs one group of layers, all of which attend to the whole "
            f"context, and {reason}. Use xtensor.form=paged."
        )
    pool: Any = manager.block_pool
    require_plain(pool)
    (group,) = manager.coordinator.single_type_managers
    pool.__class__ = ContiguousBlockPool
    pool.setup_ranges(ledger, clock)
    group.__class__ = ContiguousManager
    assert isinstance(group, ContiguousManager)
    group.setup_ranges()
    assert isinstance(pool, ContiguousBlockPool)
    return pool
