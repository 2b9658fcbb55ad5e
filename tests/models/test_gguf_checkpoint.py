"""A GGUF written here by the gguf library's own writer, converted, and compared with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from xllm_plugin.errors import ModelError
from xllm_plugin.models.gguf_checkpoint import convert
from xllm_plugin.models.prepare import BuildContext


def converted(source: Path, folder: Path, reporter: Any) -> Path:
    folder.mkdir()
    convert(source, folder, BuildContext(folder, source, {}, reporter))
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors_are_the_source_in_bfloat16(
    architecture: str, make_gguf: Any, tmp_path: Path, reporter: Any
) -> None:
    """Including q and k, which the llama architecture stores permuted and qwen2 does not."""
    made = make_gguf(tmp_path / "a.gguf", architecture)
    folder = converted(made.path, tmp_path / "hf", reporter)
    read = load_file(folder / "model.safetensors")
    assert set(read) == set(made.tensors)
    for name, values in made.tensors.items():
        expected = torch.from_numpy(values)
        if "down_proj" in name:  # stored in Q8_0: half a step of the block's largest value
            step = float(np.abs(values).max()) / 127
            torch.testing.assert_close(read[name].float(), expected, atol=step, rtol=2**-7)
        else:
            assert torch.equal(read[name], expected.bfloat16()), name
    assert reporter.counted == len(read)


def test_head_of_its_own_is_kept(make_gguf: Any, tmp_path: Path, reporter: Any) -> None:
    made = make_gguf(tmp_path / "a.gguf", tied=False)
    folder = converted(made.path, tmp_path / "hf", reporter)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_configuration(make_gguf: Any, tmp_path: Path, reporter: Any) -> None:
    made = make_gguf(tmp_path / "a.gguf")
    folder = converted(made.path, tmp_path / "hf", reporter)
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10_000.0,
        "vocab_size": len(made.tokens),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert "transformers_version" in config
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tokenizer(architecture: str, make_gguf: Any, tmp_path: Path, reporter: Any) -> None:
    made = make_gguf(tmp_path / "a.gguf", architecture)
    folder = converted(made.path, tmp_path / "hf", reporter)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<|im_start|>hello 42<|im_end|>"
    encoded = tokenizer.encode(text, add_special_tokens=False)
    # \u0120 is how byte-level tokenizers write a space; digits stand alone in both.
    assert encoded.tokens == ["<|im_start|>", "hell", "o", "\u0120", "4", "2", "<|im_end|>"]
    assert [made.tokens[i] for i in encoded.ids] == encoded.tokens
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "hello 42"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert "messages" in settings["chat_template"]
    assert ("bos_token" in settings) == (architecture == "llama")


def test_other_architecture_is_refused(make_gguf: Any, tmp_path: Path, reporter: Any) -> None:
    made = make_gguf(tmp_path / "a.gguf", "gemma3")
    with pytest.raises(ModelError, match="'gemma3'; handled are llama, qwen2"):
        converted(made.path, tmp_path / "hf", reporter)


def test_no_gguf_is_refused(tmp_path: Path, reporter: Any) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(ModelError, match="no readable GGUF"):
        converted(tmp_path / "a.gguf", tmp_path / "hf", reporter)
