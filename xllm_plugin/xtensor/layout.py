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
back, as in the allocators that the word comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from xllm_plugin.errors import ConfigError
from xllm_plugin.xtensor.config import XTensorConfig

__all__ = ["Column", "KVLayout", "TensorPlacement", "slab_blocks_of"]

MAX_MAPPINGS = 32_768
"""At most so many mappings for a range; half of Linux's default for a process
(vm.max_map_count)."""


class TensorPlacement(Protocol):
    """What is read of vLLM's `KVCacheTensor`; sizes in bytes."""

    size: int
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int


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
        columns: in order; they fill the buffer without a gap.
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
        """Of the whole buffer."""
        return self.num_blocks * self.block_bytes

    @property
    def alignment_bytes(self) -> int:
        """The largest power of two that divides where every block of every column begins."""
        unit = math.gcd(*(part for column in self.columns for part in _parts(column)))
        return unit & -unit

    @property
    def min_slab_blocks(self) -> int:
        """The fewest blocks a slab may have so that the mappings of all slabs are not too many."""
        # A slab that is mapped between two that are not makes two mappings a column.
        return max(1, math.ceil(2 * len(self.columns) * self.num_blocks / MAX_MAPPINGS))

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


def _parts(column: Column) -> tuple[int, int]:
    return column.start_bytes, column.stride_bytes


def slab_blocks_of(config: XTensorConfig, layout: KVLayout) -> int:
    """How many blocks a slab has; the same on the scheduler's and on the worker's side."""
    return min(config.slab_blocks or layout.min_slab_blocks, layout.num_blocks)
