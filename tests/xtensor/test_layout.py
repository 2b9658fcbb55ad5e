"""Where blocks and pages lie, against counting bytes one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.xtensor.layout import KVLayout

LAYOUTS = st.builds(
    lambda make, layers, blocks, size, page: make(
        num_layers=layers, num_blocks=blocks, block_bytes=size, page_bytes=page
    ),
    st.sampled_from([KVLayout.layer_outermost, KVLayout.block_outermost]),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([4, 16, 32]),
)


def bytes_of_block(layout: KVLayout, block: int) -> list[int]:
    return [
        layout.offset_bytes(layer, block) + at
        for layer in range(layout.num_layers)
        for at in range(layout.block_bytes)
    ]


@given(LAYOUTS)
def test_blocks_are_disjoint_and_inside_the_range(layout: KVLayout) -> None:
    used = [at for block in range(layout.num_blocks) for at in bytes_of_block(layout, block)]
    assert len(set(used)) == len(used)
    assert max(used) < layout.num_bytes
    assert layout.num_bytes == layout.num_pages * layout.page_bytes


@given(LAYOUTS)
def test_a_block_touches_the_pages_of_its_bytes_and_a_page_knows_its_blocks(
    layout: KVLayout,
) -> None:
    touched: dict[int, set[int]] = {page: set() for page in range(layout.num_pages)}
    for block in range(layout.num_blocks):
        pages = sorted({at // layout.page_bytes for at in bytes_of_block(layout, block)})
        assert list(layout.pages_of_block(block)) == pages
        for page in pages:
            touched[page].add(block)
    for page, blocks in touched.items():
        assert set(layout.blocks_of_page(page)) == blocks


def test_the_two_layouts_of_one_cache() -> None:
    sizes = {"num_layers": 30, "num_blocks": 1024, "block_bytes": 16 * 1024, "page_bytes": 2**21}
    layers, blocks = KVLayout.layer_outermost(**sizes), KVLayout.block_outermost(**sizes)
    assert layers.num_bytes == blocks.num_bytes == 30 * 1024 * 16 * 1024
    assert layers.pages_of_block(130) == tuple(range(1, 240, 8))
    assert layers.blocks_of_page(9) == range(128, 256)
    assert blocks.pages_of_block(130) == (30,)
    assert blocks.blocks_of_page(30) == range(128, 133)


@pytest.mark.parametrize("wrong", ["num_layers", "num_blocks", "block_bytes", "page_bytes"])
def test_nothing_may_be_zero(wrong: str) -> None:
    sizes = {"num_layers": 1, "num_blocks": 1, "block_bytes": 1, "page_bytes": 1} | {wrong: 0}
    for make in (KVLayout.layer_outermost, KVLayout.block_outermost):
        with pytest.raises(ValueError, match="more than zero"):
            make(**sizes)


def test_what_is_outside_is_refused() -> None:
    layout = KVLayout.layer_outermost(num_layers=2, num_blocks=3, block_bytes=4, page_bytes=8)
    for call in (
        lambda: layout.offset_bytes(2, 0),
        lambda: layout.pages_of_block(3),
        lambda: layout.pages_of_block(-1),
        lambda: layout.blocks_of_page(layout.num_pages),
    ):
        with pytest.raises(IndexError):
            call()
