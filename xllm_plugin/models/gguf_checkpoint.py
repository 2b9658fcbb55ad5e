"""A GGUF file as a Hugging Face folder: weights in bfloat16, configuration, tokenizer.

The `gguf` package reads and dequantises; what is left is naming, and two facts about the files:

* llama.cpp stores the q and k projections of the `llama` architecture with the two halves of each
  head's rotary pairs interleaved; Hugging Face keeps the halves apart.  `qwen2` is stored as is.
* A quantiser may store a tied embedding twice, the output copy at a finer step.  Both are the same
  matrix (cosine 0.9989 in Qwen2.5-Coder's file), so the finer one serves as both.

Tensors go to the file one at a time: memory stays near one dequantised tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from xllm_plugin.errors import ModelError
from xllm_plugin.models.gguf_tokenizer import write_tokenizer
from xllm_plugin.models.prepare import BuildContext
from xllm_plugin.models.safetensors_file import Bf16Writer

__all__ = ["GgufFile", "build", "convert", "unpermute_rotary"]

Floats = npt.NDArray[np.float32]

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
OUTER_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    HEAD: "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Rows compared to see whether output and embedding are one matrix, and how alike they must be.
TIED_ROWS = 2000
TIED_COSINE = 0.98

# Without it transformers 5 takes the tokenizer for one saved with a wrong pattern, and warns.
TRANSFORMERS_VERSION = "5.0.0"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF file with its metadata read by key."""

    reader: Any

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Open `path`.

        Raises:
            ModelError: it is no GGUF, or of an architecture that is not handled.
        """
        try:
            file = cls(gguf.GGUFReader(path))
        except (ValueError, IndexError) as error:
            raise ModelError(f"{path} is no readable GGUF file: {error}") from error
        if file.architecture not in CLASSES:
            raise ModelError(
                f"{path} holds architecture {file.architecture!r}; handled are {', '.join(CLASSES)}"
            )
        return file

    def value(self, key: str, default: Any = None) -> Any:
        """Return a metadata value as Python data, or `default`."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    @property
    def architecture(self) -> str:
        """Return `general.architecture`."""
        return str(self.value("general.architecture"))

    def shape_value(self, key: str) -> Any:
        """Return a value stored under the architecture's own name."""
        return self.value(f"{self.architecture}.{key}")

    @property
    def tensors(self) -> dict[str, Any]:
        """Return the tensors by GGUF name, in file order."""
        return {tensor.name: tensor for tensor in self.reader.tensors}


def build(context: BuildContext) -> None:
    """Builder of the recipes that have a GGUF."""
    assert context.gguf is not None
    convert(context.gguf, context.folder, context)


def convert(source: Path, folder: Path, context: BuildContext) -> None:
    """Write the GGUF `source` to `folder` as a Hugging Face model.

    Raises:
        ModelError: the file holds something this conversion does not know.
    """
    file = GgufFile.open(source)
    tensors = file.tensors
    is_tied = _is_tied(tensors)
    if is_tied and HEAD in tensors:
        tensors[EMBEDDING] = tensors.pop(HEAD)
    shapes = {hf_name(name): hf_shape(tensor) for name, tensor in tensors.items()}
    with (
        Bf16Writer(folder / "model.safetensors", shapes) as writer,
        context.reporter.bar("converting tensors", len(tensors)) as advance,
    ):
        for name, array in hf_tensors(file, tensors):
            writer.write(name, array)
            advance(1)
    write_tokenizer(file, folder)
    _write_json(folder / "config.json", hf_config(file, is_tied=is_tied))
    _write_json(folder / "generation_config.json", _generation_config(file))


def hf_name(name: str) -> str:
    """Return the Hugging Face name of the GGUF tensor `name`."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ModelError(f"unknown GGUF tensor {name!r}; this file needs a newer converter")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"


def hf_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape in Hugging Face's order; GGUF lists the fastest dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def hf_tensors(file: GgufFile, tensors: dict[str, Any]) -> Iterator[tuple[str, Floats]]:
    """Yield (Hugging Face name, float32 array) one by one."""
    heads = {
        "attn_q": int(file.shape_value("attention.head_count")),
        "attn_k": int(file.shape_value("attention.head_count_kv")),
    }
    for name, tensor in tensors.items():
        array = _dequantised(tensor).reshape(hf_shape(tensor))
        part = name.split(".")[-2]
        if file.architecture == "llama" and part in heads:
            array = unpermute_rotary(array, heads[part])
        yield hf_name(name), array


def unpermute_rotary(rows: Floats, num_heads: int) -> Floats:
    """Undo llama.cpp's interleaving of the rotary halves.

    Args:
        rows: [num_heads * head_dim, ...], each head as x0 y0 x1 y1 ... of its rotary pairs.
        num_heads: query heads for q, key-value heads for k.

    Returns:
        The same shape, each head as x0 x1 ... y0 y1 ...
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _dequantised(tensor: Any, num_rows: int | None = None) -> Floats:
    array: Floats = gguf.quants.dequantize(tensor.data[:num_rows], tensor.tensor_type)
    return array


def _is_tied(tensors: dict[str, Any]) -> bool:
    """Say whether input and output embedding are one matrix, stored once or at two steps."""
    if HEAD not in tensors:
        return True
    if hf_shape(tensors[HEAD]) != hf_shape(tensors[EMBEDDING]):
        return False
    one, other = (_dequantised(tensors[name], TIED_ROWS).ravel() for name in (EMBEDDING, HEAD))
    cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    return bool(cosine > TIED_COSINE)


def hf_config(file: GgufFile, *, is_tied: bool) -> dict[str, Any]:
    """Return the content of config.json."""
    num_heads = file.shape_value("attention.head_count")
    hidden_size = file.shape_value("embedding_length")
    config = {
        "architectures": [CLASSES[file.architecture]],
        "model_type": file.architecture,
        "hidden_size": hidden_size,
        "intermediate_size": file.shape_value("feed_forward_length"),
        "num_hidden_layers": file.shape_value("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.shape_value("attention.head_count_kv"),
        "max_position_embeddings": file.shape_value("context_length"),
        # Stored as float32; rounding gives back the decimal that was meant.
        "rms_norm_eps": round(file.shape_value("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": file.shape_value("rope.freq_base"),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "vocab_size": len(file.value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": is_tied,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "transformers_version": TRANSFORMERS_VERSION,
        **_generation_config(file),
    }
    if file.architecture == "llama":
        config |= {"attention_bias": False, "mlp_bias": False, "head_dim": hidden_size // num_heads}
    else:
        config |= {"use_sliding_window": False, "eos_token_id": _token_id(file, "eos")}
        del config["pad_token_id"]
    return config


def _generation_config(file: GgufFile) -> dict[str, Any]:
    """Return the content of generation_config.json; Qwen also stops at its padding token."""
    eos, padding = _token_id(file, "eos"), _token_id(file, "padding")
    return {
        "bos_token_id": _token_id(file, "bos"),
        "eos_token_id": eos if file.architecture == "llama" else [eos, padding],
        "pad_token_id": padding,
    }


def _token_id(file: GgufFile, role: str) -> int | None:
    value = file.value(f"tokenizer.ggml.{role}_token_id")
    return None if value is None else int(value)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
