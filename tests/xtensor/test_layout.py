"""Layouts: columns found in vLLM's tensors, and where the blocks of a slab lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.errors import ConfigError
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import MAX_MAPPINGS, Column, KVLayout, slab_blocks_of


@dataclass
class Tensor:
    """As vLLM's `KVCacheTensor`."""

    size: int
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0


@dataclass
class Cache:
    """A KV cache, and every byte of its blocks as vLLM's formula gives it."""

    num_blocks: int
    page_bytes: int
    tensors: Sequence[Tensor] = field(default_factory=tuple)

    def layout(self) -> KVLayout:
        return KVLayout.of_tensors(self.num_blocks, self.tensors)

    def bytes_of(self, block: int) -> set[int]:
        return {
            at
            for tensor in self.tensors
            for layer in range(len(tensor.layers))
            for first in [tensor.offset + layer * tensor.layer_stride + block * tensor.block_stride]
            for at in range(first, first + self.page_bytes)
        }


def names(num_layers: int) -> list[str]:
    return [f"layer{i}" for i in range(num_layers)]


def layers_outermost(num_layers: int, num_blocks: int, page: int, num_groups: int = 1) -> Cache:
    """Groups of a hybrid model lie over each other."""
    size = num_layers * num_blocks * page
    tensor = Tensor(size, names(num_layers), num_blocks * page, page)
    return Cache(num_blocks, page, [tensor] * num_groups)


def blocks_outermost(num_layers: int, num_blocks: int, page: int, num_groups: int = 1) -> Cache:
    """Layers of a group lie inside each block; here a group is a tensor of its own there."""
    size = num_layers * num_blocks * page
    first = Tensor(size, names(num_layers), page, num_layers * page)
    return Cache(num_blocks, page, [first] * num_groups)


caches = st.builds(
    lambda make, *sizes: make(*sizes),
    st.sampled_from([layers_outermost, blocks_outermost]),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 2),
)


@given(caches, st.data())
def test_the_pieces_of_a_slab_are_the_bytes_of_its_blocks(
    cache: Cache, data: st.DataObject
) -> None:
    layout = cache.layout()
    first = data.draw(st.integers(0, cache.num_blocks - 1))
    num = data.draw(st.integers(1, cache.num_blocks - first))
    found = [at for piece in layout.pieces(first, num) for at in piece]
    expected = set().union(*(cache.bytes_of(block) for block in range(first, first + num)))
    assert sorted(found) == sorted(expected)
    assert all(not piece.start % layout.alignment_bytes for piece in layout.pieces(first, num))


@given(caches)
def test_blocks_fill_the_buffer(cache: Cache) -> None:
    layout = cache.layout()
    assert layout.num_bytes == cache.tensors[0].size == cache.num_blocks * layout.block_bytes


def test_the_two_orders_have_a_column_a_layer_and_one() -> None:
    assert layers_outermost(3, 5, 8).layout().columns == (
        Column(0, 8),
        Column(40, 8),
        Column(80, 8),
    )
    assert blocks_outermost(3, 5, 8).layout().columns == (Column(0, 24),)


def test_layers_of_different_sizes_are_columns_of_different_strides() -> None:
    small, large = Tensor(120, ["a", "b"], 20, 4), Tensor(120, ["c"], 80, 16, offset=40)
    layout = KVLayout.of_tensors(5, [small, large])
    assert layout.columns == (Column(0, 4), Column(20, 4), Column(40, 16))
    assert (layout.block_bytes, layout.alignment_bytes) == (24, 4)


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [Tensor(64, ["a"], 32, 8)],  # half of the buffer is nobody's
        [Tensor(64, ["a"], 32, 8), Tensor(64, ["b"], 32, 8, offset=16)],
        [Tensor(64, ["a"], 64, 16), Tensor(32, ["b"], 32, 8)],
    ],
)
def test_what_is_laid_out_otherwise_is_refused(tensors: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"set xtensor\.enabled to false"):
        KVLayout.of_tensors(4, tensors)


def test_blocks_that_are_not_there_are_an_error() -> None:
    layout = layers_outermost(2, 3, 4).layout()
    with pytest.raises(IndexError, match="blocks 2 to 4 of 3"):
        list(layout.pieces(2, 2))


def test_slabs_are_as_small_as_the_limit_on_mappings_allows() -> None:
    config = XTensorConfig()
    small, large = layers_outermost(30, 100, 4).layout(), layers_outermost(30, 3000, 4).layout()
    assert slab_blocks_of(config, small) == 1
    slab_blocks = slab_blocks_of(config, large)
    assert slab_blocks == 6
    assert 2 * 30 * -(-3000 // slab_blocks) <= MAX_MAPPINGS
    assert slab_blocks_of(XTensorConfig(slab_blocks=5), small) == 5
    assert slab_blocks_of(XTensorConfig(slab_blocks=500), small) == 100
