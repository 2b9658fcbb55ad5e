"""The layer around latent attention: what goes into the cache is made and written by one operator.

torch_npu has three that do so.  npu_kv_rmsnorm_rope_cache norms latents, turns ropes and writes
both; it is the one that fits here.  npu_kv_rmsnorm_rope_cache_v2 is the same with its writes in the
schema, which a compiler would need, but torch_npu documents it for Ascend 950 alone.
npu_mla_prolog_v3 also multiplies the projections, but for hidden sizes of 6144, 7168 or 7680 and
query ranks of 1536 alone: models of several hundred billion weights, which no single device holds.

The operators take neighbours as pairs and leave all first ones before all second ones.  Scores do
not mind, as queries are turned the same way; the cached ropes are in another order than vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

from xllm_plugin.npu.limits import LATENT_SIZE, ROPE_SIZE
from xllm_plugin.npu.mla import regions_of

__all__ = ["NpuLatentLayer", "angles_of"]

ANGLES = "xllm_npu_angles"


@MultiHeadLatentAttentionWrapper.register_oot(name="MultiHeadLatentAttentionWrapper")
class NpuLatentLayer(MultiHeadLatentAttentionWrapper):
    """vLLM's layer in the operators' terms; one whose sizes or parts they lack runs as vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_fused = fits_operators(self)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        llama_4_scaling: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See vLLM's layer.

        Args:
            positions: [tokens].
            hidden_states: [tokens, hidden].
            llama_4_scaling: [tokens, 1, 1] factors of queries, or None.

        Returns:
            [tokens, hidden].
        """
        if not self.is_fused:
            return super().forward(positions, hidden_states, llama_4_scaling)
        query, latent = self.project(hidden_states)
        cos, sin = angles_of(self.rotary_emb, positions, query)
        rope = query[..., self.qk_nope_head_dim :]
        turned = torch_npu.npu_interleave_rope(rope.unsqueeze(2).contiguous(), cos, sin)
        rope.copy_(turned.squeeze(2))
        if llama_4_scaling is not None:
            query *= llama_4_scaling
        metadata = get_forward_context().attn_metadata
        if metadata is not None:  # else memory is measured: nothing has a slot
            self.write(latent, cos, sin)
            metadata = metadata[self.mla_attn.layer_name]
        output = query.new_empty(len(query), self.num_heads * self.v_head_dim)
        # Not `mla_attn(...)`, which would write the cache.
        self.mla_attn.forward_impl(
            query,
            latent[:, :LATENT_SIZE],
            latent[:, None, LATENT_SIZE:],
            self.mla_attn.kv_cache,
            metadata,
            output=output,
        )
        return self.o_proj(output)[0]

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [tokens, heads, nope + rope]; latents and ropes, untouched, [tokens, 576]."""
        if self.q_lora_rank is None:
            latent = self.kv_a_proj_with_mqa(hidden_states)[0]
            query = self.q_proj(hidden_states)[0]
        else:
            both = self.fused_qkv_a_proj(hidden_states)[0]
            low_rank, latent = both.split([self.q_lora_rank, LATENT_SIZE + ROPE_SIZE], -1)
            query = self.q_b_proj(self.q_a_layernorm(low_rank))[0]
        return query.view(-1, self.num_heads, self.qk_head_dim), latent.contiguous()

    def write(self, latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Norm latents, turn ropes, and put them into this layer's cache at the step's slots."""
        name, norm = self.mla_attn.layer_name, self.kv_a_layernorm
        latents, ropes = regions_of(self.mla_attn.kv_cache)
        one_request = (1, 1, len(latent), -1)  # as many blocks are asked for as its tokens fill
        # What it returns is what it has written, which its schema does not say.
        torch_npu.npu_kv_rmsnorm_rope_cache(
            latent.view(one_request),
            norm.weight,
            cos.view(one_request),
            sin.view(one_request),
            get_forward_context().slot_mapping[name],
            ropes,
            latents,
            epsilon=norm.variance_epsilon,
            cache_mode="PA_BNSD",
        )


def fits_operators(layer: MultiHeadLatentAttentionWrapper) -> bool:
    """Whether a layer has the operators' sizes and no part that its forward here lacks."""
    rotary = layer.rotary_emb
    has_ropes = (
        rotary is not None
        and not rotary.is_neox_style
        and rotary.head_size == rotary.rotary_dim == ROPE_SIZE
    )
    has_more = layer.g_proj is not None or layer.dcp_q_replicate or layer.is_sparse
    return has_ropes and not has_more and layer.kv_lora_rank == LATENT_SIZE


def angles_of(
    rotary: Any, positions: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a step's positions, made by its first layer and kept for the others.

    Args:
        rotary: of vLLM; each row of its cache has 32 cosines and then 32 sines.
        positions: [tokens].
        like: of the type wanted.

    Returns:
        Two of [tokens, 1, 1, 64], the halves alike.
    """
    made = get_forward_context().additional_kwargs
    key = f"{ANGLES} {id(rotary)}"
    if key not in made:
        halves = rotary._match_cos_sin_cache_dtype(like)[positions].chunk(2, -1)  # noqa: SLF001
        made[key] = [torch.cat((half, half), -1).view(-1, 1, 1, ROPE_SIZE) for half in halves]
    cos, sin = made[key]
    return cos, sin
