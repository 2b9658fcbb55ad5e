"""Recorded requests, brought to a rate: what arrives when, with which prompt.

A prompt is a tuple of block hashes, as Mooncake's traces have them: a hash stands for a block with
all that comes before it, so equal hashes are equal prefixes.  Traces without hashes get blocks that
nobody shares.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_plugin.errors import ConfigError
from xllm_plugin.service.policy import Slo

__all__ = ["Arrival", "Recorded", "Trace", "arrivals", "read_trace"]

_COPY_OFFSET_S = 60.0


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order in which they were recorded; a hash stands for `block_tokens`."""

    name: str
    block_tokens: int
    requests: tuple[Recorded, ...]

    @property
    def rate(self) -> float:
        """Requests a second, as recorded."""
        return len(self.requests) / max(self.requests[-1].at_s, 1e-3)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request on its way to the service."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    slo: Slo | None = None
    """That it tells the service."""


def read_trace(
    path: Path,
    *,
    block_tokens: int = 512,
    shorten: int = 1,
    shorten_outputs: int = 1,
    at_most: int | None = None,
) -> Trace:
    """Read JSON lines with timestamp (ms), input_length, output_length and, if known, hash_ids.

    Args:
        path: of the file.
        block_tokens: tokens a hash stands for in the file.
        shorten: divides prompts, and the block with them, for slow instances.
        shorten_outputs: divides outputs.
        at_most: so many requests from the start.

    Raises:
        ConfigError: there is no such file, or a line is not of that form.
    """
    try:
        lines = path.read_text().splitlines()[:at_most]
    except FileNotFoundError as error:
        raise ConfigError(f"no trace at {path}; give the path of a file of JSON lines") from error
    size = max(1, block_tokens // shorten)
    found, spare = [], 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt = max(1, row["input_length"] // shorten)
            output = max(1, row["output_length"] // shorten_outputs)
            num_blocks = -(-prompt // size)
            blocks = tuple(row["hash_ids"][:num_blocks]) if "hash_ids" in row else None
            at_s = row["timestamp"] / 1e3
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"trace {path}, line {number}: {line[:120]!r} has no timestamp, input_length and "
                "output_length in numbers"
            ) from error
        if blocks is None:
            blocks = tuple(range(spare, spare + num_blocks))
            spare += num_blocks
        found.append(Recorded(at_s, prompt, output, blocks))
    if not found:
        raise ConfigError(f"trace {path} is empty; give a file with one JSON object a line")
    return Trace(path.stem, size, tuple(found))


def arrivals(trace: Trace, rate: float, *, copies: int = 1, seed: int = 0) -> list[Arrival]:
    """The trace's requests at `rate` requests a second, its own time compressed or stretched.

    Args:
        trace: what was recorded.
        rate: of all copies together.
        copies: of the trace, which share no prefix; each but the first begins up to a minute of
            recorded time later, by `seed`.
        seed: of these offsets.
    """
    if rate <= 0 or copies < 1:
        raise ConfigError(f"rate {rate:g} and {copies} copies: give a rate above 0 and a copy")
    rng = random.Random(f"fleet:{seed}")  # noqa: S311 - traffic, not secrets
    stretch = copies * trace.rate / rate
    apart = 1 + max((max(one.blocks, default=0) for one in trace.requests), default=0)
    made = []
    for copy in range(copies):
        offset_s = rng.uniform(0, _COPY_OFFSET_S) if copy else 0.0
        made += [_arrival(one, offset_s, stretch, copy * apart) for one in trace.requests]
    return sorted(made, key=_at_s)


def _arrival(one: Recorded, offset_s: float, stretch: float, shift: int) -> Arrival:
    blocks: Sequence[Any] = [block + shift for block in one.blocks] if shift else one.blocks
    at_s = (one.at_s + offset_s) * stretch
    return Arrival(at_s, one.prompt_tokens, one.output_tokens, tuple(blocks))


def _at_s(arrival: Arrival) -> float:
    return arrival.at_s
