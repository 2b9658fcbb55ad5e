"""What the scheduler tells the workers about memory, what they answer, and what the world is shown.

The first two travel with a step (`xllm_plugin.worker.messages`), so that they are carried out in
the order in which they were decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

__all__ = [
    "MEMORY_SECTION",
    "MemoryChange",
    "MemoryReport",
    "MemorySection",
    "PoolMemberReport",
    "PoolSection",
]

MEMORY_SECTION: Final = "memory"


@dataclass(frozen=True, slots=True)
class MemoryChange:
    """From the scheduler, before the step it travels with: which slabs get and lose memory.

    Attributes:
        budget_slabs: how many may have memory.
        released: no step from this one on names their blocks.
        committed: this step or a later one may name their blocks.
        aliased: as committed; each shows the pages of another slab: (slab, the other).
        expected: those that would be committed next.
        number: rises by one with each change, from 1.
    """

    budget_slabs: int
    released: tuple[int, ...] = ()
    committed: tuple[int, ...] = ()
    aliased: tuple[tuple[int, int], ...] = ()
    expected: tuple[int, ...] = ()
    number: int = 0


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """From a worker: the pages of its KV cache.  Totals count from the start.

    Attributes:
        page_bytes: of one page.
        num_free: pages that are mapped nowhere.
        num_allocated: being mapped or unmapped.
        num_mapped: behind committed slabs.
        num_retired: given back, while work may still read them.
        num_reusable: given back and still mapped.
        num_created: total.
        num_released: to the system, total.
        num_maps: pages mapped, total.
        num_unmaps: pages unmapped, total.
        num_reused: pages taken that were still mapped, total.
        num_premapped: pages mapped ahead, total.
        commit_s: that steps waited for slabs, mapped anew or still mapped, total.
        release_s: that steps took to give slabs up, which are unmapped later, total.
        num_commits: calls that committed slabs.
        num_releases: calls that released slabs.
        change: number of the last change that was carried out.
        num_premap_failures: times that the device refused to map ahead, total.
        num_map_calls: of the device, each for several pages, total.
        num_unmap_calls: likewise.
        map_s: that those to map took, whoever waited for them, total.
        unmap_s: likewise, those to unmap.
    """

    page_bytes: int
    num_free: int
    num_allocated: int
    num_mapped: int
    num_retired: int
    num_reusable: int
    num_created: int
    num_released: int
    num_maps: int
    num_unmaps: int
    num_reused: int
    num_premapped: int
    commit_s: float
    release_s: float
    num_commits: int
    num_releases: int
    change: int = 0
    num_premap_failures: int = 0
    num_map_calls: int = 0
    num_unmap_calls: int = 0
    map_s: float = 0.0
    unmap_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Of all pages that exist."""
        return self.page_bytes * (self.num_created - self.num_released)


class PoolMemberReport(msgspec.Struct, frozen=True, kw_only=True):
    """One engine in a pool that engines of a machine share.

    Attributes:
        name: of its model.
        pid: of its process.
        leased_bytes: that it may use.
        unmet_bytes: that it waits for.
        min_bytes: that it can always have.
        max_bytes: that it never asks for more than.
    """

    name: str
    pid: int
    leased_bytes: int
    unmet_bytes: int
    min_bytes: int
    max_bytes: int


class PoolSection(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's pool of KV memory, as one of its members sees it.

    Attributes:
        name: `xtensor.pool`.
        total_bytes: that all members together may use.
        leased_bytes: that this engine may use.
        min_bytes: that it can always have.
        max_bytes: that it never asks for more than.
        members: everybody, this engine included.
    """

    name: str
    total_bytes: int
    leased_bytes: int
    min_bytes: int
    max_bytes: int
    members: tuple[PoolMemberReport, ...] = ()

    @property
    def free_bytes(self) -> int:
        """That nobody has leased."""
        return self.total_bytes - sum(member.leased_bytes for member in self.members)

    @property
    def unmet_bytes(self) -> int:
        """That members wait for."""
        return sum(member.unmet_bytes for member in self.members)


class MemorySection(msgspec.Struct, frozen=True, kw_only=True):
    """The snapshot's section `MEMORY_SECTION`: the elastic KV cache of one engine.

    Attributes:
        block_bytes: of one block in all layers, on the first rank.
        slab_blocks: blocks whose memory comes and goes together.
        num_slabs: that may have memory at most.
        budget_slabs: that may have memory.
        min_budget_slabs: that one request of full length takes.
        num_resident_slabs: that have memory, draining ones included.
        num_draining_slabs: beyond the budget, until their requests end.
        num_used_blocks: that requests hold.
        num_cached_blocks: that a request may find, and none holds.
        num_dropped_slabs: that were cached and had not been used for long, total.
        num_aliased_slabs: that show the pages of others (`xtensor.form=contiguous`).
        pages: the first rank's, when it last had something to do; None before.
        pool: that it shares with other engines of the machine, if it does.
    """

    block_bytes: int
    slab_blocks: int
    num_slabs: int
    budget_slabs: int
    min_budget_slabs: int
    num_resident_slabs: int
    num_draining_slabs: int
    num_used_blocks: int
    num_cached_blocks: int
    num_dropped_slabs: int = 0
    num_aliased_slabs: int = 0
    pages: MemoryReport | None = None
    pool: PoolSection | None = None

    @property
    def slab_bytes(self) -> int:
        """Of one slab, in all layers."""
        return self.slab_blocks * self.block_bytes

    @property
    def budget_bytes(self) -> int:
        """That may be taken."""
        return self.budget_slabs * self.slab_bytes

    @property
    def resident_bytes(self) -> int:
        """Behind blocks that are used, cached or ready to be."""
        return self.num_resident_slabs * self.slab_bytes

    @property
    def kept_bytes(self) -> int:
        """Behind blocks that are used or cached."""
        return (self.num_used_blocks + self.num_cached_blocks) * self.block_bytes

    @property
    def fragmentation(self) -> float:
        """Share of resident memory that is neither used nor cached, 0 to 1."""
        resident_bytes = self.resident_bytes
        return 1.0 - self.kept_bytes / resident_bytes if resident_bytes else 0.0
