"""Which decoder layers run as native code, and one of them around vLLM's attention."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from xllm_plugin.cpu.native.library import DecoderLayer, Heads, Kernels
from xllm_plugin.cpu.native.linear import BLOCK, PackedLinear
from xllm_plugin.cpu.native.scratch import Scratch

__all__ = [
    "LAYER_CLASSES",
    "NativeLayer",
    "UnsupportedLayerError",
    "check",
    "class_path",
    "is_plain",
    "layer_struct",
    "linears_of",
]

# Their `forward` is: norm, qkv, (norm of heads,) rotation, attention, projection, norm, gated
# feed-forward.  By name: importing a model's module costs time that only its users should pay.
LAYER_CLASSES = frozenset(
    {
        "vllm.model_executor.models.llama.LlamaDecoderLayer",
        "vllm.model_executor.models.qwen2.Qwen2DecoderLayer",
        "vllm.model_executor.models.qwen3.Qwen3DecoderLayer",
    }
)
LANES = 16


class UnsupportedLayerError(Exception):
    """A layer has something that the kernels do not do; says what."""


class NativeLayer:
    """One decoder layer around vLLM's attention: stands in for its module's `forward`."""

    def __init__(self, kernels: Kernels, module: Any, scratch: Scratch) -> None:
        attention = module.self_attn
        self._kernels = kernels
        self._scratch = scratch
        self._attn = attention.attn
        self._name: str = attention.attn.layer_name
        self._module = module
        self._struct = layer_struct(module)
        # The struct has their addresses alone, and vLLM may give the modules other ones.
        self._linears = linears_of(module)
        self._layer = ctypes.byref(self._struct)
        self._space = ctypes.byref(scratch.struct)

    def __call__(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer; see vllm/model_executor/models/llama.py, LlamaDecoderLayer.forward.

        Args:
            positions: int64 [num_tokens].
            hidden_states: bfloat16 [num_tokens, hidden]; overwritten unless residual is None.
            residual: the same shape, or None in the first layer; overwritten.

        Returns:
            The new hidden states and residual.
        """
        num_tokens = hidden_states.shape[0]
        self._scratch.resize(num_tokens)
        if residual is None:
            # The model's embeddings may be a buffer of the runner's: they are left as they are.
            embedded = hidden_states.contiguous()
            source, residual_in = embedded.data_ptr(), None
            residual, hidden_states = torch.empty_like(embedded), torch.empty_like(embedded)
        else:
            source, residual_in = hidden_states.data_ptr(), residual.data_ptr()
        self._kernels.before_attention(
            self._layer,
            self._space,
            source,
            residual_in,
            residual.data_ptr(),
            positions.data_ptr(),
            num_tokens,
        )
        self._attend(num_tokens)
        self._kernels.after_attention(
            self._layer,
            self._space,
            residual.data_ptr(),
            hidden_states.data_ptr(),
            num_tokens,
        )
        return hidden_states, residual

    def _attend(self, num_tokens: int) -> None:
        """Write keys and values into the cache, and the attention's output into the scratch."""
        scratch, heads, attn = self._scratch, self._struct.heads, self._attn
        output = scratch.attention[:num_tokens].view(-1, heads.num_heads, heads.head_size)
        context = get_forward_context()
        metadata = context.attn_metadata
        if metadata is None:
            # A run without a cache, to measure how much memory is left for one.
            output.zero_()
            return
        qkv = scratch.qkv[:num_tokens].view(num_tokens, -1, heads.head_size)
        query, key, value = qkv.split(
            (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads), dim=1
        )
        slots = context.slot_mapping[self._name]
        attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, slots)
        attn.impl.forward(
            attn, query, key, value, attn.kv_cache, metadata[self._name], output=output
        )


def class_path(module: torch.nn.Module) -> str:
    """The module's class, as in LAYER_CLASSES."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_plain(norm: Any) -> bool:
    """Whether a norm is over the whole last dimension, in bfloat16, with a weight."""
    return (
        type(norm) is RMSNorm
        and norm.has_weight
        and norm.variance_size_override is None
        and norm.weight.dtype == torch.bfloat16
        and norm.weight.numel() % LANES == 0
    )


def check(module: Any) -> None:
    """Compare a layer with what the kernels do.

    Raises:
        UnsupportedLayerError: they do something else.
    """
    attention, mlp, linears = module.self_attn, module.mlp, linear_modules(module)
    are_packed = all(isinstance(packed, PackedLinear) for packed in linears_of(module))
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    rotary, attn = attention.rotary_emb, attention.attn
    known = {
        "its linear layers are not of packed bfloat16 weights": are_packed,
        "its projections have a bias that is added elsewhere": not any(
            linear.skip_bias_add for linear in linears
        ),
        "its ranks share the work": all(linear.tp_size == 1 for linear in linears),
        "its norm is not a plain RMSNorm": all(is_plain(norm) for norm in norms),
        "its activation is not SwiGLU": type(mlp.act_fn) is SiluAndMul,
        "its rotary embedding is not a plain one": isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_cpu is RotaryEmbedding.forward_cpu
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and rotary.head_size == attn.head_size,
        "its attention is not vLLM's own for the CPU": type(attn.impl) is CPUAttentionBackendImpl
        and attn.attn_type == AttentionType.DECODER
        and attn.kv_sharing_target_layer_name is None
        and attn.query_quant is None
        and attn.head_size_v == attn.head_size
        and attn.head_size % LANES == 0,
        "its feed-forward is not a multiple of 32 wide": are_packed
        and mlp.down_proj.cpu_linear.struct.k % BLOCK == 0,
    }
    for reason, holds in known.items():
        if not holds:
            raise UnsupportedLayerError(f"{type(module).__name__}: {reason}")


def linear_modules(module: Any) -> tuple[Any, ...]:
    """The layer's four linear modules, in the order of `DecoderLayer`."""
    attention, mlp = module.self_attn, module.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def linears_of(module: Any) -> list[Any]:
    """What multiplies in each of them."""
    return [getattr(linear, "cpu_linear", None) for linear in linear_modules(module)]


def layer_struct(module: Any) -> DecoderLayer:
    """Describe a checked layer to the kernels, by the addresses of what its module holds."""
    attention, attn = module.self_attn, module.self_attn.attn
    rotary = attention.rotary_emb
    # Held by the rotary module from now on, in the type that it is used in.
    cos_sin = rotary._match_cos_sin_cache_dtype(torch.empty(0, dtype=torch.bfloat16))  # noqa: SLF001
    heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return DecoderLayer(
        *(linear.struct for linear in linears_of(module)),
        module.input_layernorm.weight.data_ptr(),
        module.post_attention_layernorm.weight.data_ptr(),
        *(None if norm is None else norm.weight.data_ptr() for norm in heads),
        cos_sin.data_ptr(),
        None,
        module.input_layernorm.variance_epsilon,
        Heads(attn.num_heads, attn.num_kv_heads, attn.head_size, attn.impl.scale),
        rotary.rotary_dim,
    )
