"""An upcycled mixture of experts against the dense model that it was made from."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models.libraries import load_transformers
from xllm_plugin.models.prepare import BuildContext
from xllm_plugin.models.upcycle import build_equal_experts, build_noisy_experts


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama folder."""
    tf = load_transformers()
    folder = tmp_path_factory.mktemp("dense")
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    tf.LlamaForCausalLM(config).to(importlib.import_module("torch").bfloat16).save_pretrained(
        folder
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


def logits(folder: Path) -> Any:
    tf, torch = load_transformers(), importlib.import_module("torch")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(1, 21)[None]).logits


def test_equal_experts_answer_as_the_dense_model(
    dense: Path, tmp_path: Path, reporter: Any
) -> None:
    torch = importlib.import_module("torch")
    build_equal_experts(BuildContext(tmp_path, None, {"smollm2": dense}, reporter))
    torch.testing.assert_close(logits(tmp_path), logits(dense), atol=1e-5, rtol=1e-5)


def test_noisy_experts_differ(dense: Path, tmp_path: Path, reporter: Any) -> None:
    build_noisy_experts(BuildContext(tmp_path, None, {"smollm2": dense}, reporter))
    load_file = importlib.import_module("safetensors.torch").load_file
    tensors = load_file(tmp_path / "model.safetensors")
    experts = [
        tensors[f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight"]
        for number in range(4)
    ]
    assert all(not experts[0].equal(other) for other in experts[1:])
    assert (logits(tmp_path) - logits(dense)).abs().max() > 0
