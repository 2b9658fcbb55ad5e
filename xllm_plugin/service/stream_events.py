"""Events of a stream as its instance writes them, as far as they are read here."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["DoubtfulFields", "StreamChoice", "StreamEvent", "StreamFault"]

_NULL = b"null"


class StreamChoice(msgspec.Struct):
    """What is new of the answer."""

    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    delta: Any = None
    logprobs: Any = None


class StreamFault(msgspec.Struct):
    """Why there is no more."""

    message: str = ""
    code: Any = None


class StreamEvent(msgspec.Struct):
    """One event."""

    id: str = ""
    created: int = 0
    choices: list[StreamChoice] = []
    error: StreamFault | None = None


class DoubtfulFields(msgspec.Struct):
    """Fields of a body for which an instance may refuse to go on, as they are written."""

    seed: msgspec.Raw = msgspec.Raw(_NULL)
    thinking_token_budget: msgspec.Raw = msgspec.Raw(_NULL)
    watermarking: msgspec.Raw = msgspec.Raw(_NULL)
    vllm_xargs: msgspec.Raw = msgspec.Raw(_NULL)
