"""Tiny random models: the same bytes every time, and alive."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from xllm_plugin.models.catalog import CATALOG
from xllm_plugin.models.libraries import load_transformers
from xllm_plugin.models.manifest import sha256_of_file
from xllm_plugin.models.prepare import BuildContext
from xllm_plugin.models.random_model import VOCABULARY_SIZE


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of SmolLM2's size, standing in for the downloaded one."""
    folder = tmp_path_factory.mktemp("smollm2")
    vocabulary = {f"t{number}": number for number in range(VOCABULARY_SIZE)}
    Tokenizer(BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2", "pad_token": "t2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def build(name: str, folder: Path, tokenizer_folder: Path, reporter: Any) -> dict[str, str]:
    """Build model `name` and return the sha256 of every file."""
    folder.mkdir(parents=True)
    module, function = CATALOG[name].builder.split(":")
    builder = getattr(importlib.import_module(module), function)
    builder(BuildContext(folder, None, {"smollm2": tokenizer_folder}, reporter))
    return {path.name: sha256_of_file(path) for path in folder.iterdir()}


@pytest.mark.parametrize("name", [name for name in CATALOG if name.startswith("tiny-")])
def test_same_bytes_twice(name: str, tmp_path: Path, tokenizer_folder: Path, reporter: Any) -> None:
    first = build(name, tmp_path / "a", tokenizer_folder, reporter)
    assert first == build(name, tmp_path / "b", tokenizer_folder, reporter)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(
        first
    )
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert size_bytes < 1.5 * CATALOG[name].size_bytes


def test_output_depends_on_the_prompt_and_does_not_repeat(
    tmp_path: Path, tokenizer_folder: Path, reporter: Any
) -> None:
    build("tiny-llama", tmp_path / "m", tokenizer_folder, reporter)
    tf = load_transformers()
    torch = importlib.import_module("torch")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    outputs = []
    for prompt in ([10, 11, 12], [13, 11, 12]):
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
        )
        outputs.append(made[0, 3:].tolist())
    assert outputs[0] != outputs[1]
    assert len(set(outputs[0])) > 4


def test_draft_layer_is_stored_after_the_last(
    tmp_path: Path, tokenizer_folder: Path, reporter: Any
) -> None:
    build("tiny-deepseek-v3", tmp_path / "m", tokenizer_folder, reporter)
    load_file = importlib.import_module("safetensors.torch").load_file
    names = set(load_file(tmp_path / "m" / "model.safetensors"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["num_nextn_predict_layers"] == 1
    assert {"model.layers.3.eh_proj.weight", "model.layers.3.self_attn.o_proj.weight"} <= names
    assert not any(name.startswith("model.layers.4.") for name in names)
