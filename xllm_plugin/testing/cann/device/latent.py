"""The operators before latent attention, in plain torch; see `dense`.

The wheel's documentation lacks them.  Formulas and limits are those of torch_npu's pages
npu_kv_rmsnorm_rope_cache and npu_interleave_rope.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from xllm_plugin.testing.cann.device.contract import emulates, require, require_dtype
from xllm_plugin.testing.cann.device.dense import rms_norm

__all__: list[str] = []

HALVES = (torch.float16, torch.bfloat16)
LATENT_SIZE, ROPE_SIZE = 512, 64
PAGED = frozenset({"PA", "PA_BNSD"})


@emulates("npu_interleave_rope")
def interleave_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, N, S, 64] turned; of its pairs of neighbours the result has all first ones first.

    cos and sin are [B, 1, S or 1, 64].
    """
    require_dtype("x", x, HALVES)
    require(x.dim() == 4 and x.shape[3] == ROPE_SIZE, f"x is {tuple(x.shape)}, not [B, N, S, 64]")
    batch, _, length, _ = x.shape
    accepted = {(batch, 1, length, ROPE_SIZE), (batch, 1, 1, ROPE_SIZE)}
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        require_dtype(name, tensor, (x.dtype,))
        require(tensor.is_contiguous(), f"{name} is not contiguous")
        fits = tensor is x or tuple(tensor.shape) in accepted
        require(fits, f"{name} is {tuple(tensor.shape)}, not one of {accepted}")
    require(cos.shape == sin.shape, f"cos is {tuple(cos.shape)}, sin is {tuple(sin.shape)}")
    return _turned(x, cos, sin)


@emulates("npu_kv_rmsnorm_rope_cache")
def kv_rmsnorm_rope_cache(  # noqa: PLR0917  as the schema's
    kv: torch.Tensor,
    gamma: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    k_cache: torch.Tensor,
    ckv_cache: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    **not_emulated: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm the first 512 of kv [B, 1, S, 576], turn the last 64, write both to slots of two caches.

    Returns the caches, then ropes and latents, which are undefined unless `is_output_kv`.
    """
    require(not not_emulated, f"not emulated: {', '.join(not_emulated)}")
    require(cache_mode in PAGED, f"cache_mode {cache_mode!r} is not emulated, only {sorted(PAGED)}")
    _check_states(kv, gamma, cos, sin)
    _check_slots(kv, index, k_cache, ckv_cache)
    latents, ropes = kv.split([LATENT_SIZE, ROPE_SIZE], -1)
    latents, _ = rms_norm(latents, gamma, epsilon)
    ropes = _turned(ropes, cos, sin)
    for new, cache in ((ropes, k_cache), (latents, ckv_cache)):
        cache.view(-1, cache.shape[3])[index] = new.flatten(0, 2)
    if not is_output_kv:
        ropes, latents = (torch.full_like(one, math.nan) for one in (ropes, latents))
    return k_cache, ckv_cache, ropes, latents


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = x.float().unflatten(-1, (-1, 2))
    halves = torch.cat((pairs[..., 0], pairs[..., 1]), -1)
    crossed = torch.cat((-pairs[..., 1], pairs[..., 0]), -1)
    return (halves * cos.float() + crossed * sin.float()).to(x.dtype)


def _check_states(
    kv: torch.Tensor, gamma: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    require_dtype("kv", kv, HALVES)
    batch, heads, length, size = kv.shape if kv.dim() == 4 else (0,) * 4
    fits = heads == 1 and size == LATENT_SIZE + ROPE_SIZE
    require(fits, f"kv is {tuple(kv.shape)}, not [B, 1, S, 576]")
    expected = {
        "kv": tuple(kv.shape),
        "gamma": (LATENT_SIZE,),
        "cos": (batch, 1, length, ROPE_SIZE),
        "sin": (batch, 1, length, ROPE_SIZE),
    }
    for (name, shape), tensor in zip(expected.items(), (kv, gamma, cos, sin), strict=True):
        require_dtype(name, tensor, (kv.dtype,))
        require(tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}")
        require(tensor.is_contiguous(), f"{name} is not contiguous")


def _check_slots(
    kv: torch.Tensor, index: torch.Tensor, k_cache: torch.Tensor, ckv_cache: torch.Tensor
) -> None:
    batch, _, length, _ = kv.shape
    require_dtype("index", index, (torch.int64,))
    require(
        tuple(index.shape) == (batch * length,),
        f"index is {tuple(index.shape)}, not one slot for each of {batch * length} tokens",
    )
    caches = (("k_cache", k_cache, ROPE_SIZE), ("ckv_cache", ckv_cache, LATENT_SIZE))
    for name, cache, size in caches:
        require_dtype(name, cache, (kv.dtype,))
        fits = cache.dim() == 4 and cache.shape[:2] == k_cache.shape[:2]
        require(
            fits and tuple(cache.shape[2:]) == (1, size),
            f"{name} is {tuple(cache.shape)}, not [blocks, block, 1, {size}]",
        )
        require(cache.is_contiguous(), f"{name} is not contiguous")
    num_blocks, block_size = k_cache.shape[:2]
    needed = math.ceil(length / block_size) * batch
    require(num_blocks >= needed, f"{num_blocks} blocks, where {needed} are asked for")
    in_range = (index >= 0) & (index < num_blocks * block_size)
    require(bool(in_range.all()), "a slot is outside the cache")
    require(len(index.unique()) == len(index), "a slot is named twice")
