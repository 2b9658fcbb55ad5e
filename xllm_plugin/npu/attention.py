"""Paged attention: prompts, chunks and decodes of one step in one call of torch_npu.

A block of vLLM's cache holds keys and values.  torch_npu wants them as two caches without gaps, and
one table for both.  Each block is therefore laid out as a page of keys and a page of values, and
the caches are two views of the same pages, one page apart::

    pages    K0 V0 K1 V1 K2 V2 ...       block b: keys at page 2b, values at page 2b + 1
    keys     K0 V0 K1 V1 K2 ...          page 2b is K of b
    values      V0 K1 V1 K2 V2 ...       page 2b is V of b

So a block stays one run of bytes, which is what copies and connectors of vLLM take it for.

Limits are those of npu_fused_infer_attention_score_v2 with layout TND (torch_npu 2.13.0,
_op_plugin_docs.py): bfloat16, a head size of 128 (smaller heads are padded with zeros, which
changes no score and no output), block sizes that are multiples of 128, below 2**31 elements.
A sliding window is a band of the mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch_npu
from torch.nn import functional
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from xllm_plugin.errors import PlatformError
from xllm_plugin.npu.limits import BLOCK_SIZE, HEAD_SIZE

__all__ = [
    "NpuAttention",
    "NpuAttentionBackend",
    "NpuAttentionMetadata",
    "NpuMetadataBuilder",
    "PagedBackend",
]

MAX_ELEMENTS = 2**31 - 1
MASK_SIZE = 2048
"""Of the compressed causal mask, whatever the lengths."""

RIGHT_DOWN_CAUSAL, BAND = 3, 4
"""Sparse modes: a request's last query sees all its keys; or as many as are named before it."""

UNLIMITED = 2**31 - 1
"""Keys named where the sparse mode is not `BAND`: the operator's default."""


class PagedBackend(AttentionBackend):
    """What both kinds of attention, this one and the latent one, tell vLLM of their cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's table for backends from elsewhere."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens a page."""
        del kv_cache_spec
        return [BLOCK_SIZE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers, then blocks: a layer's blocks are one run of bytes."""
        return (KVCacheLayout.LBNHC,)


class NpuAttentionBackend(PagedBackend):
    """What vLLM asks about attention before it makes any."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[NpuAttention]:
        """The layer's part."""
        return NpuAttention

    @staticmethod
    def get_builder_cls() -> type[NpuMetadataBuilder]:
        """The step's part."""
        return NpuMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Smaller heads are padded."""
        return head_size <= HEAD_SIZE

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """As a band of the mask."""
        return True

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give the cache padded heads."""
        return dataclasses.replace(spec, head_size=HEAD_SIZE, head_size_v=HEAD_SIZE)


@dataclasses.dataclass(frozen=True, slots=True)
class NpuAttentionMetadata:
    """What the layers of one step share.

    Attributes:
        num_tokens: queries in the step.
        query_ends: where each request's queries end, on the host.
        num_keys: keys of each request, on the host.
        page_table: [requests, blocks] int32, the pages of keys.
        slots: [num_tokens] int64, where new keys go.
        mask: [2048, 2048] int8, one above the diagonal.
    """

    num_tokens: int
    query_ends: list[int]
    num_keys: list[int]
    page_table: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor

    def lengths_of_decodes(self) -> list[int] | None:
        """Keys of each request if each has one new token, else None."""
        is_decode = self.query_ends == list(range(1, self.num_tokens + 1))
        return self.num_keys if is_decode else None


class NpuMetadataBuilder(AttentionMetadataBuilder[NpuAttentionMetadata]):
    """Makes a step's metadata from vLLM's."""

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
    ) -> NpuAttentionMetadata:
        """See vLLM's base class; lengths come from the host, so nothing waits for the device."""
        del common_prefix_len, fast_build
        common = common_attn_metadata
        num_reqs, num_tokens = common.num_reqs, common.num_actual_tokens
        num_keys = common.seq_lens_cpu_upper_bound  # exact without asynchronous scheduling
        assert num_keys is not None
        return NpuAttentionMetadata(
            num_tokens=num_tokens,
            query_ends=common.query_start_loc_cpu[1 : num_reqs + 1].tolist(),
            num_keys=num_keys[:num_reqs].tolist(),
            page_table=(common.block_table_tensor[:num_reqs] * 2).to(torch.int32),
            slots=slots_of_keys(common.slot_mapping[:num_tokens]),
            mask=self.mask,
        )


def causal_mask(device: torch.device) -> torch.Tensor:
    """What the operator takes for any lengths: [2048, 2048] int8, one above the diagonal."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8, device=device).triu_(1)


def slots_of_keys(slots: torch.Tensor) -> torch.Tensor:
    """From slots in blocks to slots in pages: block b's keys are page 2b."""
    return slots + slots // BLOCK_SIZE * BLOCK_SIZE


class NpuAttention(AttentionImpl[Any]):
    """Attention of one layer; see the module."""

    def __init__(  # noqa: PLR0917  as vLLM's
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        unsupported = {
            "alibi slopes": alibi_slopes,
            "a soft cap of the logits": logits_soft_cap,
            "layers that share a KV cache": kv_sharing_target_layer_name,
        }
        asked = [name for name, value in unsupported.items() if value]
        if asked or attn_type != AttentionType.DECODER:
            raise PlatformError(
                f"attention on the NPU family does not do {' or '.join(asked) or attn_type}; it "
                "does causal decoder attention, full or in a sliding window."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        # Of the keys before a query, itself not counted.
        self.window = None if sliding_window is None else sliding_window - 1

    def forward(  # noqa: PLR0917  as vLLM's
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: NpuAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write new keys and values, then attend.

        Args:
            layer: not needed.
            query: [tokens or more, num_heads, head_size].
            key: [tokens or more, num_kv_heads, head_size].
            value: as `key`.
            kv_cache: [blocks, num_kv_heads, 128, 2 * 128], laid out as the module says.
            attn_metadata: None while memory is measured.
            output: [tokens or more, num_heads, head_size], written.
            output_scale: not supported.
            output_block_scale: not supported.
        """
        del layer
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None:
            return output.zero_()
        num_tokens = attn_metadata.num_tokens
        query, key, value = (
            padded(states[:num_tokens], self.head_size) for states in (query, key, value)
        )
        keys, values = pages_of(kv_cache)
        torch_npu.npu_scatter_pa_kv_cache(
            key, value, keys, values, attn_metadata.slots, cache_mode="Norm"
        )
        query_ends = attn_metadata.query_ends
        is_doubled = self.window is not None and attn_metadata.lengths_of_decodes() is not None
        if is_doubled:
            # Where every request has one query the operator looks at no band (its documentation
            # of sparse_mode), so each is given twice, and the second is the one at the end.
            query = query.repeat_interleave(2, 0)
            query_ends = [2 * end for end in query_ends]
        attended, _ = torch_npu.npu_fused_infer_attention_score_v2(
            query,
            keys.flatten(2),
            values.flatten(2),
            atten_mask=attn_metadata.mask,
            actual_seq_qlen=query_ends,
            actual_seq_kvlen=attn_metadata.num_keys,
            block_table=attn_metadata.page_table,
            num_query_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            softmax_scale=self.scale,
            input_layout="TND",
            sparse_mode=RIGHT_DOWN_CAUSAL if self.window is None else BAND,
            pre_tokens=UNLIMITED if self.window is None else self.window,
            next_tokens=UNLIMITED if self.window is None else 0,
            block_size=BLOCK_SIZE,
        )
        if is_doubled:
            attended = attended[1::2]
        output[:num_tokens].copy_(attended[..., : self.head_size].view_as(output[:num_tokens]))
        return output


def padded(states: torch.Tensor, head_size: int) -> torch.Tensor:
    """States of any shape of [tokens, heads * head_size] as contiguous [tokens, heads, 128]."""
    states = states.reshape(len(states), -1, head_size)
    return functional.pad(states, (0, HEAD_SIZE - head_size)).contiguous()


def pages_of(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches of keys and values over a layer's blocks.

    Args:
        kv_cache: [blocks, heads, 128, 2 * 128] of vLLM, physically [blocks, 128, heads, 2 * 128].

    Returns:
        Two contiguous views [2 * blocks - 1, 128, heads, 128].

    Raises:
        PlatformError: they have more elements than the device's operators count to.
    """
    num_blocks, num_heads = kv_cache.shape[:2]
    pages = kv_cache.transpose(1, 2).view(2 * num_blocks, BLOCK_SIZE, num_heads, HEAD_SIZE)
    if pages[1:].numel() > MAX_ELEMENTS:
        most = MAX_ELEMENTS // (2 * BLOCK_SIZE * num_heads * HEAD_SIZE)
        raise PlatformError(
            f"the KV cache has {num_blocks} blocks; attention on Ascend devices takes at most "
            f"{most} with {num_heads} key heads. Give --num-gpu-blocks-override {most}."
        )
    return pages[:-1], pages[1:]
