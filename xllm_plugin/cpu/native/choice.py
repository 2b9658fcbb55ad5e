"""Whether a model is to run as native code, decided before anything is loaded or compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from xllm_plugin.accelerator.platform import has_connector

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["ARCHITECTURES", "refusal"]

ARCHITECTURES = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


def refusal(vllm_config: VllmConfig) -> str | None:
    """Why vLLM's own code runs this model, or None when native code does."""
    model: Any = vllm_config.model_config
    if model is None:
        return "there is no model"
    reasons = {
        f"{model.architecture} is not one of {', '.join(sorted(ARCHITECTURES))}": (
            model.architecture not in ARCHITECTURES
        ),
        f"its type is {model.dtype}, not bfloat16": model.dtype != torch.bfloat16,
        "it is quantised": vllm_config.quant_config is not None,
        "--enforce-eager": bool(model.enforce_eager),
        "LoRA": vllm_config.lora_config is not None,
        "a connector": has_connector(vllm_config),
        "positions beyond its rotary table": model.max_model_len
        > getattr(model.hf_text_config, "max_position_embeddings", model.max_model_len),
        "weights are replaced at run time": vllm_config.weight_transfer_config is not None,
        "its attention is not causal": not getattr(model.hf_text_config, "is_causal", True),
        "several ranks share each layer": vllm_config.parallel_config.tensor_parallel_size > 1,
        "this processor has no AVX512-BF16": not torch.cpu._is_avx512_bf16_supported(),  # noqa: SLF001
        # oneDNN multiplies by tiles there, which these kernels do not.
        "this processor has AMX": torch.cpu._is_amx_tile_supported(),  # noqa: SLF001
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
