"""Which pages hold a block: the two layouts of vLLM's KV cache, as pure functions.

vLLM allocates one buffer for all layers and shows it to them with strides
(vllm/v1/kv_cache_interface.py, `create_kv_cache_views`): layer l, block b lie at
``l * layer_stride + b * block_stride``, `block_bytes` long.  Its two orders
(vllm/v1/kv_cache_layout.py)::

    layer-outermost (LBNHC)   | l0: b0 b1 b2 ... | l1: b0 b1 b2 ... | ...
    block-outermost (BLNHC)   | b0: l0 l1 ... | b1: l0 l1 ... | ...

With the layers outermost a page holds many blocks of one layer, and a block lies on one page or
more in every layer; with the blocks outermost all layers of a block lie side by side and may share
a page.  Either way a page may hold parts of several blocks: it is needed while one is in use.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KVLayout"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How the blocks of one KV tensor set lie in its range.

    Attributes:
        num_layers: layers that share the range.
        num_blocks: virtual blocks; more than there is memory for.
        block_bytes: of one block in one layer, keys and values.
        layer_stride_bytes: from a layer's block to the next layer's block of the same number.
        block_stride_bytes: from a block to the next, within a layer.
        page_bytes: of the memory driver.
    """

    num_layers: int
    num_blocks: int
    block_bytes: int
    layer_stride_bytes: int
    block_stride_bytes: int
    page_bytes: int

    @classmethod
    def layer_outermost(
        cls, *, num_layers: int, num_blocks: int, block_bytes: int, page_bytes: int
    ) -> KVLayout:
        """All blocks of a layer, then the next layer; each layer begins at a page.

        Raises:
            ValueError: a number is not positive.
        """
        _check_positive(num_layers, num_blocks, block_bytes, page_bytes)
        layer_bytes = _round_up(num_blocks * block_bytes, page_bytes)
        return cls(num_layers, num_blocks, block_bytes, layer_bytes, block_bytes, page_bytes)

    @classmethod
    def block_outermost(
        cls, *, num_layers: int, num_blocks: int, block_bytes: int, page_bytes: int
    ) -> KVLayout:
        """All layers of a block, then the next block.

        Raises:
            ValueError: a number is not positive.
        """
        _check_positive(num_layers, num_blocks, block_bytes, page_bytes)
        stride = num_layers * block_bytes
        return cls(num_layers, num_blocks, block_bytes, block_bytes, stride, page_bytes)

    @property
    def is_layer_outermost(self) -> bool:
        """Say which of the two it is; with one layer they are the same."""
        return self.layer_stride_bytes >= self.num_blocks * self.block_stride_bytes

    @property
    def num_bytes(self) -> int:
        """Of the whole range, in whole pages."""
        last = self.offset_bytes(self.num_layers - 1, self.num_blocks - 1)
        return _round_up(last + self.block_bytes, self.page_bytes)

    @property
    def num_pages(self) -> int:
        """Of the whole range."""
        return self.num_bytes // self.page_bytes

    def offset_bytes(self, layer: int, block: int) -> int:
        """Where a block of a layer begins, from the start of the range.

        Raises:
            IndexError: there is no such layer or block.
        """
        self._check_block(block)
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer {layer} of {self.num_layers}")
        return layer * self.layer_stride_bytes + block * self.block_stride_bytes

    def pages_of_block(self, block: int) -> tuple[int, ...]:
        """Every page, by number from the start of the range, that a block touches; in order.

        Raises:
            IndexError: there is no such block.
        """
        pages: dict[int, None] = {}
        for layer in range(self.num_layers):
            first = self.offset_bytes(layer, block)
            end = first + self.block_bytes
            pages.update(dict.fromkeys(range(first // self.page_bytes, -(-end // self.page_bytes))))
        return tuple(pages)

    def blocks_of_page(self, page: int) -> range:
        """The blocks that touch a page.

        Raises:
            IndexError: there is no such page.
        """
        if not 0 <= page < self.num_pages:
            raise IndexError(f"page {page} of {self.num_pages}")
        first_byte = page * self.page_bytes
        if self.is_layer_outermost:
            first_byte %= self.layer_stride_bytes
        last = (first_byte + self.page_bytes - 1) // self.block_stride_bytes
        return range(first_byte // self.block_stride_bytes, min(last + 1, self.num_blocks))

    def _check_block(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} of {self.num_blocks}")


def _check_positive(*numbers: int) -> None:
    if any(number <= 0 for number in numbers):
        raise ValueError(f"layers, blocks, block and page bytes are {numbers}; give more than zero")


def _round_up(num_bytes: int, page_bytes: int) -> int:
    return -(-num_bytes // page_bytes) * page_bytes
