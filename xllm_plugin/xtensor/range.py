"""`ElasticRange`: one reserved range for a KV buffer, backed where its slabs are committed.

The tensors are views of the range for as long as it lives; what changes is which of its pages
exist.  The range does as it is told: which slab is needed is decided by the scheduler.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

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
        self.num_bytes = -(-layout.num_bytes // self._page_bytes) * self._page_bytes
        self.start = pool.driver.reserve(self.num_bytes)

    @property
    def num_slabs(self) -> int:
        """Slabs of the whole range."""
        return self.layout.num_blocks // self.slab_blocks

    @property
    def committed(self) -> frozenset[int]:
        """The slabs with memory behind them."""
        return frozenset(self._committed)

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
        if len(wanted) != len(slabs) or wanted & self._committed:
            raise ValueError(f"slabs {sorted(slabs)}: one is committed already or named twice")
        num_reused = self._pool.take(self.owner, self._addresses(slabs))
        self._committed |= wanted
        return num_reused

    def decommit(self, slabs: Collection[int], fence: Fence | None = None) -> None:
        """Give the memory behind slabs back to the pool.

        Args:
            slabs: committed ones.
            fence: after the last work that uses them; the driver's of now by default.

        Raises:
            ValueError: a slab is not committed, or named twice; nothing is given back.
        """
        going = set(slabs)
        if len(going) != len(slabs) or not going <= self._committed:
            raise ValueError(f"slabs {sorted(slabs)}: one is not committed or named twice")
        self._pool.retire(self.owner, self._addresses(slabs), fence)
        self._committed -= going

    def expect(self, slabs: Iterable[int]) -> None:
        """Tell the pool which slabs will be committed next, to map their pages ahead."""
        self._pool.expect(self._addresses(slab for slab in slabs if slab not in self._committed))

    def close(self) -> None:
        """Give the addresses back; views of the range must be gone.

        Raises:
            InternalError: a slab is committed.
            ValueError: the pool still keeps a page mapped here; evict it, or close the pool first.
        """
        if self._committed:
            raise InternalError(f"{len(self._committed)} slabs are committed; decommit them first")
        self._pool.driver.unreserve(self.start, self.num_bytes)

    def check_integrity(self) -> None:
        """Check that pages are there exactly where a slab is committed.

        Raises:
            InternalError: they are not.
        """
        own = self._pool.addresses_of(self.owner)
        if own != set(self._addresses(self._committed)):
            raise InternalError(f"slabs {self._committed} are committed, and the pool has {own}")

    def _addresses(self, slabs: Iterable[int]) -> list[int]:
        return [
            self.start + at
            for slab in slabs
            for piece in self.layout.pieces(slab * self.slab_blocks, self.slab_blocks)
            for at in piece[:: self._page_bytes]
        ]
