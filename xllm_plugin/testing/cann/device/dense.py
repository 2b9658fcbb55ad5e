"""The operators of a dense decoder but for attention, in plain torch.

Formulas and limits are those of the wheel's documentation (torch_npu/_op_plugin_docs.py), for Atlas
A2 and A3.  What the documentation does not allow is refused, and so is what is not emulated: an
operator that works here is called as a device asks for.  Sums are in float32, rounded once at the
end; a device's kernels round elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm_plugin.testing.cann.device.contract import FLOATS, emulates, require, require_dtype

__all__: list[str] = []


@emulates("npu_rms_norm")
def rms_norm(
    input: torch.Tensor,  # noqa: A002  the schema's name
    gamma: torch.Tensor,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x / rms(x) * gamma over the dimensions of gamma, and 1 / rms in float32."""
    require_dtype("input", input, FLOATS)
    require_dtype("gamma", gamma, (input.dtype,))
    require(2 <= input.dim() <= 8, f"input has {input.dim()} dimensions, not 2 to 8")
    sizes = tuple(input.shape[input.dim() - gamma.dim() :])
    require(tuple(gamma.shape) == sizes, f"gamma is {tuple(gamma.shape)}, input ends in {sizes}")
    x = input.float()
    axes = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


@emulates("npu_add_rms_norm")
def add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x = x1 + x2 in the inputs' dtype, and its `rms_norm`; returns (y, rstd, x)."""
    require_dtype("x2", x2, (x1.dtype,))
    require(x1.shape == x2.shape, f"x1 is {tuple(x1.shape)}, x2 is {tuple(x2.shape)}")
    x = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = rms_norm(x, gamma, epsilon)
    return y, rstd, x


@emulates("npu_swiglu")
def swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:  # noqa: A002
    """A * sigmoid(A) * B, the halves of the input along `dim`."""
    require_dtype("input", input, FLOATS)
    require(input.shape[dim] % 2 == 0, f"{tuple(input.shape)} has no two halves along {dim}")
    a, b = input.float().chunk(2, dim)
    return (a * torch.sigmoid(a) * b).to(input.dtype)


@emulates("npu_mrope")
def mrope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of 1-D positions; the cache holds cosines and then sines in each row."""
    require(not any(mrope_section or ()), "several sections are not emulated")
    require(cache_mode == "default", f"cache_mode {cache_mode!r} is not emulated")
    require(rotary_mode in {"half", "interleave"}, f"rotary_mode {rotary_mode!r} is unknown")
    require_dtype("positions", positions, (torch.int32, torch.int64))
    require_dtype("query", query, FLOATS)
    for name, tensor in (("key", key), ("cos_sin_cache", cos_sin_cache)):
        require_dtype(name, tensor, (query.dtype,))
    require(positions.dim() == 1, f"positions of {positions.dim()} dimensions are not emulated")
    rotary_dim = cos_sin_cache.shape[-1]
    multiple = 16 if query.dtype == torch.float32 else 32
    require(rotary_dim % multiple == 0, f"rotary_dim {rotary_dim} is no multiple of {multiple}")
    for name, tensor in (("query", query), ("key", key)):
        fits = tensor.dim() == 2 and tensor.shape[0] == len(positions)
        require(
            fits and tensor.shape[1] % head_size == 0,
            f"{name} is {tuple(tensor.shape)}, not [{len(positions)}, heads * {head_size}]",
        )
    if len(positions):
        low, high = int(positions.min()), int(positions.max())
        require(low >= 0 and high < len(cos_sin_cache), f"positions {low} to {high} are not cached")
    cos, sin = cos_sin_cache[positions.long()].float().unsqueeze(1).chunk(2, -1)
    return _rotated(query, head_size, cos, sin, rotary_mode), _rotated(
        key, head_size, cos, sin, rotary_mode
    )


def _rotated(
    x: torch.Tensor, head_size: int, cos: torch.Tensor, sin: torch.Tensor, mode: str | None
) -> torch.Tensor:
    heads = x.reshape(len(x), -1, head_size).float()
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    if mode == "half":
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, rest), -1).reshape(x.shape).to(x.dtype)


@emulates("npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    compress_lens: torch.Tensor | None = None,
    compress_seq_offsets: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Write keys and values [tokens, heads, dim] to slots of caches [blocks, block, heads, dim]."""
    require(cache_mode in {None, "Norm"}, f"cache_mode {cache_mode!r} is not emulated, only 'Norm'")
    extra = (compress_lens, compress_seq_offsets, seq_lens)
    require(all(one is None for one in extra), "compression is not emulated")
    require_dtype("slot_mapping", slot_mapping, (torch.int32, torch.int64))
    for name, tensor in {
        "key": key,
        "value": value,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": slot_mapping,
    }.items():
        require(tensor.is_contiguous(), f"{name} is not contiguous")
    require(tuple(slot_mapping.shape) == key.shape[:1], "slot_mapping is not one slot a token")
    require(key.shape[:2] == value.shape[:2], "key and value differ in tokens or heads")
    for new, cache in ((key, key_cache), (value, value_cache)):
        require_dtype("cache", cache, (key.dtype,))
        require(new.dim() == 3 and cache.dim() == 4, "not [T, N, D] into [B, S, N, D]")
        require(new.shape[1:] == cache.shape[2:], f"{tuple(new.shape)} into {tuple(cache.shape)}")
    slots = slot_mapping.long()
    in_range = (slots >= 0) & (slots < key_cache.shape[0] * key_cache.shape[1])
    require(bool(in_range.all()), "a slot is outside the cache")
    require(len(slots.unique()) == len(slots), "a slot is named twice")
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slots] = new
