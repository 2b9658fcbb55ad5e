"""Which models run as native code; a refusal says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims

shims.install()
torch = pytest.importorskip("torch")

from xllm_plugin.cpu.native.choice import refusal  # noqa: E402


def config(**changes: Any) -> Any:
    model: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "dtype": torch.bfloat16,
        "enforce_eager": False,
    }
    model["hf_text_config"] = SimpleNamespace(
        is_causal=changes.pop("is_causal", True), max_position_embeddings=2048
    )
    model["max_model_len"] = changes.pop("max_model_len", 2048)
    names = ("quant_config", "lora_config", "kv_transfer_config", "ec_transfer_config")
    engine: dict[str, Any] = dict.fromkeys((*names, "weight_transfer_config"))
    engine["cache_config"] = SimpleNamespace(kv_offloading_size=changes.pop("kv_offload", None))
    for name, value in changes.items():
        (model if name in model else engine)[name] = value
    parallel = SimpleNamespace(tensor_parallel_size=engine.pop("tensor_parallel_size", 1))
    return SimpleNamespace(
        model_config=SimpleNamespace(**model), parallel_config=parallel, **engine
    )


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(bf16: bool, amx: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    has(bf16=True, amx=False)
    return has


def test_a_dense_model_in_bfloat16(processor: Any) -> None:
    assert refusal(config()) is None
    assert refusal(config(architecture="Qwen3ForCausalLM")) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "DeepseekV2ForCausalLM"}, "DeepseekV2ForCausalLM is not one of Llama"),
        ({"dtype": torch.float32}, "its type is torch.float32"),
        ({"enforce_eager": True}, "--enforce-eager"),
        ({"quant_config": object()}, "quantised"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "a connector"),
        ({"kv_offload": 1.0}, "a connector"),
        ({"max_model_len": 4096}, "positions beyond its rotary table"),
        ({"weight_transfer_config": object()}, "weights are replaced at run time"),
        ({"is_causal": False}, "its attention is not causal"),
        ({"tensor_parallel_size": 2}, "several ranks"),
    ],
)
def test_others_are_refused_with_the_reason(
    processor: Any, changes: dict[str, Any], words: str
) -> None:
    assert words in str(refusal(config(**changes)))


def test_the_processor_decides_too(processor: Any) -> None:
    processor(bf16=False, amx=False)
    assert refusal(config()) == "this processor has no AVX512-BF16"
    processor(bf16=True, amx=True)
    assert refusal(config()) == "this processor has AMX"


def test_without_a_model_there_is_nothing_to_run() -> None:
    assert refusal(SimpleNamespace(model_config=None)) == "there is no model"
