"""Requests for streams of a `FakeModel`, and what is to come of them."""

from __future__ import annotations

import json
from typing import Any, Final

from xllm_plugin.service.policy import Choice
from xllm_plugin.testing.fake_streams import FakeModel, events_of
from xllm_plugin.testing.service_harness import Harness, request

__all__ = ["CHAT", "COMPLETION", "PIECES", "ask", "body_of", "error_in", "expected", "first"]

CHAT: Final = "/v1/chat/completions"
COMPLETION: Final = "/v1/completions"
PIECES: Final = [
    b"Gr",
    "ü".encode(),
    "😀".encode()[:2],
    "😀".encode()[2:],
    b' "token_ids":[1] ',
    b"end",
]
"""Text of tokens; the third and the fourth are one character."""


def first(_: Any, __: Any) -> Choice:
    """A policy that always takes the first candidate."""
    return Choice(0, "the first")


def body_of(path: str, **changes: Any) -> dict[str, Any]:
    """A request for a stream, and what is changed in it."""
    prompt: dict[str, Any] = {"messages": []} if path == CHAT else {"prompt": "x"}
    return {"model": "fake", "stream": True, **prompt, **changes}


async def ask(harness: Harness, path: str, body: dict[str, Any], headers: bytes = b"") -> list[Any]:
    """The events of a stream through the proxy."""
    raw = request(json.dumps(body).encode(), path.encode(), headers=headers)
    head, answered = await harness.ask(raw)
    assert head.startswith(b"HTTP/1.1 200"), head
    return events_of(answered)


def expected(model: FakeModel, path: str, body: dict[str, Any]) -> list[Any]:
    """What an instance alone would stream."""
    raw = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in model.events(path, body))
    return events_of(raw)


def error_in(events: list[Any]) -> str:
    """The message of the error that a stream has ended with."""
    assert set(events[-1]) == {"error"}, events[-1]
    return str(events[-1]["error"]["message"])
