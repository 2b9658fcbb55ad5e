"""A model's decoder layers as native code: all in one call where that can be, else one by one."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm

from xllm_plugin.cpu.native.layers import (
    LAYER_CLASSES,
    NativeLayer,
    UnsupportedLayerError,
    check,
    class_path,
    is_plain,
    layer_struct,
    linears_of,
)
from xllm_plugin.cpu.native.library import Batch, DecoderLayer, Kernels
from xllm_plugin.cpu.native.linear import BLOCK
from xllm_plugin.cpu.native.scratch import Scratch
from xllm_plugin.errors import InternalError

__all__ = ["NativeModel", "NativeNorm", "full_refusal", "take_over"]

# Their `forward` is: embeddings, the layers, the last norm.  By name, as LAYER_CLASSES.
MODEL_CLASSES = frozenset(
    {
        "vllm.model_executor.models.llama.LlamaModel",
        "vllm.model_executor.models.qwen2.Qwen2Model",
        "vllm.model_executor.models.qwen3.Qwen3Model",
    }
)
MAX_HEAD_SIZE = 256  # kMaxHead of attention.h
MAX_GROUP = 96  # kQueryRows
INDEX_DTYPES = {
    "query_start_loc": torch.int32,
    "seq_lens": torch.int32,
    "block_table": torch.int32,
    "slot_mapping": torch.int64,
}


class NativeModel:
    """All layers with their attention, and the last norm: stands in for its module's `forward`.

    The KV cache is vLLM's memory, in the kernels' own order (attention.h): nothing else can read
    it, so either every layer of a model runs here or none does.
    """

    def __init__(self, kernels: Kernels, module: Any) -> None:
        layers = list(module.layers)
        self._kernels = kernels
        self._module = module
        self._layers = (DecoderLayer * len(layers))(*map(layer_struct, layers))
        # The structs have their addresses alone, and vLLM may give the modules other ones.
        self._linears = [linears_of(layer) for layer in layers]
        self._norm = module.norm.weight
        self._attentions = [layer.self_attn.attn for layer in layers]
        self._scratch = Scratch(self._layers[0])
        self._space = ctypes.byref(self._scratch.struct)

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the model; see vllm/model_executor/models/llama.py, LlamaModel.forward.

        Args:
            input_ids: int32 [num_tokens], unless there are `inputs_embeds`.
            positions: int64 [num_tokens].
            intermediate_tensors: of another pipeline stage; there is none.
            inputs_embeds: bfloat16 [num_tokens, hidden].

        Returns:
            The normed hidden states, bfloat16 [num_tokens, hidden].
        """
        del intermediate_tensors
        embedded = (
            self._module.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        )
        embedded, positions = embedded.contiguous(), positions.contiguous()
        num_tokens = embedded.shape[0]
        self._scratch.resize(num_tokens)
        normed = torch.empty_like(embedded)
        self._kernels.forward(
            self._layers,
            len(self._layers),
            self._norm.data_ptr(),
            ctypes.byref(self._batch(positions, num_tokens)),
            self._space,
            embedded.data_ptr(),
            self._scratch.residual.data_ptr(),
            self._scratch.hidden.data_ptr(),
            normed.data_ptr(),
        )
        return normed

    def _batch(self, positions: torch.Tensor, num_tokens: int) -> Batch:
        """The step's requests, and where each layer's cache is.  The caller keeps `positions`."""
        batch = Batch(positions=positions.data_ptr(), num_tokens=num_tokens)
        all_metadata = get_forward_context().attn_metadata
        if all_metadata is None:
            # A run without a cache, to measure how much memory is left for one.
            return batch
        metadata = all_metadata[self._attentions[0].layer_name]
        for attn, layer in zip(self._attentions, self._layers, strict=True):
            layer.cache = attn.kv_cache.data_ptr()
            if all_metadata[attn.layer_name] is not metadata:
                raise InternalError(f"{attn.layer_name} has a KV cache group of its own")
        cache = self._attentions[0].kv_cache
        require(metadata, positions, cache, self._layers[0])
        batch.slots = metadata.slot_mapping.data_ptr()
        batch.query_start = metadata.query_start_loc.data_ptr()
        batch.seq_lens = metadata.seq_lens.data_ptr()
        batch.block_table = metadata.block_table.data_ptr()
        batch.block_table_stride = metadata.block_table.stride(0)
        batch.block_stride, batch.head_stride = cache.stride()[:2]
        batch.block_size = cache.shape[2]
        batch.num_seqs = metadata.query_start_loc.shape[0] - 1
        return batch


def require(
    metadata: Any, positions: torch.Tensor, cache: torch.Tensor, layer: DecoderLayer
) -> None:
    """Compare what vLLM hands over with what the kernels will read.

    Raises:
        InternalError: it is something else; they would read or write other memory.
    """
    heads = layer.heads
    found = {name: getattr(metadata, name).dtype for name in INDEX_DTYPES}
    shape = (heads.num_kv_heads, cache.shape[2], 2 * heads.head_size)
    holds = (
        found == INDEX_DTYPES
        and positions.dtype == torch.int64
        and positions.ndim == 1
        and metadata.slot_mapping.is_contiguous()
        and metadata.causal is True
        and metadata.block_table.stride(1) == 1
        and cache.dtype == torch.bfloat16
        and tuple(cache.shape[1:]) == shape
        and cache.stride()[2:] == (2 * heads.head_size, 1)
        and cache.shape[2] % BLOCK == 0
    )
    if not holds:
        raise InternalError(
            f"native layers: index types {found}, causal {metadata.causal}, cache {cache.dtype} "
            f"{tuple(cache.shape)} with strides {cache.stride()}. XLLM_GRAPH__MODE=partial leaves "
            "attention to vLLM."
        )


class NativeNorm:
    """The model's last norm: stands in for its module's `forward`."""

    def __init__(self, kernels: Kernels, module: RMSNorm) -> None:
        self._kernels = kernels
        self._weight = module.weight
        self._epsilon = module.variance_epsilon

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Norm of x + residual, both [num_tokens, hidden]; see vLLM's RMSNorm."""
        x = x.contiguous()
        y = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        self._kernels.norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            None if total is None else total.data_ptr(),
            self._weight.data_ptr(),
            self._epsilon,
            y.data_ptr(),
            x.shape[-1],
            x.numel() // x.shape[-1],
        )
        return y if total is None else (y, total)


def take_over(kernels: Kernels, model: torch.nn.Module, *, is_full: bool) -> int:
    """Let native code run the model's decoder layers.

    Args:
        kernels: the native library.
        model: as vLLM loaded it.
        is_full: with their attention, all in one call (see `full_refusal`); else one by one, around
            vLLM's attention.

    Returns:
        How many layers were taken over.

    Raises:
        UnsupportedLayerError: one cannot be; then none is.
    """
    found = known_layers(model)
    stack = stack_of(model)
    if is_full:
        stack.forward = NativeModel(kernels, stack)
        return len(found)
    scratch = Scratch(layer_struct(found[0]))
    for module in found:
        module.forward = NativeLayer(kernels, module, scratch)
    if stack is not None and is_plain(stack.norm):
        stack.norm.forward = NativeNorm(kernels, stack.norm)
    return len(found)


def known_layers(model: torch.nn.Module) -> list[Any]:
    """The model's decoder layers, each checked.

    Raises:
        UnsupportedLayerError: there is none, or the kernels do not do one of them.
    """
    found = [module for module in model.modules() if class_path(module) in LAYER_CLASSES]
    if not found:
        raise UnsupportedLayerError(f"{type(model).__name__} has no layer of a known kind")
    for module in found:
        check(module)
    return found


def stack_of(model: torch.nn.Module) -> Any:
    """The module that runs the layers one after the other, or None."""
    return next((module for module in model.modules() if class_path(module) in MODEL_CLASSES), None)


def full_refusal(model: torch.nn.Module) -> str | None:
    """Why the layers cannot run as one call with their attention, or None when they can.

    Raises:
        UnsupportedLayerError: they cannot run as native code at all.
    """
    found = known_layers(model)
    stack = stack_of(model)
    if stack is None or list(stack.layers) != found:
        return f"{type(model).__name__} runs its layers in a way of its own"
    attentions = [layer.self_attn.attn for layer in found]
    first = layer_struct(found[0])
    shape = [
        (attn.num_heads, attn.num_kv_heads, attn.head_size, attn.impl.scale) for attn in attentions
    ]
    reasons = {
        "the hidden states of some layers are read": bool(stack.aux_hidden_state_layers),
        "its last norm is not a plain RMSNorm like the others": not is_plain(stack.norm)
        or stack.norm.variance_epsilon != found[0].input_layernorm.variance_epsilon,
        "its layers differ in their heads": len(set(shape)) > 1,
        f"its heads are of {first.heads.head_size} (32 to {MAX_HEAD_SIZE}, by 32)": (
            first.heads.head_size % BLOCK != 0 or first.heads.head_size > MAX_HEAD_SIZE
        ),
        f"more than {MAX_GROUP} heads share keys": first.heads.num_heads
        > MAX_GROUP * first.heads.num_kv_heads,
        "its attention has a window": any(attn.impl.sliding_window != -1 for attn in attentions),
        "its scores are capped or biased": any(
            attn.impl.logits_soft_cap
            or attn.impl.alibi_slopes is not None
            or attn.impl.sinks is not None
            for attn in attentions
        ),
        "its KV cache is quantised": any(attn.impl.is_fp8_kv_cache for attn in attentions),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
