"""Paged attention as the fused inference operator computes it, in plain torch; see `dense`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from xllm_plugin.testing.cann.device.contract import emulates, require, require_dtype

__all__: list[str] = []

MASK_SIZE = 2048
"""The one size of a compressed causal mask."""

RIGHT_DOWN_CAUSAL = 3
"""The sparse mode in which a request's last query sees all its keys."""


@emulates("npu_fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    return_softmax_lse: bool = False,
    **not_emulated: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paged attention, layout TND: queries [T, N, D], caches [blocks, block_size, heads * D].

    `actual_seq_qlen` are running sums, `actual_seq_kvlen` the length of each request.  Sparse mode
    0: all keys; 3: a request's last query sees all its keys, each one before it one key less.
    """
    require(not not_emulated, f"not emulated: {', '.join(not_emulated)}")
    require(input_layout == "TND", f"layout {input_layout!r} is not emulated, only 'TND'")
    require(block_table is not None, "attention without a block table is not emulated")
    assert block_table is not None
    num_kv_heads = num_key_value_heads or num_query_heads
    _check_tensors(
        query,
        key,
        value,
        block_size=block_size,
        num_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
    )
    _check_lengths(
        query,
        block_table,
        actual_seq_qlen,
        actual_seq_kvlen,
        block_size=block_size,
        num_blocks=len(key),
    )
    assert actual_seq_qlen is not None
    assert actual_seq_kvlen is not None
    _check_mask(sparse_mode, atten_mask)
    out = torch.empty_like(query)
    lse = torch.empty(len(query), num_query_heads, 1) if return_softmax_lse else torch.empty(0)
    start = 0
    for request, (end, num_keys) in enumerate(zip(actual_seq_qlen, actual_seq_kvlen, strict=True)):
        require(sparse_mode == 0 or num_keys >= end - start, "fewer keys than queries")
        blocks = block_table[request, : math.ceil(num_keys / block_size)].long()
        keys, values = (
            cache[blocks].reshape(-1, num_kv_heads, query.shape[-1])[:num_keys].float()
            for cache in (key, value)
        )
        scores = _scores(
            query[start:end].float(), keys, softmax_scale, causal=sparse_mode == RIGHT_DOWN_CAUSAL
        )
        values = values.repeat_interleave(num_query_heads // num_kv_heads, 1)
        weighed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        out[start:end] = weighed.to(query.dtype)
        if return_softmax_lse:
            lse[start:end, :, 0] = scores.logsumexp(-1).t()
        start = end
    return out, lse


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, *, causal: bool
) -> torch.Tensor:
    """Of each head [heads, queries, keys]."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
    if causal:
        num_queries, num_keys = scores.shape[1:]
        unseen = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(
            num_keys - num_queries + 1
        )
        scores = scores.masked_fill(unseen, -math.inf)
    return scores


def _check_tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    require_dtype("query", query, (torch.bfloat16,))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(name, tensor, (query.dtype,))
        require(tensor.dim() == 3, f"{name} has {tensor.dim()} dimensions, not 3")
        require(tensor.is_contiguous(), f"{name} is not contiguous")
        require(tensor.numel() < 2**31, f"{name} has {tensor.numel()} elements, not below 2**31")
    head_dim = query.shape[2]
    require(head_dim == 128, f"layout TND takes a head dimension of 128, not {head_dim}")
    require(query.shape[1] == num_heads <= 256, f"{query.shape[1]} heads, {num_heads} named")
    require(
        num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= 64,
        f"{num_heads} heads over {num_kv_heads} key heads",
    )
    require(
        block_size % 128 == 0 and 128 <= block_size <= 512,
        f"block_size {block_size} is no multiple of 128 up to 512",
    )
    expected = (len(key), block_size, num_kv_heads * head_dim)
    for name, cache in (("key", key), ("value", value)):
        require(tuple(cache.shape) == expected, f"{name} is {tuple(cache.shape)}, not {expected}")


def _check_lengths(
    query: torch.Tensor,
    block_table: torch.Tensor,
    query_ends: Sequence[int] | None,
    num_keys: Sequence[int] | None,
    *,
    block_size: int,
    num_blocks: int,
) -> None:
    require(query_ends is not None and num_keys is not None, "TND needs both lengths")
    assert query_ends is not None
    assert num_keys is not None
    require(0 < len(query_ends) <= 4096, f"{len(query_ends)} requests, not 1 to 4096")
    require(len(num_keys) == len(query_ends), "the lengths are of different numbers of requests")
    starts = [0, *query_ends[:-1]]
    require(
        all(a <= b for a, b in zip(starts, query_ends, strict=True)),
        "actual_seq_qlen is no running sum",
    )
    require(
        query_ends[-1] == len(query), f"actual_seq_qlen ends at {query_ends[-1]} of {len(query)}"
    )
    require_dtype("block_table", block_table, (torch.int32,))
    require(
        block_table.dim() == 2 and len(block_table) == len(query_ends),
        f"block_table is {tuple(block_table.shape)}, not one row for each of {len(query_ends)}",
    )
    for row, length in zip(block_table, num_keys, strict=True):
        used = row[: math.ceil(length / block_size)]
        require(len(used) * block_size >= length, f"{length} keys do not fit a row of block_table")
        require(
            bool(((used >= 0) & (used < num_blocks)).all()),
            "block_table names no block of the cache",
        )


def _check_mask(sparse_mode: int, mask: torch.Tensor | None) -> None:
    if sparse_mode == 0:
        require(mask is None, "sparse mode 0 with a mask is not emulated")
        return
    require(sparse_mode == RIGHT_DOWN_CAUSAL, f"sparse mode {sparse_mode} is not emulated")
    require(mask is not None, "sparse mode 3 needs a mask")
    assert mask is not None
    require_dtype("atten_mask", mask, (torch.bool, torch.int8, torch.uint8))
    require(tuple(mask.shape) == (MASK_SIZE, MASK_SIZE), f"atten_mask is {tuple(mask.shape)}")
    unseen = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1)
    require(bool((mask.bool() == unseen).all()), "atten_mask is not one above the diagonal")
