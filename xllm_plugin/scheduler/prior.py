"""What the step-time model believes before the first step: shapes from vLLM's configuration.

The device's figures are assumed, by its type, and may be wrong by several times; so may the count
of weights of a model that is not built from attention and gated linear layers.  Some tens of steps
correct both.
"""

from __future__ import annotations

from typing import Any, Final

from xllm_plugin.scheduler.predictor import DeviceSpeed, ModelShape, Work

__all__ = ["prior_work"]

SPEEDS: Final = {"cpu": DeviceSpeed(bytes_per_s=20e9, flops_per_s=3e11, overhead_ms=1.0)}
ACCELERATOR: Final = DeviceSpeed(bytes_per_s=1e12, flops_per_s=1e14, overhead_ms=2.0)
QUANTISED_BYTES: Final = 1


def prior_work(vllm_config: Any) -> Work:
    """The roofline of the model in `vllm_config` on a device of its type."""
    device = vllm_config.device_config.device_type
    return Work.of(model_shape(vllm_config), SPEEDS.get(device, ACCELERATOR))


def model_shape(vllm_config: Any) -> ModelShape:
    """What one rank moves and computes for a step, counted from the model's dimensions."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    hidden, num_layers = model.get_hidden_size(), text.num_hidden_layers
    query = getattr(text, "num_attention_heads", 1) * model.get_head_size()
    key = model.get_total_num_kv_heads() * model.get_head_size()
    element_bytes = model.dtype.itemsize
    weight_bytes = element_bytes if model.quantization is None else QUANTISED_BYTES
    ranks = parallel.tensor_parallel_size

    num_experts = model.get_num_experts()
    dense = 3 * hidden * (getattr(text, "intermediate_size", None) or 4 * hidden)
    expert, per_token = 0, 0
    if num_experts:
        expert = 3 * hidden * (getattr(text, "moe_intermediate_size", None) or dense // 3 // hidden)
        per_token = getattr(text, "num_experts_per_tok", None) or 1
        dense = 0
    attention = 2 * hidden * (query + key)
    always = num_layers * (attention + dense) + hidden * model.get_vocab_size()
    used = always + num_layers * per_token * expert
    return ModelShape(
        weight_bytes=always * weight_bytes / ranks,
        flops_per_token=2 * used / ranks,
        expert_bytes=num_layers * num_experts * expert * weight_bytes / ranks,
        expert_share=min(1.0, per_token / num_experts) if num_experts else 0.0,
        kv_bytes_per_token=2 * num_layers * key * element_bytes / ranks,
        flops_per_pair=4 * num_layers * query / ranks,
    )
