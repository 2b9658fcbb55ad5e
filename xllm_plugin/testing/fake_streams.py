"""An instance that streams tokens as vLLM does, dies where it is told to, and continues others'.

The tokens of an answer are given; every instance with the same ones stands for a copy of the same
model.  Text of a token is any piece of UTF-8, so a character may need two of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from xllm_plugin.instance.resumption import RESUME_PATH, Resumption
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer
from xllm_plugin.testing.streams import events_in

__all__ = [
    "PROMPT_IDS",
    "Death",
    "FakeModel",
    "Text",
    "continued",
    "events_of",
    "send_events",
    "stream_instance",
    "usage_of",
]

PROMPT_IDS = [7, 8, 9]
"""Of every prompt."""

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(slots=True)
class Death:
    """How an instance ends its first stream.

    Attributes:
        after_bytes: of the answer's body; what is cut is not sent.
        how: "reset" aborts the connection, "end" ends the answer cleanly, "silence" sends no more,
            "nonsense" breaks its framing, "kill" kills this very process.  "ids" gives the third
            event ids that are none, and ends the answer.
    """

    after_bytes: int
    how: str = "reset"


@dataclass(slots=True)
class FakeModel:
    """What is answered.

    Attributes:
        pieces: bytes of each token, together UTF-8.
        per_event: how many tokens come in an event, in turns.
        finish_reason: of the answer.
    """

    pieces: list[bytes]
    per_event: tuple[int, ...] = (1,)
    finish_reason: str = "length"
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of requests and resumptions, in order."""

    def chunks(self) -> list[list[int]]:
        """Token ids of each event."""
        ids, found, turn = list(range(len(self.pieces))), [], 0
        while ids:
            size = self.per_event[turn % len(self.per_event)]
            found.append(ids[:size])
            ids, turn = ids[size:], turn + 1
        return found

    def events(self, path: str, body: dict[str, Any]) -> list[bytes]:
        """The whole stream, one event each."""
        is_chat = path == "/v1/chat/completions"
        with_ids = bool(body.get("return_token_ids"))
        made = [self._opening(with_ids)] if is_chat else []
        chunks, text = self.chunks(), Text()
        for number, ids in enumerate(chunks, 1):
            new = "".join(text.add(self.pieces[one]) for one in ids)
            finish = self.finish_reason if number == len(chunks) else None
            prompt = PROMPT_IDS if with_ids and number == 1 else None
            choice: dict[str, Any] = {"index": 0}
            if is_chat:
                choice |= {"delta": {"content": new}, "logprobs": None, "finish_reason": finish}
                choice |= {"stop_reason": None} if finish else {}
            else:
                choice |= {"text": new, "logprobs": None, "finish_reason": finish}
                choice |= {"stop_reason": None, "prompt_token_ids": prompt}
            choice["token_ids"] = ids if with_ids else None
            made.append(_event(is_chat, choices=[choice]))
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = usage_of(len(self.pieces))
            made.append(_event(is_chat, choices=[], usage=usage))
        return [*made, b"data: [DONE]\n\n"]

    def _opening(self, with_ids: bool) -> bytes:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        choices = [choice | {"finish_reason": None}]
        return _event(True, choices=choices, prompt_token_ids=PROMPT_IDS if with_ids else None)


def usage_of(num_tokens: int) -> dict[str, int]:
    """What is said of so many tokens."""
    num_prompt = len(PROMPT_IDS)
    return {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_tokens,
        "completion_tokens": num_tokens,
    }


class Text:
    """Bytes become text as soon as a character is whole.

    Args:
        held: bytes of one that is not.
    """

    def __init__(self, held: bytes = b"") -> None:
        self._held = held

    @property
    def held(self) -> bytes:
        """Bytes of a character that is not whole."""
        return self._held

    def add(self, piece: bytes) -> str:
        """The text that is whole with `piece`."""
        held = self._held + piece
        for end in range(len(held), max(-1, len(held) - 4), -1):
            try:
                text = held[:end].decode()
            except UnicodeDecodeError:
                continue
            self._held = held[end:]
            return text
        self._held = held
        return ""


def _event(is_chat: bool, **fields: Any) -> bytes:
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    start = {"id": "fake-1", "object": kind, "created": 5, "model": "fake"}
    content = json.dumps(start | fields, separators=(",", ":"), ensure_ascii=False)
    return b"data: %b\n\n" % content.encode()


def events_of(body: bytes) -> list[Any]:
    """The events of a chunked body, as JSON where they are."""
    raw = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        raw, body = raw + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return events_in(raw.decode())


def stream_instance(
    model: FakeModel, death: Death | None = None, *, resumes: bool = True
) -> FakeInstance:
    """An instance of `model`; the first of its streams ends by `death`."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal death
        target = received.target.decode()
        if target == RESUME_PATH and not resumes:
            await answer(b'{"detail":"Not Found"}', "404 Not Found")(received, writer)
            return
        model.asked.append(json.loads(received.body))
        if target == RESUME_PATH:
            events = continued(model, msgspec.json.decode(received.body, type=Resumption))
        else:
            events = model.events(target, model.asked[-1])
        mine, death = death, None
        await send_events(events, mine, received, writer)

    return FakeInstance(script=script)


def continued(model: FakeModel, resumption: Resumption) -> list[bytes]:
    """What comes after what the client has; it must have had the model's own."""
    events = model.events(resumption.path, json.loads(bytes(resumption.body)))
    is_chat = resumption.path == "/v1/chat/completions"
    assert resumption.chunks == model.chunks()[: len(resumption.chunks)]
    assert (resumption.id, resumption.created) == ("fake-1", 5)
    has_ended = len(resumption.chunks) == len(model.chunks())
    assert (resumption.finish is not None) == has_ended
    has_opened = is_chat and (bool(resumption.chunks) or resumption.num_opening_events)
    skipped = len(resumption.chunks) + bool(has_opened)
    if resumption.finish is not None:
        assert resumption.finish.finish_reason == model.finish_reason
        skipped += resumption.finish.num_events
    return events[skipped:]


async def send_events(
    events: list[bytes],
    death: Death | None,
    received: Received,
    writer: asyncio.StreamWriter,
    *,
    pause_s: float = 0.0,
    before: Callable[[bytes], object] = lambda _: None,
) -> None:
    """Stream events, a chunk each, to their end or to `death`.

    Args:
        events: all of them.
        death: cuts the stream.
        received: the request.
        writer: of its connection.
        pause_s: after each event.
        before: told of each event that is then sent as a whole.
    """
    writer.write(_HEAD)
    left = death.after_bytes if death is not None else sum(map(len, events))
    for event in events:
        if death is not None and death.how == "ids" and event == events[2]:
            event, left = event.replace(b'"token_ids":[', b'"token_ids":[x'), 0  # noqa: PLW2901
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        part = event[:left]
        left -= len(part)
        if part == event:
            before(event)
        if part:
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(pause_s)
        if death is not None and len(part) < len(event):
            break
    if death is None or death.how in ("end", "ids"):
        writer.write(b"0\r\n\r\n")
        return
    if death.how == "silence":
        await received.gone.wait()
    elif death.how == "nonsense":
        writer.write(b"zz\r\nevil")
    else:
        await asyncio.sleep(0.003)  # a reset overtakes what was written
        if death.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        writer.transport.abort()
