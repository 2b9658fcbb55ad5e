"""Attention as the fused inference operator computes it, in plain torch; see `dense`.

Emulated, all with layout TND: queries [tokens, heads, D] of all requests behind one another.

* paged, D = 128: caches [blocks, block_size, key heads * 128];
* packed, D = 128, with or without rope: keys as the queries, without a block table;
* latent, D = 512 with rope: one paged head that is keys and values at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xllm_plugin.testing.cann.device.contract import emulates, require, require_dtype

__all__: list[str] = []

MASK_SIZE = 2048
"""The one size of a compressed causal mask."""

RIGHT_DOWN_CAUSAL, BAND = 3, 4
"""Sparse modes: a request's last query sees all its keys; or those named, before and after it."""

UNLIMITED = 2**31 - 1

HEAD_DIM, LATENT_DIM, ROPE_DIM = 128, 512, 64
MAX_LATENT_QUERIES = 16
LATENT_HEADS = frozenset({1, 2, 4, 8, 16, 32, 64, 128})

Reader = Callable[[torch.Tensor, int], torch.Tensor]
"""Of keys or values and a request's number, its own [keys, key heads, D]."""


@emulates("npu_fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    return_softmax_lse: bool = False,
    **not_emulated: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax(scale * (query . key + query_rope . key_rope)) . value of each request.

    `actual_seq_qlen` are running sums; `actual_seq_kvlen` is the length of each request where there
    is a block table, and running sums elsewhere.  Sparse mode 0: all keys; 3: a request's last
    query sees all its keys, each one before it one key less; 4: of these, `pre_tokens` before the
    query's own key, and `next_tokens` after it, but for calls with one query a request and no
    rope, where the operator takes no notice of modes and tokens.
    """
    require(not not_emulated, f"not emulated: {', '.join(not_emulated)}")
    require(input_layout == "TND", f"layout {input_layout!r} is not emulated, only 'TND'")
    num_kv_heads = num_key_value_heads or num_query_heads
    _check_queries(query, num_query_heads, num_kv_heads)
    require(actual_seq_qlen is not None and actual_seq_kvlen is not None, "TND needs both lengths")
    assert actual_seq_qlen is not None
    assert actual_seq_kvlen is not None
    query_lengths = _lengths_of(actual_seq_qlen, len(query), "actual_seq_qlen")
    _check_mask(sparse_mode, atten_mask)
    _check_rope(query, query_rope, key_rope, num_kv_heads)
    if block_table is None:
        num_keys = _lengths_of(actual_seq_kvlen, len(key), "actual_seq_kvlen")
        read = _packed(num_keys)
        _check_packed(key, value, key_rope, num_kv_heads)
    else:
        num_keys = list(actual_seq_kvlen)
        read = _paged(block_table, num_keys, block_size, num_kv_heads)
        _check_paged(key, value, key_rope, block_size, num_kv_heads)
        _check_table(block_table, num_keys, block_size=block_size, num_blocks=len(key))
    require(len(num_keys) == len(query_lengths), "the lengths are of different numbers of requests")
    if query.shape[2] == LATENT_DIM:
        require(block_table is not None, "a head dimension of 512 needs pages")
        _check_latent(query, query_lengths, num_kv_heads, sparse_mode)
    before, after = _band_of(sparse_mode, pre_tokens, next_tokens, query_lengths, num_keys)
    if max(query_lengths) == 1 and query_rope is None:
        before = after = UNLIMITED
    out = torch.empty_like(query)
    if query_rope is not None:
        query = torch.cat((query, query_rope), -1)
    lse = torch.empty(len(query), num_query_heads, 1) if return_softmax_lse else torch.empty(0)
    end = 0
    for request, (length, keys_here) in enumerate(zip(query_lengths, num_keys, strict=True)):
        start, end = end, end + length
        first = max(0, keys_here - length - before)  # keys before it are not read
        keys = read(key, request)[first:]
        if key_rope is not None:
            keys = torch.cat((keys, read(key_rope, request)[first:]), -1)
        queries = query[start:end].float()
        scores = _scores(queries, keys.float(), softmax_scale, before, after)
        values = read(value, request)[first:].float()
        values = values.repeat_interleave(num_query_heads // num_kv_heads, 1)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
        if return_softmax_lse:
            lse[start:end, :, 0] = scores.logsumexp(-1).t()
    return out, lse


@emulates("_npu_fused_infer_attention_score_v2_get_max_workspace")
def max_workspace(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **not_needed: Any
) -> torch.Tensor:
    """Memory for the operator to work in; this one needs none."""
    del key, value, not_needed
    return query.new_empty(1)


def _paged(
    block_table: torch.Tensor, num_keys: Sequence[int], block_size: int, num_kv_heads: int
) -> Reader:
    def read(cache: torch.Tensor, request: int) -> torch.Tensor:
        blocks = block_table[request, : math.ceil(num_keys[request] / block_size)].long()
        dim = cache.shape[2] // num_kv_heads
        return cache[blocks].reshape(-1, num_kv_heads, dim)[: num_keys[request]]

    return read


def _packed(num_keys: Sequence[int]) -> Reader:
    def read(tensor: torch.Tensor, request: int) -> torch.Tensor:
        return tensor.split(list(num_keys))[request]

    return read


def _band_of(
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    query_lengths: Sequence[int],
    num_keys: Sequence[int],
) -> tuple[int, int]:
    """How many keys before and after its own a query sees, the last query's own being the last."""
    if sparse_mode == 0:
        return UNLIMITED, UNLIMITED
    pairs = list(zip(query_lengths, num_keys, strict=True))
    if sparse_mode == RIGHT_DOWN_CAUSAL:
        require(all(keys >= length for length, keys in pairs), "fewer keys than queries")
        return UNLIMITED, 0
    fits = all(pre_tokens >= -length and next_tokens >= -keys for length, keys in pairs)
    require(fits and pre_tokens + next_tokens >= 0, f"band of {pre_tokens} and {next_tokens}")
    return pre_tokens, next_tokens


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, before: int, after: int
) -> torch.Tensor:
    """Of each head [heads, queries, keys]; the last query's own key is the last."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
    num_queries, num_keys = scores.shape[1:]
    own = torch.arange(num_keys - num_queries, num_keys).unsqueeze(1)
    others = torch.arange(num_keys)
    unseen = (others < own - before) | (others > own + after)
    return scores.masked_fill(unseen, -math.inf)


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    require_dtype(name, tensor, (torch.bfloat16,))
    require(tensor.dim() == 3, f"{name} has {tensor.dim()} dimensions, not 3")
    require(tensor.is_contiguous(), f"{name} is not contiguous")
    require(tensor.numel() < 2**31, f"{name} has {tensor.numel()} elements, not below 2**31")


def _check_queries(query: torch.Tensor, num_heads: int, num_kv_heads: int) -> None:
    _check_tensor("query", query)
    dim = query.shape[2]
    require(
        dim in {HEAD_DIM, LATENT_DIM}, f"layout TND takes a head dimension of 128 or 512, not {dim}"
    )
    require(query.shape[1] == num_heads <= 256, f"{query.shape[1]} heads, {num_heads} named")
    require(
        num_heads % num_kv_heads == 0 and (dim == LATENT_DIM or num_heads // num_kv_heads <= 64),
        f"{num_heads} heads over {num_kv_heads} key heads",
    )


def _check_rope(
    query: torch.Tensor,
    query_rope: torch.Tensor | None,
    key_rope: torch.Tensor | None,
    num_kv_heads: int,
) -> None:
    require((query_rope is None) == (key_rope is None), "only one of query_rope and key_rope")
    if query_rope is None or key_rope is None:
        return
    _check_tensor("query_rope", query_rope)
    _check_tensor("key_rope", key_rope)
    expected = (*query.shape[:2], ROPE_DIM)
    require(tuple(query_rope.shape) == expected, f"query_rope is {tuple(query_rope.shape)}")
    require(
        key_rope.shape[2] in {ROPE_DIM, ROPE_DIM * num_kv_heads},
        f"key_rope is {tuple(key_rope.shape)}",
    )


def _check_paged(
    key: torch.Tensor,
    value: torch.Tensor,
    key_rope: torch.Tensor | None,
    block_size: int,
    num_kv_heads: int,
) -> None:
    require(
        block_size % 128 == 0 and 128 <= block_size <= 512,
        f"block_size {block_size} is no multiple of 128 up to 512",
    )
    is_latent = key.shape[-1] == LATENT_DIM and key_rope is not None
    dim = LATENT_DIM if is_latent else HEAD_DIM
    require(is_latent or key_rope is None, "rope with pages needs a head dimension of 512")
    expected = (len(key), block_size, num_kv_heads * dim)
    for name, cache in (("key", key), ("value", value)):
        _check_tensor(name, cache)
        require(tuple(cache.shape) == expected, f"{name} is {tuple(cache.shape)}, not {expected}")
    if key_rope is not None:
        expected = (len(key), block_size, ROPE_DIM)
        require(tuple(key_rope.shape) == expected, f"key_rope is {tuple(key_rope.shape)}")


def _check_packed(
    key: torch.Tensor, value: torch.Tensor, key_rope: torch.Tensor | None, num_kv_heads: int
) -> None:
    expected = (len(key), num_kv_heads, HEAD_DIM)
    for name, tensor in (("key", key), ("value", value)):
        _check_tensor(name, tensor)
        require(tuple(tensor.shape) == expected, f"{name} is {tuple(tensor.shape)}, not {expected}")
    if key_rope is not None:
        expected = (len(key), num_kv_heads, ROPE_DIM)
        require(tuple(key_rope.shape) == expected, f"key_rope is {tuple(key_rope.shape)}")


def _check_latent(
    query: torch.Tensor, query_lengths: Sequence[int], num_kv_heads: int, sparse_mode: int
) -> None:
    require(
        num_kv_heads == 1 and query.shape[1] in LATENT_HEADS,
        f"{query.shape[1]} heads over {num_kv_heads}: 512 takes a power of two over one",
    )
    longest = max(query_lengths)
    require(longest <= MAX_LATENT_QUERIES, f"{longest} queries in a request; 512 takes 16")
    expected = 0 if longest == 1 else RIGHT_DOWN_CAUSAL
    require(sparse_mode == expected, f"up to {longest} queries need sparse mode {expected}")


def _lengths_of(running_sums: Sequence[int], total: int, name: str) -> list[int]:
    require(0 < len(running_sums) <= 4096, f"{len(running_sums)} requests, not 1 to 4096")
    starts = [0, *running_sums[:-1]]
    lengths = [end - start for start, end in zip(starts, running_sums, strict=True)]
    require(min(lengths) >= 0, f"{name} is no running sum")
    require(running_sums[-1] == total, f"{name} ends at {running_sums[-1]} of {total}")
    return lengths


def _check_table(
    block_table: torch.Tensor, num_keys: Sequence[int], *, block_size: int, num_blocks: int
) -> None:
    require_dtype("block_table", block_table, (torch.int32,))
    require(
        block_table.dim() == 2 and len(block_table) == len(num_keys),
        f"block_table is {tuple(block_table.shape)}, not one row for each of {len(num_keys)}",
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
    is_known = sparse_mode in {RIGHT_DOWN_CAUSAL, BAND}
    require(is_known, f"sparse mode {sparse_mode} is not emulated")
    require(mask is not None, f"sparse mode {sparse_mode} needs a mask")
    assert mask is not None
    require_dtype("atten_mask", mask, (torch.bool, torch.int8, torch.uint8))
    require(tuple(mask.shape) == (MASK_SIZE, MASK_SIZE), f"atten_mask is {tuple(mask.shape)}")
    unseen = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1)
    require(bool((mask.bool() == unseen).all()), "atten_mask is not one above the diagonal")
