"""Memory that a step's kernels write to and nobody reads afterwards."""

from __future__ import annotations

import torch

from xllm_plugin.cpu.native.library import DecoderLayer, Workspace

__all__ = ["Scratch"]


class Scratch:
    """Scratch of one model, grown to the largest batch seen, shared by its layers.

    Attributes:
        struct: its addresses, for the kernels; filled in place when the memory grows.
        hidden, residual: bfloat16 [num_tokens, hidden].
        qkv: bfloat16 [num_tokens, (num_heads + 2 num_kv_heads) * head_size].
        attention: bfloat16 [num_tokens, num_heads * head_size].
    """

    def __init__(self, layer: DecoderLayer) -> None:
        hidden, attention = layer.qkv.k, layer.heads.num_heads * layer.heads.head_size
        self._widths = (hidden, hidden, hidden, hidden, layer.qkv.n, attention, layer.down.k)
        self._num_tokens = 0
        self.struct = Workspace()
        self.resize(64)

    def resize(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens."""
        if num_tokens <= self._num_tokens:
            return
        self._num_tokens = max(num_tokens, 2 * self._num_tokens)
        self.hidden, self.residual, *rest = (
            torch.empty((self._num_tokens, width), dtype=torch.bfloat16) for width in self._widths
        )
        self._normed, self._projected, self.qkv, self.attention, self._activated = rest
        self.struct.normed = self._normed.data_ptr()
        self.struct.projected = self._projected.data_ptr()
        self.struct.qkv = self.qkv.data_ptr()
        self.struct.attention = self.attention.data_ptr()
        self.struct.activated = self._activated.data_ptr()
