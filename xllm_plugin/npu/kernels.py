"""vLLM's Triton kernels in torch, for a device that Triton does not compile for.

vLLM has a table for this (vllm/triton_utils/dispatcher.py).  A replacement has the kernel's own
parameters in the kernel's own order: then, and only then, it is called by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["KERNELS", "compute_slot_mapping"]


def compute_slot_mapping(
    *,
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    slot_mapping_ptr: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,  # noqa: N803  the kernel's names
    TOTAL_CP_WORLD_SIZE: int,  # noqa: N803
    TOTAL_CP_RANK: int,  # noqa: N803
    CP_KV_CACHE_INTERLEAVE_SIZE: int,  # noqa: N803
    PAD_ID: int,  # noqa: N803
    BLOCK_SIZE: int,  # noqa: N803
) -> None:
    """Write the slot of each scheduled token, and `PAD_ID` behind them.

    Source: vllm/v1/worker/block_table.py, `ComputeSlotMappingKernel.kernel`.

    Args:
        num_tokens: tokens of this step, int.
        max_num_tokens: length of the slot mapping.
        query_start_loc_ptr: [requests + 1 or more] int32, the requests' first tokens.
        positions_ptr: [num_tokens] int64.
        block_table_ptr: [requests or more, blocks] int32.
        block_table_stride: not needed; tensors know it.
        slot_mapping_ptr: [max_num_tokens] int64, written.
        KV_CACHE_BLOCK_SIZE: tokens a block.
        TOTAL_CP_WORLD_SIZE: 1; the family refuses more ranks.
        TOTAL_CP_RANK: 0.
        CP_KV_CACHE_INTERLEAVE_SIZE: of no meaning for one rank.
        PAD_ID: the slot of a token that is none.
        BLOCK_SIZE: of the kernel's launch; not needed.
    """
    del block_table_stride, TOTAL_CP_RANK, CP_KV_CACHE_INTERLEAVE_SIZE, BLOCK_SIZE
    assert TOTAL_CP_WORLD_SIZE == 1
    positions = positions_ptr[:num_tokens]
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=positions.device)
    # The request of a token is the last one that starts at or before it.
    requests = torch.searchsorted(query_start_loc_ptr, tokens, right=True) - 1
    blocks = block_table_ptr[requests, positions // KV_CACHE_BLOCK_SIZE].long()
    slot_mapping_ptr[:num_tokens] = blocks * KV_CACHE_BLOCK_SIZE + positions % KV_CACHE_BLOCK_SIZE
    slot_mapping_ptr[num_tokens:max_num_tokens] = PAD_ID


KERNELS: dict[str, Callable[..., Any]] = {
    "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping
}
