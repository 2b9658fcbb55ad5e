"""Which pages are behind a slab of KV blocks, for every order that vLLM lays blocks out in.

vLLM allocates one buffer for all layers and shows it to them with strides
(vllm/v1/kv_cache_interface.py, `KVCacheTensor`): layer l, block b begin at
``offset + l * layer_stride + b * block_stride``.  Its orders (vllm/v1/kv_cache_layout.py)::

    layer-outermost (LBHNC)   | l0: b0 b1 b2 ... | l1: b0 b1 b2 ... | ...
    block-outermost (BLHNC)   | b0: l0 l1 ... | b1: l0 l1 ... | ...

Either is one or more *columns* side by side: consecutive blocks of one stride.  With the layers
outermost there is a column a layer, with the blocks outermost a single one.  The cache groups of a
hybrid model lie over each other and share their columns.

A *slab* is so many consecutive blocks, in all columns: the unit in which memory is given and taken
back, as in the allocators that the word comes from.  It is whole pages: where one block is not, a
slab has several, and the columns are moved apart so that each begins with a page (`aligned`)::

    pages   |     |     |     |     |     |     |     |     |     |     |
    columns |   b0   |   b1   |   b2   |   b3   |   b4   |  |   b0   | ...
    slabs   |       s0        |       s1        |  unused   |       s0
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any, ClassVar, Protocol, TypeVar

from xllm_plugin.errors import ConfigError
from xllm_plugin.xtensor.config import XTensorConfig

__all__ = ["MOST_PAGE_BYTES", "Column", "KVLayout", "TensorPlacement", "moved", "slab_blocks_of"]

MOST_PAGE_BYTES = 2 * 2**20
"""Of a page of the KV cache, at most; as large as a huge page of the system."""

MAX_MAPPINGS = 32_768
"""At most so many mappings for a range; half of Linux's default for a process
(vm.max_map_count)."""


class TensorPlacement(Protocol):
    """What is read of vLLM's `KVCacheTensor`, a dataclass; sizes in bytes."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    size: int
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int


PlacementT = TypeVar("PlacementT", bound=TensorPlacement)


@dataclass(frozen=True, slots=True, order=True)
class Column:
    """Block b of it lies at ``start_bytes + b * stride_bytes`` and fills the stride."""

    start_bytes: int
    stride_bytes: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How the blocks of one KV buffer lie in it.

    Attributes:
        num_blocks: virtual blocks; there may be less memory than that.
        columns: in order.  As vLLM places them, they fill the buffer without a gap.
    """

    num_blocks: int
    columns: tuple[Column, ...]

    @classmethod
    def of_tensors(cls, num_blocks: int, tensors: Iterable[TensorPlacement]) -> KVLayout:
        """The layout of vLLM's `KVCacheConfig.kv_cache_tensors`.

        Raises:
            ConfigError: the tensors are placed in a way that is neither of the orders above.
        """
        sizes, columns = set(), set()
        for tensor in tensors:
            sizes.add(tensor.size)
            stride = tensor.block_stride
            for layer in range(len(tensor.layers)):
                start = tensor.offset + layer * tensor.layer_stride
                if tensor.layer_stride < stride:  # the layers lie inside each block
                    start -= start % (num_blocks * stride)
                columns.add(Column(start, stride))
        layout = cls(num_blocks, tuple(sorted(columns)))
        end = 0
        for column in layout.columns:
            if column.start_bytes != end:
                break
            end += num_blocks * column.stride_bytes
        if not columns or sizes != {end}:
            raise ConfigError(
                f"this model's KV cache of {sorted(sizes)} bytes is laid out in {len(columns)} "
                "pieces that neither follow each other nor lie over each other, which elastic "
                "memory cannot take apart; set xtensor.enabled to false."
            )
        return layout

    @property
    def block_bytes(self) -> int:
        """Of one block in all columns."""
        return sum(column.stride_bytes for column in self.columns)

    @property
    def num_bytes(self) -> int:
        """From the beginning of the first column to the end of the last."""
        last = self.columns[-1]
        return last.start_bytes + self.num_blocks * last.stride_bytes

    @property
    def min_slab_blocks(self) -> int:
        """The fewest blocks a slab may have so that the mappings of all slabs are not too many."""
        # A slab that is mapped between two that are not makes two mappings a column.
        return max(1, math.ceil(2 * len(self.columns) * self.num_blocks / MAX_MAPPINGS))

    def unit_blocks(self, page_bytes: int) -> int:
        """The fewest consecutive blocks that are whole pages in every column.

        One, where a block is; two for latent attention on pages of 4 KiB, whose 16 tokens take
        18 KiB a layer.
        """
        return math.lcm(
            *(page_bytes // math.gcd(page_bytes, column.stride_bytes) for column in self.columns)
        )

    def page_bytes(
        self, slab_blocks: int, most_bytes: int, system_bytes: int = mmap.PAGESIZE
    ) -> int:
        """The largest page of up to `most_bytes` of which slabs are whole numbers.

        Not only powers of two: with SmolLM2's three heads of keys a block is one page of 96 KiB in
        each layer and not three of 32 KiB, and what a page costs does not depend on its size.

        Args:
            slab_blocks: by `slab_blocks_of`.
            most_bytes: a multiple of `system_bytes`.
            system_bytes: the page is a multiple of this.
        """
        piece = math.gcd(*(slab_blocks * column.stride_bytes for column in self.columns))
        num_pages = piece // system_bytes
        return next(
            piece // number
            for number in count(1)
            if num_pages % number == 0 and piece // number <= most_bytes
        )

    def aligned(self, page_bytes: int) -> KVLayout:
        """The same columns, moved apart so that each begins with a page.

        What lies between them is addresses; no block is there, and no page is needed.
        """
        columns, end = [], 0
        for column in self.columns:
            start = -(-end // page_bytes) * page_bytes
            columns.append(Column(start, column.stride_bytes))
            end = start + self.num_blocks * column.stride_bytes
        return KVLayout(self.num_blocks, tuple(columns))

    def pieces(self, first_block: int, num_blocks: int) -> Iterator[range]:
        """Where consecutive blocks lie, as ranges of bytes, one a column.

        Raises:
            IndexError: there are no such blocks.
        """
        if not 0 <= first_block <= self.num_blocks - num_blocks:
            raise IndexError(
                f"blocks {first_block} to {first_block + num_blocks} of {self.num_blocks}"
            )
        for column in self.columns:
            start = column.start_bytes + first_block * column.stride_bytes
            yield range(start, start + num_blocks * column.stride_bytes)


def slab_blocks_of(config: XTensorConfig, layout: KVLayout, page_bytes: int) -> int:
    """How many blocks a slab has; the same on the scheduler's and on the worker's side.

    Args:
        config: the settings.
        layout: of the KV buffer.
        page_bytes: of the smallest page, of which a slab has to be a whole number.
    """
    unit = layout.unit_blocks(page_bytes)
    wanted = config.slab_blocks or layout.min_slab_blocks
    return max(unit, min(-(-wanted // unit), layout.num_blocks // unit) * unit)


def moved(
    tensors: Iterable[PlacementT], before: KVLayout, after: KVLayout
) -> tuple[PlacementT, ...]:
    """vLLM's tensors, placed in the columns of another layout of the same blocks.

    Raises:
        ConfigError: a tensor's layers would no longer lie at one distance from each other.
    """
    return tuple(_moved(tensor, before, after) for tensor in tensors)


def _moved(tensor: PlacementT, before: KVLayout, after: KVLayout) -> PlacementT:
    places = []
    for layer in range(len(tensor.layers)):
        place = tensor.offset + layer * tensor.layer_stride
        number = bisect_right(before.columns, place, key=_start_of) - 1
        inside = place - before.columns[number].start_bytes
        places.append(after.columns[number].start_bytes + inside)
    strides = {end - start for start, end in pairwise(places)} or {tensor.layer_stride}
    if len(strides) > 1:
        raise ConfigError(
            f"layers {tensor.layers[0]} and following cannot be moved to where pages begin, for "
            "their KV blocks have different sizes; set xtensor.enabled to false."
        )
    return replace(tensor, size=after.num_bytes, offset=places[0], layer_stride=strides.pop())


def _start_of(column: Column) -> int:
    return column.start_bytes
