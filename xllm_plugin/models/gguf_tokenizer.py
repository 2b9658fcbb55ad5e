"""The byte-pair tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json.

GGUF keeps tokens, merges and a name for the way text is split first; the splitting itself is known
to the reader only.  Two ways are handled: `smollm` and `qwen2`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from xllm_plugin.errors import ModelError

if TYPE_CHECKING:
    from xllm_plugin.models.gguf_checkpoint import GgufFile

__all__ = ["write_tokenizer"]

# tokenizer.ggml.token_type, from gguf.TokenType.
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5

# How Qwen2's published tokenizer splits text (a fact of the format, one alternative a line).
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, chat template included, to `folder`.

    Raises:
        ModelError: the file splits text in a way that is not handled.
    """
    splitting = file.value("tokenizer.ggml.pre")
    if splitting not in SPLITTERS:
        raise ModelError(
            f"GGUF pre-tokenizer {splitting!r} is not handled; known are {', '.join(SPLITTERS)}"
        )
    tokens: list[str] = file.value("tokenizer.ggml.tokens")
    kinds: list[int] = file.value("tokenizer.ggml.token_type")
    added = {
        token_id: AddedToken(tokens[token_id], special=kind == CONTROL, normalized=False)
        for token_id, kind in enumerate(kinds)
        if kind in {CONTROL, USER_DEFINED}
    }
    # SmolLM2's special tokens are part of its vocabulary; Qwen's are only added to it.
    outside = set() if splitting == "smollm" else set(added)
    vocabulary = {
        token: token_id
        for token_id, token in enumerate(tokens)
        if kinds[token_id] != UNUSED and token_id not in outside
    }
    merges = [_pair(merge) for merge in file.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.decoder = decoders.ByteLevel()
    SPLITTERS[splitting](tokenizer)
    _add(tokenizer, added)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = _settings(file, tokens, added)
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ", 1)
    return left, right


def _split_smollm(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def _split_qwen2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


SPLITTERS: dict[str, Callable[[Tokenizer], None]] = {
    "smollm": _split_smollm,
    "qwen2": _split_qwen2,
}


def _add(tokenizer: Tokenizer, added: dict[int, AddedToken]) -> None:
    """Add the tokens in the order of their ids, which the library numbers in the order given."""
    for token_id, token in sorted(added.items()):
        if token.special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
        got = tokenizer.token_to_id(token.content)
        if got != token_id:
            raise ModelError(f"token {token.content!r} has id {token_id} in GGUF, here {got}")


def _settings(file: GgufFile, tokens: list[str], added: dict[int, AddedToken]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.shape_value("context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
                "special": token.special,
            }
            for token_id, token in sorted(added.items())
        },
        "chat_template": file.value("tokenizer.chat_template"),
    }
    # Qwen's own tokenizer_config.json names neither, SmolLM2's names both.
    roles = {"eos": "eos_token", "padding": "pad_token"}
    if file.architecture == "llama":
        roles |= {"bos": "bos_token", "unknown": "unk_token"}
    for role, key in roles.items():
        token_id = file.value(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None:
            settings[key] = tokens[token_id]
    return {key: value for key, value in settings.items() if value is not None}
