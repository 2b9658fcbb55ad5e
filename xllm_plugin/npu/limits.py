"""Sizes that attention has on Ascend devices, whatever the model's are.

Those of npu_fused_infer_attention_score_v2 with layout TND (torch_npu 2.13.0,
_op_plugin_docs.py).  This file imports nothing, so that memory can be counted without a device.
"""

from __future__ import annotations

__all__ = ["BLOCK_SIZE", "HEAD_SIZE", "LATENT_SIZE", "ROPE_SIZE"]

BLOCK_SIZE = 128
"""Tokens a block of the KV cache."""

HEAD_SIZE = 128
"""Of keys and values; smaller heads are padded."""

LATENT_SIZE, ROPE_SIZE = 512, 64
"""Of what latent attention caches."""
