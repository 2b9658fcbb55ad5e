"""Requests with the lengths of recorded traffic and made-up content.

Published traces hold lengths and no text.  Prompts are random token ids: the speed of a model
without prefix reuse or speculation does not depend on what the tokens say.  Everything is seeded,
so that every peer and every repeat gets the same requests.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import ConfigError, ModelError

__all__ = ["Lengths", "Request", "Vocabulary", "read_lengths", "synthesise"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """One traced request, in tokens."""

    input_tokens: int
    output_tokens: int

    def shortened(self, divisor: float) -> Lengths:
        """Both divided alike."""
        return Lengths(round(self.input_tokens / divisor), round(self.output_tokens / divisor))

    def clipped(self, max_input: int, max_output: int) -> Lengths:
        """No longer than given, and at least one token each."""
        return Lengths(
            max(1, min(self.input_tokens, max_input)), max(1, min(self.output_tokens, max_output))
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send: prompt token ids, and how many tokens to generate."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which token ids a prompt may hold."""

    size: int
    special: frozenset[int] = frozenset()

    @classmethod
    def of_model(cls, folder: Path) -> Vocabulary:
        """Read a Hugging Face folder; added tokens (control tokens and the like) are special."""
        try:
            config = json.loads((folder / "config.json").read_text())
        except FileNotFoundError as error:
            raise ModelError(
                f"{folder} holds no config.json; give --model a model folder "
                "(`xllm model NAME` makes one)"
            ) from error
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        if not isinstance(size, int):
            raise ModelError(f"{folder}/config.json names no vocab_size; use a text model")
        tokenizer = folder / "tokenizer.json"
        added = (
            json.loads(tokenizer.read_text()).get("added_tokens") if tokenizer.exists() else None
        )
        return cls(size, frozenset(entry["id"] for entry in added or ()))

    def ordinary(self) -> list[int]:
        """The ids that are not special, in order."""
        return [token for token in range(self.size) if token not in self.special]


def read_lengths(path: Path) -> tuple[Lengths, ...]:
    """Read a trace, one JSON object a line.

    Two forms: `{"input_length": n, "output_length": n}` (Azure, Mooncake), and
    `{"turns": [[user_tokens, reply_tokens], ...]}` (conversations, of which the first turn counts).
    """
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        raise ConfigError(f"trace {path} is empty; give a file with one JSON object a line")
    return tuple(_lengths(path, row) for row in rows)


def synthesise(
    lengths: Sequence[Lengths],
    vocabulary: Vocabulary,
    *,
    count: int,
    seed: int | str,
    max_input: int = sys.maxsize,
    max_output: int = sys.maxsize,
) -> tuple[Request, ...]:
    """Make `count` requests with the first `count` lengths (again from the start if too few).

    Another `seed` gives other tokens of the same lengths: so all loads carry the same work, and no
    load finds another's prompts in a prefix cache.
    """
    rng = random.Random(f"xllm-bench:{seed}")  # noqa: S311 - content, not secrets
    wanted = [lengths[i % len(lengths)].clipped(max_input, max_output) for i in range(count)]
    tokens = vocabulary.ordinary()
    return tuple(
        Request(tuple(rng.choices(tokens, k=w.input_tokens)), w.output_tokens) for w in wanted
    )


def _lengths(path: Path, row: dict[str, object]) -> Lengths:
    match row:
        case {"input_length": int(sent), "output_length": int(replied)}:
            return Lengths(sent, replied)
        case {"turns": [[int(sent), int(replied)], *_]}:
            return Lengths(sent, replied)
    raise ConfigError(
        f"trace {path}: row {json.dumps(row)[:120]} has neither input_length and output_length "
        "nor turns"
    )
