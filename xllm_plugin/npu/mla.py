"""Multi-head latent attention (DeepSeek): one latent vector a token is cached, and its rope.

Requests with one new token attend in the space of latents, in one call over all of them; the others
turn the latents of all their keys into keys and values first.  The operators want latents and ropes
as two caches without gaps, so a layer's memory is two regions::

    memory   L0 L1 L2 ... R0 R1 R2 ...      block b: latents L_b, ropes R_b

A block is therefore not one run of bytes, and connectors, which copy blocks, are refused.

Limits are those of npu_fused_infer_attention_score_v2 with a head size of 512 (torch_npu 2.13.0,
_op_plugin_docs.py): bfloat16, latents of 512, ropes of 64, a power of two of heads up to 128.  Keys
and values made of latents are padded to 128.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch_npu
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MLAAttentionImpl,
)
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from xllm_plugin.errors import InternalError, PlatformError
from xllm_plugin.npu.attention import RIGHT_DOWN_CAUSAL, PagedBackend, causal_mask, padded
from xllm_plugin.npu.limits import BLOCK_SIZE, HEAD_SIZE, LATENT_SIZE, ROPE_SIZE

__all__ = ["NpuLatentAttention", "NpuLatentBackend", "NpuLatentMetadata", "NpuLatentPrefill"]

NUM_HEADS = frozenset({1, 2, 4, 8, 16, 32, 64, 128})


class NpuLatentBackend(PagedBackend):
    """What vLLM asks about latent attention before it makes any."""

    @staticmethod
    def get_impl_cls() -> type[NpuLatentAttention]:
        """The layer's part."""
        return NpuLatentAttention

    @staticmethod
    def get_builder_cls() -> type[NpuLatentMetadataBuilder]:
        """The step's part."""
        return NpuLatentMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Of what is cached."""
        return [LATENT_SIZE + ROPE_SIZE]

    @classmethod
    def is_mla(cls) -> bool:
        """It is."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: a block is two runs of bytes."""
        return False


@dataclasses.dataclass(frozen=True, slots=True)
class Decodes:
    """Requests of one new token each, which come first in a step.

    Attributes:
        query_ends: 1, 2, 3 and so on.
        num_keys: keys of each, on the host.
        block_table: [requests, blocks] int32.
    """

    query_ends: list[int]
    num_keys: list[int]
    block_table: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Prefills:
    """The other requests.

    Attributes:
        query_ends: where each one's queries end, counted from the first of them, on the host.
        key_ends: the same of keys.
        key_slots: [keys] int64, where all their keys are cached.
        mask: [2048, 2048] int8, one above the diagonal.
    """

    query_ends: list[int]
    key_ends: list[int]
    key_slots: torch.Tensor
    mask: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class NpuLatentMetadata:
    """What the layers of one step share; names without our words are those vLLM's layer reads.

    Attributes:
        num_actual_tokens: queries in the step.
        num_decodes: requests in `decode`.
        num_decode_tokens: as many.
        num_prefills: requests in `prefill`.
        decode: None without any.
        prefill: None without any.
    """

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    decode: Decodes | None
    prefill: Prefills | None

    def lengths_of_decodes(self) -> list[int] | None:
        """Keys of each request if each has one new token, else None."""
        return self.decode.num_keys if self.decode is not None and self.prefill is None else None


class NpuLatentMetadataBuilder(AttentionMetadataBuilder[NpuLatentMetadata]):
    """Makes a step's metadata from vLLM's; lengths come from the host."""

    reorder_batch_threshold: int | None = 1

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.mask = causal_mask(device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> NpuLatentMetadata:
        """See vLLM's base class."""
        del common_prefix_len, fast_build
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common)
        lengths = common.seq_lens_cpu_upper_bound  # exact without asynchronous scheduling
        assert lengths is not None
        num_keys = lengths[: common.num_reqs].tolist()
        decode = prefill = None
        if num_decodes:
            table = common.block_table_tensor[:num_decodes].to(torch.int32)
            decode = Decodes(list(range(1, num_decodes + 1)), num_keys[:num_decodes], table)
        if num_prefills:
            starts = common.query_start_loc_cpu[num_decodes : common.num_reqs + 1]
            table = common.block_table_tensor[num_decodes : common.num_reqs]
            keys = lengths[num_decodes : common.num_reqs]
            prefill = Prefills(
                query_ends=(starts[1:] - starts[0]).tolist(),
                key_ends=keys.cumsum(0).tolist(),
                key_slots=slots_of(table, keys.tolist()),
                mask=self.mask,
            )
        return NpuLatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            num_prefills=num_prefills,
            decode=decode,
            prefill=prefill,
        )


def slots_of(block_table: torch.Tensor, num_keys: list[int]) -> torch.Tensor:
    """The slots of the first keys of each request, behind one another.

    Args:
        block_table: [requests, blocks].
        num_keys: of each request.

    Returns:
        [sum of num_keys] int64.
    """
    offsets = torch.arange(BLOCK_SIZE, device=block_table.device)
    parts = []
    for blocks, length in zip(block_table, num_keys, strict=True):
        used = blocks[: -(-length // BLOCK_SIZE)].long()
        parts.append((used.unsqueeze(1) * BLOCK_SIZE + offsets).flatten()[:length])
    return torch.cat(parts)


class NpuLatentAttention(MLAAttentionImpl[Any]):
    """Latent attention of one layer; see the module.

    `MLAAttention` of vLLM (seam "npu-latent-attention"), which owns the layer, multiplies one-token
    queries into the space of latents and their outputs out of it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *,
        kv_cache_dtype: str,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_b_proj: Any,
        sliding_window: int | None = None,
        kv_sharing_target_layer_name: str | None = None,
        indexer: object | None = None,
        **_: Any,
    ) -> None:
        unsupported = {
            f"latents of {kv_lora_rank}": kv_lora_rank != LATENT_SIZE,
            f"ropes of {qk_rope_head_dim}": qk_rope_head_dim != ROPE_SIZE,
            f"heads of {qk_nope_head_dim} and {v_head_dim}": max(qk_nope_head_dim, v_head_dim)
            > HEAD_SIZE,
            f"{num_heads} heads": num_heads not in NUM_HEADS,
            "a sliding window": sliding_window is not None,
            "layers that share a KV cache": kv_sharing_target_layer_name is not None,
            "sparse attention": indexer is not None,
        }
        asked = [what for what, is_asked in unsupported.items() if is_asked]
        if asked:
            raise PlatformError(
                f"latent attention on the NPU family does not do {' or '.join(asked)}; it takes "
                "latents of 512, ropes of 64, heads of at most 128, and a power of two of heads "
                "up to 128."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.nope_size = qk_nope_head_dim
        self.value_size = v_head_dim
        self.kv_b_proj = kv_b_proj

    def do_kv_cache_update(  # noqa: PLR0917  as vLLM's
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Write the step's latents [tokens, 512] and ropes [tokens, 1, 64].

        For layers that do not write them by themselves (`npu/mla_layer.py`).
        """
        del kv_cache_dtype, k_scale
        if get_forward_context().attn_metadata is None:  # memory is measured: nothing has a slot
            return
        latents, ropes = regions_of(kv_cache)
        torch_npu.npu_scatter_pa_kv_cache(
            kv_c_normed.unsqueeze(1).contiguous(),
            k_pe.contiguous(),
            latents,
            ropes,
            slot_mapping,
            cache_mode="Norm",
        )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: NpuLatentMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One-token requests: `q` is [requests, heads, 512] and [requests, heads, 64].

        Returns:
            [requests, heads, 512] in the space of latents, and None.
        """
        del layer
        query, rope = q
        latents, ropes = (region.flatten(2) for region in regions_of(kv_c_and_k_pe_cache))
        decode = attn_metadata.decode
        assert decode is not None
        attended, _ = torch_npu.npu_fused_infer_attention_score_v2(
            query.contiguous(),
            latents,
            latents,
            query_rope=rope.contiguous(),
            key_rope=ropes,
            actual_seq_qlen=decode.query_ends,
            actual_seq_kvlen=decode.num_keys,
            block_table=decode.block_table,
            num_query_heads=self.num_heads,
            num_key_value_heads=1,
            softmax_scale=self.scale,
            input_layout="TND",
            block_size=BLOCK_SIZE,
        )
        return attended, None

    def forward_mha(  # noqa: PLR0917  as vLLM's
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: NpuLatentMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """The other requests, over all their keys, those of earlier steps among them.

        Args:
            q: [tokens, heads, nope + rope].
            kv_c_normed: not needed: it has been written.
            k_pe: not needed.
            kv_c_and_k_pe_cache: of the layer.
            attn_metadata: of the step.
            k_scale: not needed.
            output: [tokens, heads * value size], written.
            output_scale: not supported.
        """
        del kv_c_normed, k_pe, k_scale
        assert output_scale is None
        prefill = attn_metadata.prefill
        assert prefill is not None
        latents, ropes = regions_of(kv_c_and_k_pe_cache)
        latents = latents.view(-1, LATENT_SIZE)[prefill.key_slots]
        rope = ropes.view(-1, 1, ROPE_SIZE)[prefill.key_slots]
        both = self.kv_b_proj(latents)[0].view(-1, self.num_heads, self.nope_size + self.value_size)
        key, value = both.split([self.nope_size, self.value_size], -1)
        query, query_rope = q.split([self.nope_size, ROPE_SIZE], -1)
        attended, _ = torch_npu.npu_fused_infer_attention_score_v2(
            padded(query, self.nope_size),
            padded(key, self.nope_size),
            padded(value, self.value_size),
            query_rope=query_rope.contiguous(),
            key_rope=rope.expand(-1, self.num_heads, -1).contiguous(),
            atten_mask=prefill.mask,
            actual_seq_qlen=prefill.query_ends,
            actual_seq_kvlen=prefill.key_ends,
            num_query_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            softmax_scale=self.scale,
            input_layout="TND",
            sparse_mode=RIGHT_DOWN_CAUSAL,
        )
        output.copy_(attended[..., : self.value_size].flatten(1))


def regions_of(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches of latents and of ropes in a layer's memory.

    Args:
        kv_cache: [blocks, 128, 576], contiguous.

    Returns:
        [blocks, 128, 1, 512] and [blocks, 128, 1, 64], contiguous.
    """
    num_blocks, memory = len(kv_cache), kv_cache.view(-1)
    latents, ropes = memory.split(
        [num_blocks * BLOCK_SIZE * LATENT_SIZE, num_blocks * BLOCK_SIZE * ROPE_SIZE]
    )
    return (
        latents.view(num_blocks, BLOCK_SIZE, 1, LATENT_SIZE),
        ropes.view(num_blocks, BLOCK_SIZE, 1, ROPE_SIZE),
    )


class NpuLatentPrefill(MLAPrefillBackend):
    """What `MLAAttention` makes for each layer; `NpuLatentAttention` attends without it."""

    @staticmethod
    def get_name() -> str:
        """As in logs."""
        return "XLLM_NPU_LATENT"

    def run_prefill_new_tokens(self, *_: Any, **__: Any) -> Any:
        """Never called: see the class."""
        raise InternalError("NpuLatentAttention attends by itself; please report this")

    def run_prefill_context_chunk(self, *_: Any, **__: Any) -> Any:
        """Never called: see the class."""
        raise InternalError("NpuLatentAttention attends by itself; please report this")
