"""Seeded random weights that make a tiny model behave: varied, decided, the same everywhere.

An untrained model with ordinary initial weights repeats one token with a margin near zero, which
shows neither a wrong cache nor a wrong mask.  Wide, untied embeddings give output that depends on
every earlier token, with an argmax clear enough to survive rounding.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = [
    "TOKENIZER_FILES",
    "TOKEN_IDS",
    "copy_tokenizer",
    "draw",
    "save",
    "save_tensors",
    "seed_weights",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# SmolLM2's: <|im_start|> begins, <|im_end|> ends.
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
VOCABULARY_SIZE = 49152

EMBEDDING_STD = 0.5


def draw(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Return normal float32 values that depend on `name` and `shape` alone.

    A seed for each name keeps a weight the same when layers are added or renamed around it.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not checked
def seed_weights(model: Any, embedding_std: float = EMBEDDING_STD) -> Any:
    """Fill every parameter of `model` in place and return it.

    Matrices are normal with a standard deviation of 1/sqrt(inputs), embeddings and output head of
    `embedding_std`; norms are one and biases zero.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:  # noqa: PLR2004  vectors
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        is_embedding = "embed_tokens" in name or "lm_head" in name
        std = embedding_std if is_embedding else float(parameter.shape[-1]) ** -0.5
        parameter.copy_(draw(name, tuple(parameter.shape), std))
    return model


def save(model: Any, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write `model` in bfloat16 to `folder`; `config` is added to its config.json.

    `config` carries what vLLM reads and the transformers class does not know or keep.
    """
    with _disk_errors():
        model.to(torch.bfloat16).save_pretrained(folder)
    if config:
        path = folder / "config.json"
        content = json.loads(path.read_text("utf-8")) | dict(config)
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write `tensors` to the safetensors file `path`."""
    with _disk_errors():
        save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise as OSError what safetensors has its own exception for: a full disk, mostly."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer of the model folder `source`."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
