"""`SlabLedger`: which slabs have memory, and which blocks on them are used, cached or free.

Pure bookkeeping on the scheduler's side, as fast as the block pool that asks it at every step: no
call here does more than look at the blocks of the slabs concerned.

A slab is::

    Absent --commit--> Resident --drain--> Draining
       ^                   |   <-undrain-----  |
       +-----release-------+-------release-----+

A draining slab is beyond the budget: no block of it is handed out again, and it goes when the last
one is given back.  Only a slab without used and cached blocks is released.

Rules that hold between two calls, and that `check_integrity` checks:

1. Blocks that are used or cached lie on slabs with memory.
2. There are draining slabs only while the others fill the budget.
3. What the workers will be told (`take_changes`) leads from what they were told last to what is
   resident now, each slab named at most once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from xllm_plugin.errors import InternalError

__all__ = ["NULL_SLAB", "BlockKind", "SlabChanges", "SlabLedger"]

NULL_SLAB = 0
"""Has memory from the start and always, for vLLM's null block lies there."""


class BlockKind(IntEnum):
    """What a block is to the block pool."""

    FREE = 0
    """Of nobody, and its contents of no use."""
    CACHED = 1
    """Of nobody, but a request with the same prefix may find it."""
    USED = 2
    """Of a request, or the null block."""


class SlabChanges(NamedTuple):
    """Slabs whose memory is to come and to go, since the last time.

    `aliased` ones show the pages of another: (slab, the other).
    """

    committed: tuple[int, ...]
    released: tuple[int, ...]
    aliased: tuple[tuple[int, int], ...] = ()


class SlabLedger:
    """See the module.

    Args:
        num_blocks: virtual blocks; those behind the last whole slab are never handed out.
        slab_blocks: of a slab.
        budget_slabs: how many slabs may have memory; at least one.
    """

    def __init__(self, num_blocks: int, slab_blocks: int, budget_slabs: int) -> None:
        self.slab_blocks = slab_blocks
        self.num_slabs = num_blocks // slab_blocks
        self.version = 0
        """Rises with every change of blocks, slabs or the budget: whoever has seen this one finds
        them as they were."""
        self.num_committable = 0
        """How many more slabs the budget has room for."""
        self._budget_slabs = budget_slabs
        self._kinds = [BlockKind.FREE] * (self.num_slabs * slab_blocks)
        self._num_used = [0] * self.num_slabs
        self._num_cached = [0] * self.num_slabs
        self._num_in_use = 0
        self._resident: set[int] = set()  # draining ones included
        self._draining: set[int] = set()
        # Released last, committed first: its pages are probably still mapped.
        self._absent = list(range(self.num_slabs - 1, -1, -1))
        # Slabs to hand blocks out from, by their number of free blocks.
        self._open: list[dict[int, None]] = [{} for _ in range(slab_blocks + 1)]
        self._idle: OrderedDict[int, float] = OrderedDict()  # no used block, since when
        self._empty: dict[int, None] = {}  # of those, without a cached block either
        self._committed: dict[int, None] = {}  # and the workers do not know yet
        self._released: dict[int, None] = {}
        self._count_resident()
        self.commit()

    # What is asked

    def blocks_of(self, slab: int) -> range:
        """The blocks on a slab."""
        return range(slab * self.slab_blocks, (slab + 1) * self.slab_blocks)

    def slab_of(self, block: int) -> int:
        """The slab that a block lies on."""
        return block // self.slab_blocks

    def kind(self, block: int) -> BlockKind:
        """What a block was noted as."""
        return self._kinds[block]

    def is_draining(self, slab: int) -> bool:
        """Say whether the slab is to go."""
        return slab in self._draining

    @property
    def draining(self) -> frozenset[int]:
        """The slabs that are to go."""
        return frozenset(self._draining)

    @property
    def num_draining(self) -> int:
        """How many slabs are to go."""
        return len(self._draining)

    @property
    def num_aliases(self) -> int:
        """None: each slab has pages of its own."""
        return 0

    @property
    def resident(self) -> frozenset[int]:
        """The slabs with memory."""
        return frozenset(self._resident)

    @property
    def num_resident(self) -> int:
        """How many slabs have memory."""
        return len(self._resident)

    @property
    def num_in_use(self) -> int:
        """How many slabs have used blocks."""
        return self._num_in_use

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests hold, and the null block."""
        return sum(self._num_used)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that a request may find and none holds."""
        return sum(self._num_cached)

    @property
    def budget_slabs(self) -> int:
        """How many slabs may have memory."""
        return self._budget_slabs

    @budget_slabs.setter
    def budget_slabs(self, budget_slabs: int) -> None:
        if budget_slabs != self._budget_slabs:
            self._budget_slabs = budget_slabs
            self._count_resident()

    def choose_free(self, num_blocks: int) -> list[int]:
        """Free blocks to hand out next, up to so many: the fullest slab's first.

        So slabs that are in use anyway fill up, and others empty and can go.
        """
        chosen: list[int] = []
        for slabs in self._open[1:]:
            for slab in slabs:
                chosen += [b for b in self.blocks_of(slab) if self._kinds[b] == BlockKind.FREE]
                if len(chosen) >= num_blocks:
                    return chosen[:num_blocks]
        return chosen

    def expected(self, num_slabs: int) -> tuple[int, ...]:
        """The slabs that will be committed next, as far as the budget goes."""
        num = min(num_slabs, self.num_committable, len(self._absent))
        return tuple(reversed(self._absent[len(self._absent) - num :])) if num else ()

    # What happens

    def note(self, block: int, kind: BlockKind, now_s: float) -> None:
        """Note what a block has become.

        Raises:
            InternalError: it has no memory behind it.
        """
        before = self._kinds[block]
        if kind == before:
            return
        slab = block // self.slab_blocks
        if slab not in self._resident:
            raise InternalError(
                f"block {block} becomes {kind.name} without memory; please report this"
            )
        self.version += 1
        self._close(slab)
        self._kinds[block] = kind
        was_in_use = self._num_used[slab] > 0
        self._num_used[slab] += (kind == BlockKind.USED) - (before == BlockKind.USED)
        self._num_cached[slab] += (kind == BlockKind.CACHED) - (before == BlockKind.CACHED)
        self._reopen(slab)
        self._num_in_use += (self._num_used[slab] > 0) - was_in_use
        if self._num_used[slab]:
            self._idle.pop(slab, None)
        elif before == BlockKind.USED:
            self._idle[slab] = now_s  # at the end: the longest idle come first
        if self._num_used[slab] or self._num_cached[slab]:
            self._empty.pop(slab, None)
        else:
            self._empty[slab] = None

    def commit(self) -> int | None:
        """Give one more slab memory, within the budget; return it, or None."""
        if not self.num_committable or not self._absent:
            return None
        slab = self._absent.pop()
        self._resident.add(slab)
        self._count_resident()
        if slab in self._released:  # the workers have not heard that it went
            del self._released[slab]
        else:
            self._committed[slab] = None
        self._reopen(slab)
        return slab

    def drain(self, slab: int) -> None:
        """Hand out no more blocks of a slab."""
        self.version += 1
        self._close(slab)
        self._draining.add(slab)

    def undrain(self, slab: int) -> None:
        """Take a slab back into use."""
        self.version += 1
        self._draining.remove(slab)
        self._reopen(slab)

    def release(self, slab: int) -> None:
        """Take the memory of a slab away.

        Raises:
            InternalError: a block on it is used or cached, or it is the null slab.
        """
        if slab == NULL_SLAB or self._num_used[slab] or self._num_cached[slab]:
            raise InternalError(f"slab {slab} is in use and cannot go; please report this")
        self._close(slab)
        self._resident.remove(slab)
        self._count_resident()
        self._draining.discard(slab)
        self._idle.pop(slab, None)
        self._empty.pop(slab, None)
        self._absent.append(slab)
        if slab in self._committed:  # nor that it came
            del self._committed[slab]
        else:
            self._released[slab] = None

    def take_changes(self) -> SlabChanges:
        """What the workers do not know yet; they are told in the order of this call."""
        changes = SlabChanges(tuple(self._committed), tuple(self._released))
        self._committed.clear()
        self._released.clear()
        return changes

    @property
    def has_changes(self) -> bool:
        """Whether the workers are to be told something."""
        return bool(self._committed or self._released)

    # What could go

    def beyond_budget(self) -> list[int]:
        """Slabs to drain so that the others are within the budget.

        Those that nobody uses come first, the longest idle of them before others, then those with
        the fewest used blocks.
        """
        num_beyond = len(self._resident) - len(self._draining) - self.budget_slabs
        if num_beyond <= 0:
            return []
        idle = [slab for slab in self._idle if slab not in self._draining]
        others = self._resident - self._draining - self._idle.keys() - {NULL_SLAB}
        ranked = idle + sorted(others, key=lambda slab: self._num_used[slab])
        return [slab for slab in ranked if slab != NULL_SLAB][:num_beyond]

    def to_undrain(self) -> list[int]:
        """Draining slabs for which the budget has room again, the fullest first."""
        room = self.budget_slabs - (len(self._resident) - len(self._draining))
        ranked = sorted(self._draining, key=lambda slab: -self._num_used[slab])
        return ranked[: max(0, room)]

    def releasable(self) -> list[int]:
        """Slabs on which every block is free; a slab just committed is not among them."""
        return list(self._empty)

    def idle_since(self, before_s: float) -> list[int]:
        """Slabs with cached blocks that nobody has used since then, the longest first."""
        found = []
        for slab, since_s in self._idle.items():
            if since_s > before_s:
                break
            if self._num_cached[slab]:
                found.append(slab)
        return found

    def oldest_idle_s(self) -> float | None:
        """When the longest idle slab with cached blocks was last used, or None."""
        return next((since for slab, since in self._idle.items() if self._num_cached[slab]), None)

    def check_integrity(self) -> None:
        """Check the rules above and every count.

        Raises:
            InternalError: one is wrong; the message says which.
        """
        for problem in self._problems():
            raise InternalError(f"slab ledger: {problem}; please report this with the log")

    def _problems(self) -> Iterable[str]:
        for slab in range(self.num_slabs):
            yield from (f"slab {slab} {problem}" for problem in self._problems_of(slab))
        if sorted([*self._absent, *self._resident]) != list(range(self.num_slabs)):
            yield "a slab is lost, or has memory and has none"
        if self._num_in_use != sum(num > 0 for num in self._num_used):
            yield "the slabs in use are counted wrong"
        if self.num_committable != max(0, self._budget_slabs - len(self._resident)):
            yield "the room of the budget is counted wrong"
        if not self._draining <= self._resident:
            yield "a slab drains that has no memory"
        if self._committed.keys() - self._resident or self._released.keys() & self._resident:
            yield "the workers would be told what is not so"

    def _problems_of(self, slab: int) -> Iterable[str]:
        kinds = [self._kinds[block] for block in self.blocks_of(slab)]
        num_used, num_cached = kinds.count(BlockKind.USED), kinds.count(BlockKind.CACHED)
        is_resident = slab in self._resident
        is_open = is_resident and slab not in self._draining
        where = [number for number, slabs in enumerate(self._open) if slab in slabs]
        checks = {
            "is counted wrong": (num_used, num_cached)
            == (self._num_used[slab], self._num_cached[slab]),
            "is in use without memory": is_resident or not num_used + num_cached,
            f"is listed under {where} free blocks": where
            == ([kinds.count(BlockKind.FREE)] if is_open else []),
            "is idle and in use": slab not in self._idle or (is_resident and not num_used),
            "is empty and in use": slab not in self._empty or not num_used + num_cached,
            "has cached blocks alone and is not idle": not num_cached
            or num_used > 0
            or slab in self._idle,
        }
        return (problem for problem, holds in checks.items() if not holds)

    def _num_free(self, slab: int) -> int:
        return self.slab_blocks - self._num_used[slab] - self._num_cached[slab]

    def _count_resident(self) -> None:
        self.version += 1
        self.num_committable = max(0, self._budget_slabs - len(self._resident))

    def _close(self, slab: int) -> None:
        self._open[self._num_free(slab)].pop(slab, None)

    def _reopen(self, slab: int) -> None:
        if slab in self._resident and slab not in self._draining:
            self._open[self._num_free(slab)][slab] = None
