"""Layouts: columns found in vLLM's tensors, and where the blocks of a slab lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.errors import ConfigError
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import MAX_MAPPINGS, Column, KVLayout, moved, slab_blocks_of


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
    assert (layout.block_bytes, layout.unit_blocks(8)) == (24, 2)


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
    assert slab_blocks_of(config, small, 4) == 1
    slab_blocks = slab_blocks_of(config, large, 4)
    assert slab_blocks == 6
    assert 2 * 30 * -(-3000 // slab_blocks) <= MAX_MAPPINGS
    assert slab_blocks_of(XTensorConfig(slab_blocks=5), small, 4) == 5
    assert slab_blocks_of(XTensorConfig(slab_blocks=500), small, 4) == 100


@given(caches, st.sampled_from([2, 4, 8, 16]), st.integers(0, 5))
def test_slabs_are_whole_pages_of_their_own(
    cache: Cache, page_bytes: int, wanted_blocks: int
) -> None:
    """Whatever a block's size and however many blocks there are."""
    layout = cache.layout()
    slab_blocks = slab_blocks_of(XTensorConfig(slab_blocks=wanted_blocks), layout, page_bytes)
    page = layout.page_bytes(slab_blocks, 32, page_bytes)
    assert page % page_bytes == 0
    aligned = layout.aligned(page)
    pieces = [
        piece
        for slab in range(cache.num_blocks // slab_blocks)
        for piece in aligned.pieces(slab * slab_blocks, slab_blocks)
    ]
    assert all(piece.start % page == piece.stop % page == 0 for piece in pieces)
    taken = [at for piece in pieces for at in piece]
    assert len(taken) == len(set(taken))
    assert aligned.block_bytes == layout.block_bytes


@given(caches, st.sampled_from([2, 4, 8, 16]))
def test_moved_tensors_have_their_blocks_where_the_layout_says(
    cache: Cache, page_bytes: int
) -> None:
    layout = cache.layout()
    aligned = layout.aligned(page_bytes)
    elsewhere = replace(cache, tensors=moved(cache.tensors, layout, aligned))
    for block in range(cache.num_blocks):
        found = {at for piece in aligned.pieces(block, 1) for at in piece}
        assert found == elsewhere.bytes_of(block)
    assert {tensor.size for tensor in elsewhere.tensors} == {aligned.num_bytes}


def test_latent_attention_has_two_blocks_a_slab_and_columns_apart() -> None:
    """16 tokens of 576 elements of two bytes, and an odd number of blocks."""
    cache = layers_outermost(3, 65, 18 * 1024)
    layout = cache.layout()
    slab_blocks = slab_blocks_of(XTensorConfig(), layout, 4096)
    assert (slab_blocks, layout.page_bytes(slab_blocks, 2**21)) == (2, 36 * 1024)
    aligned = layout.aligned(4096)
    assert [column.start_bytes % 4096 for column in layout.columns] == [0, 2048, 0]
    assert [column.start_bytes % 4096 for column in aligned.columns] == [0, 0, 0]
    (tensor,) = moved(cache.tensors, layout, aligned)
    assert (tensor.layer_stride, tensor.size) == (
        65 * 18 * 1024 + 2048,
        2 * (65 * 18 * 1024 + 2048) + 65 * 18 * 1024,
    )


def test_a_larger_slab_has_larger_pages() -> None:
    layout = layers_outermost(2, 64, 3 * 2**14).layout()
    block = 3 * 2**14
    found = [layout.page_bytes(blocks, 2**21) for blocks in (1, 2, 3, 43, 64)]
    assert found == [block, 2 * block, 3 * block, 43 * block // 2, 32 * block]


def test_slabs_are_rounded_up_to_whole_pages_and_down_to_the_blocks_there_are() -> None:
    layout = layers_outermost(2, 13, 6).layout()
    wanted = (1, 2, 3, 12, 13)
    found = [slab_blocks_of(XTensorConfig(slab_blocks=n), layout, 4) for n in wanted]
    assert found == [2, 2, 4, 12, 12]
    assert slab_blocks_of(XTensorConfig(), layout, 64) == 32, "more than there are: no slab at all"


def test_layers_that_would_lie_at_several_distances_are_refused() -> None:
    """Columns of one size move by the same; those of a tensor with others between may not."""
    tensors = [Tensor(70, ["a", "b", "c"], 20, 4), Tensor(70, ["d"], 10, 2, offset=60)]
    layout = KVLayout.of_tensors(5, tensors)
    assert layout.columns[-1] == Column(60, 2)
    moved(tensors, layout, layout.aligned(8))
    uneven = KVLayout(5, (Column(0, 4), Column(24, 4), Column(56, 4), Column(80, 2)))
    with pytest.raises(ConfigError, match=r"layers a and following.*xtensor\.enabled"):
        moved(tensors, layout, uneven)
