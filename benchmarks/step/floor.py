"""What no engine on this machine can go below: reading what must be read, computing what must be.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from xllm_plugin.errors import ModelError

__all__ = ["Floor", "Machine", "Work"]

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Machine:
    """The best this machine was seen to do with all cores."""

    read_bytes_per_s: float
    bf16_flop_per_s: float


@dataclass(frozen=True, slots=True)
class Floor:
    """Milliseconds of one step for each thing that it cannot do without."""

    weights_ms: float
    kv_ms: float
    arithmetic_ms: float

    @property
    def bound_ms(self) -> float:
        """Reading and computing may overlap, so the longer of the two."""
        return max(self.weights_ms + self.kv_ms, self.arithmetic_ms)


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs a dense decoder in bf16."""

    body_parameters: int
    """Of the linear layers and norms: every token is multiplied with each of them."""
    head_parameters: int
    """Of the output layer: once for each request in a step."""
    kv_bytes_per_token: int
    attention_flop_per_pair: int
    """For each query and each key that it sees, over all layers."""

    @classmethod
    def of_model(cls, folder: Path) -> Self:
        """Read a Hugging Face folder of a dense decoder with grouped attention (Llama's kind).

        Raises `ModelError` when the folder has no such model.
        """
        config = _config(folder)
        try:
            heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
            head_size = config.get("head_dim") or config["hidden_size"] // heads
            vocabulary = config["vocab_size"] * config["hidden_size"]
            kv_heads = config.get("num_key_value_heads") or heads
        except KeyError as error:
            raise ModelError(
                f"{folder}/config.json has no {error}; the step benchmark takes dense text models "
                "such as smollm2"
            ) from error
        sizes = _tensor_sizes(folder)
        embeddings = {name: size for name, size in sizes.items() if _is_embedding(name)}
        return cls(
            body_parameters=sum(sizes.values()) - sum(embeddings.values()),
            head_parameters=vocabulary,
            kv_bytes_per_token=2 * layers * kv_heads * head_size * BF16_BYTES,
            attention_flop_per_pair=4 * layers * heads * head_size,
        )

    @property
    def weight_bytes(self) -> int:
        """Read once in every step; of the input embedding only the rows in use, so none."""
        return (self.body_parameters + self.head_parameters) * BF16_BYTES

    def decode(self, batch: int, context: int, machine: Machine) -> Floor:
        """One token for each of `batch` requests that see `context` tokens."""
        flop = 2 * batch * (self.body_parameters + self.head_parameters)
        flop += batch * context * self.attention_flop_per_pair
        return self._floor(flop, batch * context, machine)

    def prefill(self, tokens: int, machine: Machine) -> Floor:
        """One prompt of `tokens` tokens; its keys and values are made and not read back."""
        flop = 2 * tokens * self.body_parameters + 2 * self.head_parameters
        flop += tokens * (tokens + 1) // 2 * self.attention_flop_per_pair
        return self._floor(flop, 0, machine)

    def _floor(self, flop: int, kv_tokens: int, machine: Machine) -> Floor:
        return Floor(
            weights_ms=self.weight_bytes / machine.read_bytes_per_s * 1e3,
            kv_ms=kv_tokens * self.kv_bytes_per_token / machine.read_bytes_per_s * 1e3,
            arithmetic_ms=flop / machine.bf16_flop_per_s * 1e3,
        )


def _is_embedding(name: str) -> bool:
    """Input embedding or output layer, which `Work` counts by the vocabulary."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} holds no config.json; give --model a model folder (`xllm model NAME` makes "
            "one)"
        ) from error
    assert isinstance(config, dict)
    return config


def _tensor_sizes(folder: Path) -> dict[str, int]:
    """Number of elements of every tensor, from the headers of the safetensors files."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        sizes |= {name: math.prod(entry["shape"]) for name, entry in header.items()}
    if not sizes:
        raise ModelError(f"{folder} holds no *.safetensors file; give --model a complete folder")
    return sizes
