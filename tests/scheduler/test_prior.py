"""The prior from vLLM's configuration: dense, experts, quantised, several ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.scheduler.prior import model_shape, prior_work


def configuration(num_experts: int = 0, **changes: Any) -> SimpleNamespace:
    """SmolLM2-135M's dimensions."""
    text = SimpleNamespace(num_hidden_layers=30, num_attention_heads=9, intermediate_size=1536)
    if num_experts:
        text.moe_intermediate_size, text.num_experts_per_tok = 512, 2
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=changes.get("device", "cpu")),
        parallel_config=SimpleNamespace(tensor_parallel_size=changes.get("ranks", 1)),
        model_config=SimpleNamespace(
            hf_text_config=text,
            dtype=SimpleNamespace(itemsize=2),
            quantization=changes.get("quantization"),
            get_hidden_size=lambda: 576,
            get_head_size=lambda: 64,
            get_total_num_kv_heads=lambda: 3,
            get_vocab_size=lambda: 49152,
            get_num_experts=lambda: num_experts,
        ),
    )


def test_a_dense_model_reads_all_its_weights() -> None:
    shape = model_shape(configuration())
    assert shape.weight_bytes == pytest.approx(2 * 134.5e6, rel=0.01)
    assert shape.flops_per_token == shape.weight_bytes
    assert shape.expert_bytes == shape.expert_share == 0
    assert shape.kv_bytes_per_token == 2 * 30 * 192 * 2
    assert shape.flops_per_pair == 4 * 30 * 576


def test_a_quantised_model_reads_less_and_computes_as_much() -> None:
    full, quantised = (model_shape(configuration(quantization=q)) for q in (None, "fp8"))
    assert quantised.weight_bytes == full.weight_bytes / 2
    assert quantised.flops_per_token == full.flops_per_token
    assert quantised.kv_bytes_per_token == full.kv_bytes_per_token


def test_of_experts_a_token_uses_its_share() -> None:
    shape = model_shape(configuration(num_experts=8))
    expert = 3 * 576 * 512
    assert shape.expert_bytes == 30 * 8 * expert * 2
    assert shape.expert_share == 0.25
    assert shape.flops_per_token == shape.weight_bytes + 30 * 2 * expert * 2


def test_ranks_share_the_work() -> None:
    alone, both = (prior_work(configuration(ranks=n)) for n in (1, 2))
    assert both.weight_ms == alone.weight_ms / 2
    assert both.token_ms == alone.token_ms / 2
    assert both.overhead_ms == alone.overhead_ms


def test_an_unknown_device_is_taken_for_an_accelerator() -> None:
    npu, cpu = (prior_work(configuration(device=name)) for name in ("npu", "cpu"))
    assert npu.weight_ms < cpu.weight_ms / 10
