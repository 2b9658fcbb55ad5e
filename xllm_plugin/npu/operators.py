"""vLLM's layers whose work is one operator of torch_npu, put in their place out of tree."""

from __future__ import annotations

import torch
import torch_npu
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

__all__ = ["NpuRMSNorm", "NpuRotaryEmbedding", "NpuSiluAndMul"]

ROTARY_MULTIPLE = 32
"""What npu_mrope asks of the rotated dimensions in bfloat16."""


@CustomOp.register_oot(name="RMSNorm")
class NpuRMSNorm(RMSNorm):
    """RMS norm, with the residual's addition where there is one."""

    def forward_oot(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See vLLM's RMSNorm."""
        if not self.has_weight or self.variance_size_override is not None:
            return self.forward_native(x, residual)
        if residual is None:
            return torch_npu.npu_rms_norm(x, self.weight, epsilon=self.variance_epsilon)[0]
        y, _, total = torch_npu.npu_add_rms_norm(
            x, residual, self.weight, epsilon=self.variance_epsilon
        )
        return y, total


@CustomOp.register_oot(name="SiluAndMul")
class NpuSiluAndMul(SiluAndMul):
    """SwiGLU."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        """See vLLM's SiluAndMul."""
        return torch_npu.npu_swiglu(x, dim=-1)


@CustomOp.register_oot(name="RotaryEmbedding")
class NpuRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding of queries and keys in one call, the angles looked up by the device."""

    def forward_oot(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See vLLM's RotaryEmbedding."""
        if key is None or self.rotary_dim % ROTARY_MULTIPLE:
            return self.forward_native(positions, query, key)
        num_tokens = positions.numel()
        turned_query, turned_key = torch_npu.npu_mrope(
            positions.flatten(),
            query.reshape(num_tokens, -1),
            key.reshape(num_tokens, -1),
            self._match_cos_sin_cache_dtype(query),
            self.head_size,
            mrope_section=[0, 0, 0],
            rotary_mode="half" if self.is_neox_style else "interleave",
        )
        return turned_query.view(query.shape), turned_key.view(key.shape)
