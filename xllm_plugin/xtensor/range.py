"""`ElasticRange`: one reserved range for a KV tensor set, backed where its blocks are in use.

The tensors are views of the range for as long as it lives; what changes is which of its pages
exist.  A page has an owner exactly while a block on it is in use (`KVLayout` says which are).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator

from xllm_plugin.accelerator.memory import Fence
from xllm_plugin.errors import InternalError
from xllm_plugin.xtensor.layout import KVLayout
from xllm_plugin.xtensor.page_pool import PagePool

__all__ = ["ElasticRange"]


class ElasticRange:
    """A reserved range whose blocks are backed on demand by the pages of a pool.

    Not safe between threads: one thread decides about blocks, as in vLLM's scheduler.  The pool may
    be shared with other ranges and kept by its own thread.

    Args:
        pool: of the driver in whose address space the range lies.
        layout: of the blocks; its page size is the driver's.
        owner: the name under which the pool keeps this range's pages.

    Raises:
        ValueError: the layout is for pages of another size.
        MemoryError: the address space has no room.
    """

    def __init__(self, pool: PagePool, layout: KVLayout, owner: Hashable) -> None:
        page_bytes = pool.driver.granularity_bytes
        if layout.page_bytes != page_bytes:
            raise ValueError(
                f"the layout is for pages of {layout.page_bytes} bytes, the driver's have "
                f"{page_bytes}"
            )
        self.layout = layout
        self.owner = owner
        self._pool = pool
        self._used: Counter[int] = Counter()  # page -> blocks in use on it
        self._blocks: set[int] = set()
        self.start = pool.driver.reserve(layout.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Of addresses; memory is behind a part of them."""
        return self.layout.num_bytes

    @property
    def num_backed_pages(self) -> int:
        """Pages with a block in use on them."""
        return len(self._used)

    def num_pages_for(self, blocks: Iterable[int]) -> int:
        """How many more pages backing these blocks takes.

        Raises:
            IndexError: there is no such block.
        """
        return len(self._new_pages(blocks))

    def back(self, blocks: Collection[int]) -> None:
        """Put memory behind blocks, all or nothing; contents are undefined.

        Raises:
            PagesExhaustedError: the pool has not the pages now; `num_pages_for` says how many.
            ValueError: a block is backed already, or named twice.
            IndexError: there is no such block.
        """
        wanted = set(blocks)
        if len(wanted) != len(blocks) or wanted & self._blocks:
            raise ValueError(f"blocks {sorted(blocks)}: one is backed already or named twice")
        self._pool.take(self.owner, self._addresses(self._new_pages(blocks)))
        self._blocks |= wanted
        self._used.update(self._pages(blocks))

    def free(self, blocks: Collection[int], fence: Fence | None = None) -> None:
        """Give blocks up; a page goes back to the pool with the last block on it.

        Args:
            blocks: backed ones.
            fence: after the last work that uses them; the driver's of now by default.

        Raises:
            ValueError: a block is not backed, or named twice; nothing is given up.
        """
        going = set(blocks)
        if len(going) != len(blocks) or not going <= self._blocks:
            raise ValueError(f"blocks {sorted(blocks)}: one is not backed or named twice")
        left = self._used.copy()
        left.subtract(self._pages(blocks))
        empty = sorted(page for page, count in left.items() if not count)
        self._pool.retire(self.owner, self._addresses(empty), fence)
        self._blocks -= going
        self._used = +left

    def order_for_backing(self, blocks: Iterable[int]) -> list[int]:
        """Sort free blocks by what backing them takes: few new pages, and those still mapped.

        So blocks on pages that are in use anyway come first, and pages stay full.
        """

        def cost(block: int) -> tuple[int, int, int]:
            new = self._new_pages([block])
            cold = [at for at in self._addresses(new) if not self._pool.is_mapped(at)]
            return len(new), len(cold), block

        return sorted(blocks, key=cost)

    def expect(self, blocks: Iterable[int]) -> None:
        """Tell the pool which blocks will be backed next, to map their pages ahead."""
        self._pool.expect(self._addresses(self._new_pages(blocks)))

    def close(self) -> None:
        """Give the addresses back; views of the range must be gone.

        Raises:
            InternalError: a block is backed.
            ValueError: the pool still keeps a page mapped here; evict it, or close the pool first.
        """
        if self._blocks:
            raise InternalError(f"{len(self._blocks)} blocks are in use; free them first")
        self._pool.driver.unreserve(self.start, self.num_bytes)

    def check_integrity(self) -> None:
        """Check that pages are there exactly where a block is in use.

        Raises:
            InternalError: they are not.
        """
        counted = Counter(self._pages(self._blocks))
        if counted != self._used:
            raise InternalError(f"pages in use are {self._used}, by blocks {counted}")
        own = self._pool.addresses_of(self.owner)
        if own != set(self._addresses(self._used)):
            raise InternalError(f"pages are in use at {self._used}, and the pool has {own}")

    def _pages(self, blocks: Iterable[int]) -> Iterator[int]:
        for block in blocks:
            yield from self.layout.pages_of_block(block)

    def _new_pages(self, blocks: Iterable[int]) -> list[int]:
        return [page for page in dict.fromkeys(self._pages(blocks)) if not self._used[page]]

    def _addresses(self, pages: Iterable[int]) -> list[int]:
        return [self.start + page * self.layout.page_bytes for page in pages]
