"""`RangeLedger`: a range of consecutive slabs for each request, and which of them have memory.

The form ``xtensor.form=contiguous`` (arXiv 2510.14686, section 4.3).  Behind slab 0, the null
block's, lie ranges of as many slabs as one request of full length takes::

    slabs   | 0 | 1  2  3 | 4  5  6 | 7  8  9 | ...
    ranges  |   |    0    |    1    |    2    | ...

There are far more slabs than memory.  A slab *has* pages (one of the budget), *shows* those of
another slab (an alias: a prefix that a request before has computed), or has nothing behind it.  A
range is::

    Free --begin--> Live --end--> Kept --last slab goes--> Free
     ^                |                                      |
     |                +------- nothing behind it ------------+
     +---- taken again by a request of fitting size, while its pages are still mapped

Live while a request has it; kept while the prefix cache, or a request that shows a slab of it,
wants one of its slabs.  Pure bookkeeping on the scheduler's side, like `slabs.SlabLedger`, of which
it is the counterpart.

Rules that hold between two calls, and that `check_integrity` checks:

1. Blocks that are used or cached lie on slabs with something behind them; cached ones on slabs with
   pages of their own.
2. Whoever shows another's pages finds all blocks there used, so nobody evicts or overwrites them.
3. Only the null slab and slabs of ranges that a request began have something behind them.
4. What the workers will be told (`take_changes`) leads from what they were told last to what is so
   now.

As each range that is not free has a slab with pages of its own, there are as many ranges as slabs
of memory: where there is memory for a request there is a range as well.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import ConfigError, InternalError
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import MAX_MAPPINGS, MOST_PAGE_BYTES, KVLayout
from xllm_plugin.xtensor.slabs import NULL_SLAB, BlockKind, SlabChanges

__all__ = ["RangeLedger", "RangePlan", "mapping_limit", "plan_ranges"]

MAX_VIRTUAL_BLOCKS = 2**20
"""About as many blocks as all ranges have together; vLLM keeps an object of 150 bytes for each."""


@dataclass(frozen=True, slots=True)
class RangePlan:
    """How many ranges of what size there are; the same on the scheduler's and the worker's side.

    Attributes:
        slab_blocks: consecutive blocks whose memory comes and goes together.
        range_slabs: of a request of full length.
        num_slabs: that there is memory for, the null slab included.
        max_aliases: slabs that may show another's pages at once.
    """

    slab_blocks: int
    range_slabs: int
    num_slabs: int
    max_aliases: int

    @property
    def num_ranges(self) -> int:
        """See the module."""
        return self.num_slabs - 1

    @property
    def range_blocks(self) -> int:
        """Blocks of a range."""
        return self.range_slabs * self.slab_blocks

    @property
    def num_blocks(self) -> int:
        """Virtual blocks: those of all ranges, and the null slab's."""
        return self.slab_blocks + self.num_ranges * self.range_blocks


def mapping_limit(path: Path = Path("/proc/sys/vm/max_map_count")) -> int:
    """How many mappings a range may have: half of what the system allows a process."""
    try:
        return int(path.read_text(encoding="ascii")) // 2
    except OSError:  # no Linux: not the limit either, but a number that has worked there
        return MAX_MAPPINGS


def plan_ranges(
    config: XTensorConfig,
    layout: KVLayout,
    full_blocks: int,
    page_bytes: int,
    *,
    max_mappings: int | None = None,
) -> RangePlan:
    """Divide addresses into ranges, within the mappings that a process may have.

    Args:
        config: the settings.
        layout: of the KV buffer as vLLM plans it; its blocks are what there is memory for.
        full_blocks: that one request of full length holds.
        page_bytes: of the smallest page, of which a slab has to be a whole number.
        max_mappings: `mapping_limit` by default.

    Raises:
        ConfigError: slabs of `slab_blocks`, or of any size, would need too many mappings; says what
            would do.
    """
    if max_mappings is None:
        max_mappings = mapping_limit()
    unit = layout.unit_blocks(page_bytes)
    most_units = max(1, layout.num_blocks // unit)

    def plan_of(num_units: int) -> RangePlan:
        slab_blocks = min(num_units, most_units) * unit
        num_slabs = layout.num_blocks // slab_blocks
        return RangePlan(
            slab_blocks=slab_blocks,
            range_slabs=-(-full_blocks // slab_blocks),
            num_slabs=num_slabs,
            max_aliases=max_mappings // slab_mappings(layout, slab_blocks) - num_slabs,
        )

    def fits(plan: RangePlan) -> bool:
        """Each slab of memory could be shown once more."""
        return plan.max_aliases >= plan.num_slabs and plan.num_blocks <= MAX_VIRTUAL_BLOCKS

    plans = [plan_of(1 << power) for power in range(most_units.bit_length())]
    smallest = next(filter(fits, plans), None)
    chosen = plan_of(-(-config.slab_blocks // unit)) if config.slab_blocks else smallest
    if chosen is not None and fits(chosen):
        return chosen
    asked = f"xtensor.slab_blocks={config.slab_blocks} with xtensor.form=contiguous: "
    told = (
        f"memory of {layout.num_blocks} blocks in {len(layout.columns)} columns would take more "
        f"than {max_mappings} mappings, half of vm.max_map_count, or more than "
        f"{MAX_VIRTUAL_BLOCKS} addresses of blocks. "
    )
    if smallest is not None:
        raise ConfigError(f"{asked}{told}Give slab_blocks {smallest.slab_blocks}, or 0 for that.")
    useful = [plan for plan in plans if plan.num_slabs > plan.range_slabs] or plans
    wanted = min(4 * slab_mappings(layout, one.slab_blocks) * one.num_slabs for one in useful)
    raise ConfigError(
        f"{asked}{told}Set vm.max_map_count to {wanted}, give less --kv-cache-memory-bytes, or use "
        "xtensor.form=paged."
    )


def slab_mappings(layout: KVLayout, slab_blocks: int) -> int:
    """Mappings of a slab at one address, at most: each page by itself, and the hole behind them."""
    page_bytes = layout.page_bytes(slab_blocks, MOST_PAGE_BYTES)
    return sum(slab_blocks * column.stride_bytes // page_bytes + 1 for column in layout.columns)


@dataclass(slots=True)
class _Slab:
    """What is behind a slab, and what becomes of its blocks.

    Attributes:
        source: the slab whose pages show here; itself where it has its own.
        num_used: blocks of requests.
        num_cached: blocks that a request may find.
        num_aliases: slabs that show its pages too.
    """

    source: int
    num_used: int = 0
    num_cached: int = 0
    num_aliases: int = 0


class RangeLedger:
    """See the module.

    Args:
        plan: of the ranges.
        budget_slabs: how many slabs may have pages of their own; at least one.
    """

    def __init__(self, plan: RangePlan, budget_slabs: int) -> None:
        self.plan = plan
        self.slab_blocks = plan.slab_blocks
        self.num_slabs = plan.num_slabs
        self.version = 0
        """Rises with every change of blocks, slabs or the budget: whoever has seen this one finds
        them as they were."""
        self._budget_slabs = budget_slabs
        self._kinds: dict[int, BlockKind] = {}  # of blocks that are not free
        self._slabs: dict[int, _Slab] = {}  # with something behind them
        self._num_aliases = 0
        self._num_in_use = 0
        self._idle: OrderedDict[int, float] = OrderedDict()  # cached and not used, since when
        self._empty: dict[int, None] = {}  # neither cached nor used any more
        self._live: dict[int, int] = {}  # range -> the slab that it was given last
        self._num_behind: Counter[int] = Counter()  # range -> slabs with something behind them
        self._reach: dict[int, int] = {}  # range -> slabs up to the last one that had pages
        # Free ranges by that, for their pages are probably still mapped; freed last, taken first.
        self._free: list[dict[int, None]] = [{} for _ in range(plan.range_slabs + 1)]
        self._free[0] = dict.fromkeys(range(plan.num_ranges - 1, -1, -1))
        self._told: dict[int, int] = {}  # slab -> source, as the workers know it
        self._changed: dict[int, None] = {}
        self._put(NULL_SLAB, _Slab(NULL_SLAB))

    # What is asked

    def blocks_of(self, slab: int) -> range:
        """The blocks on a slab."""
        return range(slab * self.slab_blocks, (slab + 1) * self.slab_blocks)

    def slab_of(self, block: int) -> int:
        """The slab that a block lies on."""
        return block // self.slab_blocks

    def kind(self, block: int) -> BlockKind:
        """What a block was noted as."""
        return self._kinds.get(block, BlockKind.FREE)

    def source_of(self, slab: int) -> int | None:
        """The slab whose pages show there; itself where it has its own; None: there is nothing."""
        found = self._slabs.get(slab)
        return None if found is None else found.source

    def is_used(self, slab: int) -> bool:
        """Say whether a request holds a block of it."""
        return slab in self._slabs and self._slabs[slab].num_used > 0

    def is_incomplete(self, slab: int) -> bool:
        """Say whether a slab of nobody has cached blocks, and others: no request can share it."""
        found = self._slabs.get(slab)
        return found is not None and not found.num_used and 0 < found.num_cached < self.slab_blocks

    @property
    def budget_slabs(self) -> int:
        """How many slabs may have pages of their own."""
        return self._budget_slabs

    @budget_slabs.setter
    def budget_slabs(self, budget_slabs: int) -> None:
        if budget_slabs != self._budget_slabs:
            self._budget_slabs = budget_slabs
            self.version += 1

    @property
    def resident(self) -> frozenset[int]:
        """The slabs with pages of their own."""
        return frozenset(slab for slab, found in self._slabs.items() if found.source == slab)

    @property
    def aliases(self) -> dict[int, int]:
        """The slabs that show the pages of another, and of which."""
        return {slab: found.source for slab, found in self._slabs.items() if found.source != slab}

    @property
    def num_resident(self) -> int:
        """How many slabs have pages of their own."""
        return len(self._slabs) - self._num_aliases

    @property
    def num_in_use(self) -> int:
        """How many of these have used blocks."""
        return self._num_in_use

    @property
    def num_aliases(self) -> int:
        """How many slabs show the pages of another."""
        return self._num_aliases

    @property
    def alias_room(self) -> int:
        """How many more may."""
        return self.plan.max_aliases - self._num_aliases

    @property
    def num_available(self) -> int:
        """How many slabs requests can have now, those with cached blocks included."""
        return max(0, self.budget_slabs - self._num_in_use)

    @property
    def num_draining(self) -> int:
        """Slabs beyond the budget, until their requests end."""
        return max(0, self.num_resident - self.budget_slabs)

    @property
    def num_used_blocks(self) -> int:
        """Blocks with pages of their own that requests hold, and the null block."""
        return sum(found.num_used for slab, found in self._slabs.items() if found.source == slab)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that a request may find and none holds."""
        return sum(found.num_cached for found in self._slabs.values())

    # What happens to ranges

    def begin(self, num_slabs: int) -> int | None:
        """Give a request a free range, one that had so many slabs with pages before if there is.

        Args:
            num_slabs: that the request will probably take.

        Returns:
            The first slab of the range; None: none is free.
        """
        wanted = min(num_slabs, self.plan.range_slabs)
        reaches = (*range(wanted, self.plan.range_slabs + 1), *range(wanted - 1, -1, -1))
        free = next((self._free[reach] for reach in reaches if self._free[reach]), None)
        if free is None:
            return None
        number, _ = free.popitem()
        self._live[number] = -1
        self._reach[number] = 0
        return 1 + number * self.plan.range_slabs

    def end(self, slab: int) -> None:
        """Take a range, named by its first slab, from its request; blocks are given back apart."""
        number = self._range_of(slab)
        del self._live[number]
        self._free_if_done(number)

    # What happens to slabs

    def commit(self, slab: int) -> None:
        """Give a slab pages of its own.

        Raises:
            InternalError: it has something behind it, no request its range, or the budget no room.
        """
        if self.num_resident >= self.budget_slabs:
            raise InternalError(f"slab {slab} is beyond the budget; please report this")
        number = self._check_new(slab)
        self._put(slab, _Slab(slab))
        self._live[number] = slab
        self._reach[number] = (slab - 1) % self.plan.range_slabs + 1

    def alias(self, slab: int, source: int) -> None:
        """Let a slab show the pages of another.

        Raises:
            InternalError: see `commit`; or not all blocks of `source` are used.
        """
        found = self._slabs.get(source)
        if (
            self.alias_room <= 0
            or found is None
            or found.source != source
            or found.num_used < self.slab_blocks
        ):
            raise InternalError(f"slab {slab} cannot show slab {source}; please report this")
        self._check_new(slab)
        self._num_aliases += 1
        found.num_aliases += 1
        self._put(slab, _Slab(source))

    def release(self, slab: int) -> None:
        """Take a slab's own pages away.

        Raises:
            InternalError: a block on it is used or cached, or another slab shows it.
        """
        found = self._slabs.get(slab)
        if (
            found is None
            or slab == NULL_SLAB
            or found.source != slab
            or found.num_used + found.num_cached + found.num_aliases
        ):
            raise InternalError(f"slab {slab} is in use and cannot go; please report this")
        self._remove(slab)

    def note(self, block: int, kind: BlockKind, now_s: float) -> None:
        """Note what a block has become; a slab that shows another goes with its last used block.

        Raises:
            InternalError: there is nothing behind it, or it would break rule 1 or 2.
        """
        before = self._kinds.get(block, BlockKind.FREE)
        if kind == before:
            return
        slab = block // self.slab_blocks
        found = self._slabs.get(slab)
        if (
            found is None
            or (found.source != slab and kind == BlockKind.CACHED)
            or (found.num_aliases and before == BlockKind.USED)
        ):
            raise InternalError(
                f"block {block} of slab {slab} becomes {kind.name}, was {before.name}; "
                "please report this"
            )
        self.version += 1
        if kind == BlockKind.FREE:
            del self._kinds[block]
        else:
            self._kinds[block] = kind
        was_used = found.num_used > 0
        found.num_used += (kind == BlockKind.USED) - (before == BlockKind.USED)
        found.num_cached += (kind == BlockKind.CACHED) - (before == BlockKind.CACHED)
        if found.source == slab:
            self._num_in_use += (found.num_used > 0) - was_used
            self._sort(slab, found, now_s)
        elif not found.num_used:
            self._remove(slab)

    # What the workers are told

    def take_changes(self) -> SlabChanges:
        """What the workers do not know yet; they are told in the order of this call."""
        committed, released, aliased = [], [], []
        for slab in self._changed:
            before, now = self._told.get(slab), self.source_of(slab)
            if before == now:
                continue
            if before is not None:
                released.append(slab)
                del self._told[slab]
            if now is not None:
                self._told[slab] = now
                if now == slab:
                    committed.append(slab)
                else:
                    aliased.append((slab, now))
        self._changed.clear()
        return SlabChanges(tuple(committed), tuple(released), tuple(aliased))

    @property
    def has_changes(self) -> bool:
        """Whether the workers are to be told something."""
        return any(self._told.get(slab) != self.source_of(slab) for slab in self._changed)

    def expected(self, num_slabs: int) -> tuple[int, ...]:
        """The slabs that requests will come to next, those first that come soonest."""
        num = min(num_slabs, max(0, self.budget_slabs - self.num_resident))
        if not num:
            return ()
        coming = (
            (self.slab_blocks - self._slabs[slab].num_used, slab + 1)
            for slab in self._live.values()
            if slab in self._slabs and slab % self.plan.range_slabs  # not the range's last
        )
        return tuple(slab for _, slab in heapq.nsmallest(num, coming))

    # What could go

    def releasable(self) -> list[int]:
        """Slabs on which every block is free."""
        return list(self._empty)

    def longest_idle(self) -> int | None:
        """The slab to evict next: an empty one, or the one that nobody has used for longest."""
        return next(iter(self._empty), None) or next(iter(self._idle), None)

    def idle_since(self, before_s: float) -> list[int]:
        """Slabs with cached blocks that nobody has used since then, the longest first."""
        found = []
        for slab, since_s in self._idle.items():
            if since_s > before_s:
                break
            found.append(slab)
        return found

    def oldest_idle_s(self) -> float | None:
        """When the longest idle slab with cached blocks was last used, or None."""
        return next(iter(self._idle.values()), None)

    def check_integrity(self) -> None:
        """Check the rules above and every count.

        Raises:
            InternalError: one is wrong; the message says which.
        """
        for problem in self._problems():
            raise InternalError(f"range ledger: {problem}; please report this with the log")

    # Inside

    def _range_of(self, slab: int) -> int:
        return (slab - 1) // self.plan.range_slabs

    def _check_new(self, slab: int) -> int:
        number = self._range_of(slab)
        if slab in self._slabs or number not in self._live:
            raise InternalError(f"slab {slab} is of nobody or has pages; please report this")
        return number

    def _put(self, slab: int, found: _Slab) -> None:
        self.version += 1
        self._slabs[slab] = found
        self._changed[slab] = None
        if slab != NULL_SLAB:
            self._num_behind[self._range_of(slab)] += 1

    def _remove(self, slab: int) -> None:
        self.version += 1
        found = self._slabs.pop(slab)
        self._changed[slab] = None
        self._idle.pop(slab, None)
        self._empty.pop(slab, None)
        if found.source != slab:
            self._slabs[found.source].num_aliases -= 1
            self._num_aliases -= 1
        number = self._range_of(slab)
        self._num_behind[number] -= 1
        self._free_if_done(number)

    def _free_if_done(self, number: int) -> None:
        if not self._num_behind[number] and number not in self._live:
            del self._num_behind[number]
            self._free[self._reach[number]][number] = None

    def _sort(self, slab: int, found: _Slab, now_s: float) -> None:
        """Enter a slab where it is looked for when something has to go."""
        if found.num_used or not found.num_cached:
            self._idle.pop(slab, None)
        else:
            self._idle.setdefault(slab, now_s)  # at the end: the longest idle come first
        if found.num_used or found.num_cached:
            self._empty.pop(slab, None)
        else:
            self._empty[slab] = None

    def _problems(self) -> Iterable[str]:
        own = self.resident
        yield from (
            f"slab {slab} {problem}"
            for slab, found in self._slabs.items()
            for problem in self._problems_of(slab, found)
        )
        if any(block // self.slab_blocks not in self._slabs for block in self._kinds):
            yield "a block is used or cached with nothing behind it"
        if self._num_aliases != len(self._slabs) - len(own) or self.alias_room < 0:
            yield "aliases are counted wrong, or too many"
        if self._num_in_use != sum(self._slabs[slab].num_used > 0 for slab in own):
            yield "the slabs in use are counted wrong"
        if not self._idle.keys() | self._empty.keys() <= own:
            yield "a slab could go that has no pages"
        behind = Counter(self._range_of(slab) for slab in self._slabs if slab != NULL_SLAB)
        if behind != +self._num_behind:
            yield "the slabs of a range are counted wrong"
        free = [number for numbers in self._free for number in numbers]
        expected = set(range(self.plan.num_ranges)) - behind.keys() - self._live.keys()
        if len(free) != len(expected) or set(free) != expected:
            yield "a range is lost, or free and in use"
        if any(
            self._told.get(slab) != self.source_of(slab)
            for slab in self._told.keys() | self._slabs.keys()
            if slab not in self._changed
        ):
            yield "the workers would not be told what is so"

    def _problems_of(self, slab: int, found: _Slab) -> Iterable[str]:
        kinds = [self.kind(block) for block in self.blocks_of(slab)]
        num_used, num_cached = kinds.count(BlockKind.USED), kinds.count(BlockKind.CACHED)
        source = self._slabs.get(found.source)
        is_own = found.source == slab
        checks = {
            "is counted wrong": (num_used, num_cached) == (found.num_used, found.num_cached),
            "shows one that has no pages of its own": source is not None
            and source.source == found.source,
            "shows another, and has cached blocks or no used ones": is_own
            or (num_used > 0 and not num_cached),
            "is shown, and not all of its blocks are used": not found.num_aliases
            or num_used == self.slab_blocks,
            "has aliases that are counted wrong": found.num_aliases
            == sum(s.source == slab for other, s in self._slabs.items() if other != slab),
            "is idle and not cached, or in use": (slab in self._idle)
            == (is_own and not num_used and num_cached > 0),
            "is empty and in use": slab not in self._empty or not num_used + num_cached,
        }
        return (problem for problem, holds in checks.items() if not holds)
