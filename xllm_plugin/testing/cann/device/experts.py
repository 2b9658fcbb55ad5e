"""The operators of a mixture of experts, in plain torch; see `dense`.

What the wheel's documentation leaves open is as in CANN's own (aclnnMoeGatingTopK,
aclnnMoeInitRoutingV2): weights made by sigmoid are divided by their sum, those by softmax are not;
rows of one expert keep the tokens' order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from xllm_plugin.testing.cann.device.contract import FLOATS, emulates, require, require_dtype

__all__: list[str] = []

ALIGNMENT = 32
"""Experts of a group are counted in multiples of it."""

MAX_EXPERTS = 2048
MAX_GROUPS = 1024
INNER_LIMIT = 65536


@emulates("npu_moe_gating_top_k")
def moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **not_emulated: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of logits [tokens, experts], the best groups by biased score, the best k in them."""
    require(not not_emulated, f"not emulated: {', '.join(not_emulated)}")
    require(renorm == 0 and norm_type in {0, 1}, f"renorm {renorm} or norm_type {norm_type}")
    require(group_select_mode in {0, 1}, f"group_select_mode {group_select_mode}")
    _check_gating(x, k, bias, k_group, group_count)
    scores = x.float().sigmoid() if norm_type else x.float().softmax(-1)
    biased = scores if bias is None else scores + bias.float()
    groups = biased.view(len(x), group_count, -1)
    best = groups.topk(2, -1).values.sum(-1) if group_select_mode else groups.amax(-1)
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(k_group, -1).indices, 0)
    biased = groups.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(1)
    experts = biased.topk(k, -1).indices
    weights = scores.gather(1, experts)
    if norm_type:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    normed = scores if out_flag else torch.empty(0)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), normed


def _check_gating(
    x: torch.Tensor, k: int, bias: torch.Tensor | None, k_group: int, group_count: int
) -> None:
    require_dtype("x", x, FLOATS)
    require(x.dim() == 2 and x.shape[1] <= MAX_EXPERTS, f"x is {tuple(x.shape)}")
    num_experts = x.shape[1]
    require(
        group_count > 0 and num_experts % group_count == 0 and num_experts // group_count > 2,
        f"{num_experts} experts in {group_count} groups",
    )
    size = num_experts // group_count
    require(
        -(-size // ALIGNMENT) * ALIGNMENT * group_count <= MAX_EXPERTS,
        f"{group_count} groups of {size}, each rounded up to {ALIGNMENT}, exceed {MAX_EXPERTS}",
    )
    require(1 <= k_group <= group_count, f"{k_group} of {group_count} groups")
    require(1 <= k <= size * k_group, f"{k} of {size * k_group} experts")
    if bias is not None:
        require_dtype("bias", bias, (x.dtype,))
        require(tuple(bias.shape) == (num_experts,), f"bias is {tuple(bias.shape)}")


@emulates("npu_moe_init_routing_v2")
def moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = [],
    row_idx_type: int = 0,
    **not_emulated: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [tokens * k, hidden] sorted by expert, the row of each choice, and rows an expert."""
    require(not not_emulated, f"not emulated: {', '.join(not_emulated)}")
    require(quant_mode == -1 and drop_pad_mode == 0, "quantising and dropping are not emulated")
    require(expert_tokens_num_type == 1, f"expert_tokens_num_type {expert_tokens_num_type}")
    require(expert_tokens_num_flag, "expert_tokens_num_flag must be True")
    require(row_idx_type == 0, f"row_idx_type {row_idx_type} is not emulated")
    require_dtype("x", x, (*FLOATS, torch.int8))
    require_dtype("expert_idx", expert_idx, (torch.int32,))
    require(x.dim() == 2 and expert_idx.dim() == 2, "x and expert_idx have two dimensions")
    require(len(x) == len(expert_idx), f"{len(x)} tokens, choices of {len(expert_idx)}")
    require(active_num in {-1, 0, expert_idx.numel()}, f"active_num {active_num} is not emulated")
    require(0 < expert_num <= 10240, f"expert_num {expert_num}")
    require(list(active_expert_range) == [0, expert_num], "a range of experts is not emulated")
    choices = expert_idx.flatten().long()
    require(bool(((choices >= 0) & (choices < expert_num)).all()), "an expert is outside the range")
    origins = choices.argsort(stable=True)
    rows = x[origins // expert_idx.shape[1]]
    places = torch.empty_like(origins).scatter_(0, origins, torch.arange(len(origins)))
    counts = choices.bincount(minlength=expert_num)
    return rows, places.int(), counts, torch.empty(len(origins))


@emulates("npu_moe_token_unpermute")
def moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Each token's rows [tokens * k, hidden], found by `sorted_indices`, times probs, summed."""
    require(not padded_mode and restore_shape is None, "padded mode is not emulated")
    require_dtype("permuted_tokens", permuted_tokens, (torch.bfloat16,))
    require_dtype("sorted_indices", sorted_indices, (torch.int32, torch.int64))
    require(sorted_indices.dim() == 1, "sorted_indices has one dimension")
    k = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens[sorted_indices.long()].float().view(-1, k, permuted_tokens.shape[1])
    if probs is not None:
        require_dtype("probs", probs, (torch.bfloat16,))
        require(tuple(probs.shape) == tuple(rows.shape[:2]), f"probs are {tuple(probs.shape)}")
        rows = rows * probs.float().unsqueeze(-1)
    return rows.sum(1).to(permuted_tokens.dtype)


@emulates("npu_grouped_matmul")
def grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    **not_emulated: Any,
) -> list[torch.Tensor]:
    """One x [rows, in], one weight [groups, in, out], groups of rows: one product [rows, out]."""
    given = [name for name, value in not_emulated.items() if value is not None]
    require(not given, f"not emulated: {', '.join(given)}")
    require(len(x) == 1 and len(weight) == 1, "several tensors are not emulated")
    require(group_type == 0 and split_item in {2, 3} and act_type == 0, "this mode is not emulated")
    require(group_list_type == 1 and group_list is not None, "only counts are emulated")
    assert group_list is not None
    (rows,), (weights,) = x, weight
    require_dtype("x", rows, FLOATS)
    require_dtype("weight", weights, (rows.dtype,))
    require_dtype("group_list", group_list, (torch.int64,))
    require(rows.dim() == 2 and rows.is_contiguous(), "x is not [rows, in], contiguous")
    require(weights.dim() == 3, f"weight has {weights.dim()} dimensions, not 3")
    require(
        weights.is_contiguous() or weights.transpose(1, 2).is_contiguous(),
        "weight is neither contiguous nor the transpose of a contiguous one",
    )
    require(weights.shape[1] == rows.shape[1], f"{tuple(rows.shape)} by {tuple(weights.shape)}")
    require(max(rows.shape[1], weights.shape[2]) < INNER_LIMIT, f"{tuple(weights.shape)}")
    require(
        tuple(group_list.shape) == (len(weights),) and 1 < len(weights) <= MAX_GROUPS,
        f"group_list is {tuple(group_list.shape)} for {len(weights)} weights",
    )
    counts = group_list.tolist()
    require(min(counts) >= 0 and sum(counts) == len(rows), f"groups of {counts}, {len(rows)} rows")
    parts = zip(rows.split(counts), weights, strict=True)
    products = [part.float() @ one.float() for part, one in parts]
    return [torch.cat(products).to(rows.dtype)]
