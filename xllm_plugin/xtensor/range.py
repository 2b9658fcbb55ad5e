"""`ElasticRange`: one reserved range for a KV buffer, backed where its slabs are committed.

A slab may also show the pages of a committed one: an alias, which is given back as those are.

The tensors are views of the range for as long as it lives; what changes is which of its pages
exist.  The range does as it is told: which slab is needed is decided by the scheduler.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping

from xllm_plugin.accelerator.memory import Fence
from xllm_plugin.errors import ConfigError, InternalError
from xllm_plugin.xtensor.layout import KVLayout
from xllm_plugin.xtensor.page_pool import PagePool

__all__ = ["ElasticRange"]


class ElasticRange:
    """A reserved range whose slabs are backed on demand by the pages of a pool.

    Not safe between threads: one thread takes the steps.  The pool may be shared with other ranges
    and kept by its own thread.

    Args:
        pool: of the driver in whose address space the range lies.
        layout: of the blocks.
        slab_blocks: blocks of a slab; the last blocks that fill none are never backed.
        owner: the name under which the pool keeps this range's pages.

    Raises:
        ConfigError: a slab does not begin and end with a page of the driver.
        MemoryError: the address space has no room.
    """

    def __init__(self, pool: PagePool, layout: KVLayout, slab_blocks: int, owner: Hashable) -> None:
        self._page_bytes = pool.driver.granularity_bytes
        for column in layout.columns:
            if column.start_bytes % self._page_bytes or (
                slab_blocks * column.stride_bytes % self._page_bytes
            ):
                raise ConfigError(
                    f"slabs of {slab_blocks} blocks of {column.stride_bytes} bytes at "
                    f"{column.start_bytes} do not begin and end with pages of {self._page_bytes} "
                    "bytes; use another --block-size, or set xtensor.enabled to false."
                )
        self.layout = layout
        self.slab_blocks = slab_blocks
        self.owner = owner
        self._pool = pool
        self._committed: set[int] = set()
        self._aliases: dict[int, int] = {}
        self.num_bytes = -(-layout.num_bytes // self._page_bytes) * self._page_bytes
        self.start = pool.driver.reserve(self.num_bytes)

    @property
    def num_slabs(self) -> int:
        """Slabs of the whole range."""
        return self.layout.num_blocks // self.slab_blocks

    @property
    def committed(self) -> frozenset[int]:
        """The slabs with memory of their own behind them."""
        return frozenset(self._committed)

    @property
    def aliases(self) -> dict[int, int]:
        """The slabs that show the pages of another, and of which."""
        return dict(self._aliases)

    def has(self, slab: int) -> bool:
        """Say whether something is behind a slab: memory of its own, or another's."""
        return slab in self._committed or slab in self._aliases

    @property
    def pages_per_slab(self) -> int:
        """Pages behind one slab."""
        return self.slab_blocks * self.layout.block_bytes // self._page_bytes

    def commit(self, slabs: Collection[int]) -> int:
        """Put memory behind slabs, all or nothing; contents are undefined.

        Returns:
            How many of their pages were still mapped.

        Raises:
            PagesExhaustedError: the pool has not the pages now.
            ValueError: a slab is committed already, or named twice.
            IndexError: there is no such slab.
        """
        wanted = set(slabs)
        if len(wanted) != len(slabs) or any(self.has(slab) for slab in wanted):
            raise ValueError(f"slabs {sorted(slabs)}: one is committed already or named twice")
        num_reused = self._pool.take(self.owner, self._addresses(slabs))
        self._committed |= wanted
        return num_reused

    def alias(self, shown: Mapping[int, int]) -> None:
        """Let slabs show the pages of committed ones, all or nothing.

        Args:
            shown: slab -> the slab whose pages show there from now on.

        Raises:
            PagesExhaustedError: the device has no room for the mappings now.
            ValueError: a slab has something behind it, or its source no memory of its own.
            IndexError: there is no such slab.
        """
        if any(self.has(slab) for slab in shown) or not self._committed.issuperset(shown.values()):
            raise ValueError(f"slabs {dict(shown)}: one is committed, or its source is not")
        pairs = zip(self._addresses(shown), self._addresses(shown.values()), strict=True)
        self._pool.share(self.owner, dict(pairs))
        self._aliases |= shown

    def decommit(self, slabs: Collection[int], fence: Fence | None = None) -> None:
        """Give the memory behind slabs back to the pool.

        Args:
            slabs: committed ones, and those that show others.
            fence: after the last work that uses them; the driver's of now by default.

        Raises:
            ValueError: a slab is not committed, or named twice; nothing is given back.
        """
        going = set(slabs)
        if len(going) != len(slabs) or not all(self.has(slab) for slab in going):
            raise ValueError(f"slabs {sorted(slabs)}: one is not committed or named twice")
        # Aliases first: a page stays mapped at the address that is given up last.
        ordered = sorted(slabs, key=lambda slab: slab not in self._aliases)
        self._pool.retire(self.owner, self._addresses(ordered), fence)
        self._committed -= going
        for slab in going & self._aliases.keys():
            del self._aliases[slab]

    def expect(self, slabs: Iterable[int]) -> None:
        """Tell the pool which slabs will be committed next, to map their pages ahead."""
        self._pool.expect(self._addresses(slab for slab in slabs if slab not in self._committed))

    def close(self) -> None:
        """Give the addresses back; views of the range must be gone.

        Raises:
            InternalError: a slab is committed.
            ValueError: the pool still keeps a page mapped here; evict it, or close the pool first.
        """
        if self._committed or self._aliases:
            raise InternalError(f"{len(self._committed)} slabs are committed; decommit them first")
        self._pool.driver.unreserve(self.start, self.num_bytes)

    def check_integrity(self) -> None:
        """Check that pages are there exactly where a slab is committed or shows another's.

        Raises:
            InternalError: they are not.
        """
        own = self._pool.addresses_of(self.owner)
        if own != set(self._addresses([*self._committed, *self._aliases])):
            raise InternalError(f"slabs {self._committed} are committed, and the pool has {own}")
        for slab, source in self._aliases.items():
            shown, pages = self._addresses([slab]), self._addresses([source])
            if [*map(self._pool.page_at, shown)] != [*map(self._pool.page_at, pages)]:
                raise InternalError(f"slab {slab} does not show the pages of slab {source}")

    def _addresses(self, slabs: Iterable[int]) -> list[int]:
        return [
            self.start + at
            for slab in slabs
            for piece in self.layout.pieces(slab * self.slab_blocks, self.slab_blocks)
            for at in piece[:: self._page_bytes]
        ]
