"""A backend that costs little: answers like vLLM with this plugin, with a pace of its own.

``python mock.py --port N [--interval-ms 10] [--kv-events]``; with an interval, a stream's first
event and every one after it wait that long, and an answer that is not streamed waits once.  The
text of a token is its number, so what is lost or comes twice shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import cast

import click
import httptools
import msgspec
import uvloop

from xllm_plugin.instance.resumption import RESUME_PATH, Resumption
from xllm_plugin.service.kv_index.wire import Batch, BlockStored
from xllm_plugin.testing.fake_publisher import FakePublisher

MAX_TOKENS = 64
_MAX_TOKENS_FIELD = re.compile(rb'"max_(?:completion_)?tokens":\s*(\d+)')  # a peer renames it
_CACHED_TOKENS = 65_536
_BLOCK_SIZE = 16
_LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
_HEAD += b"transfer-encoding: chunked\r\n\r\n"


def whole(payload: object, content_type: str = "application/json") -> bytes:
    """An answer with a length."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def event(delta: object, *, finish: str | None = None, **fields: object) -> bytes:
    """One event of a chat, a chunk of the answer, with vLLM's fields in their order."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    start = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    if "token_ids" in fields:
        choice["token_ids"] = fields.pop("token_ids")
    made = json.dumps({**start, "choices": [choice], **fields}, separators=(",", ":"))
    content = b"data: %b\n\n" % made.encode()
    return b"%x\r\n%b\r\n" % (len(content), content)


def stream(num_tokens: int, *, with_ids: bool) -> list[bytes]:
    """Every chunk of a streamed answer: one that opens it, one a token, and the end."""
    role = {"role": "assistant", "content": ""}
    chunks = [event(role, prompt_token_ids=[7, 8, 9] if with_ids else None)]
    for number in range(num_tokens):
        finish = "length" if number == num_tokens - 1 else None
        ids = [number] if with_ids else None
        chunks.append(event({"content": f" {number}"}, finish=finish, token_ids=ids))
    return [*chunks, _LAST]


MODEL = {"id": "mock", "object": "model", "owned_by": "vllm", "root": "mock"}
ANSWERS = {
    b"/v1/models": whole({"object": "list", "data": [MODEL]}),
    b"/metrics": whole(b"", "text/plain"),
}
MESSAGE = {"role": "assistant", "content": " token" * 32}
CHAT = whole(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "mock",
        "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 16, "completion_tokens": 32, "total_tokens": 48},
    }
)
OTHER = whole({"status": "ok", "model_path": "mock", "version": "mock"})


class Backend:
    """What all connections share."""

    def __init__(self, interval_s: float, publisher: FakePublisher | None) -> None:
        self.interval_s = interval_s
        self.publisher = publisher
        self.num_streams = 0
        """That are open."""
        self._streams: dict[tuple[int, bool], list[bytes]] = {}

    def stream(self, body: bytes, num_done: int = -1) -> list[bytes]:
        """The chunks of an answer; without those of `num_done` tokens, if some are known."""
        found = _MAX_TOKENS_FIELD.search(body)
        wanted = min(MAX_TOKENS, int(found[1]) if found else MAX_TOKENS)
        key = (wanted, b'"return_token_ids":true' in body)
        if key not in self._streams:
            self._streams[key] = stream(wanted, with_ids=key[1])
        return self._streams[key][num_done + 1 :]

    def answer(self, url: bytes, body: bytes) -> bytes:
        """All that is not generated."""
        if url == b"/in_flight":
            return whole(self.num_streams)
        if url == b"/tokenize":
            return whole({"tokens": list(range(min(len(body) // 4, _CACHED_TOKENS)))})
        if url == b"/kv_event_sources" and self.publisher is not None:
            ends = {"endpoint": self.publisher.endpoint, "topic": ""}
            return whole({"0": {**ends, "replay_endpoint": self.publisher.replay_endpoint}})
        return ANSWERS.get(url, OTHER)


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._chunks: list[bytes] = []
        self._next = 0
        self._timer: asyncio.Handle | None = None
        self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop streaming."""
        del exc
        if self._timer:
            self._timer.cancel()
        if self._next < len(self._chunks):
            self._backend.num_streams -= 1

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        """Wait for a slow reader."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Go on."""
        self._is_paused = False
        if self._next < len(self._chunks):
            self._step()

    def on_message_begin(self) -> None:
        """Forget the request before."""
        self._url, self._body = b"", []

    def on_url(self, url: bytes) -> None:
        """Keep."""
        self._url += url

    def on_body(self, body: bytes) -> None:
        """Keep."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Answer."""
        backend, body = self._backend, b"".join(self._body)
        if self._url == RESUME_PATH.encode():
            asked = msgspec.json.decode(body, type=Resumption)
            self._begin(backend.stream(bytes(asked.body), asked.num_tokens))
        elif not self._url.startswith(b"/v1/chat"):
            self._transport.write(backend.answer(self._url, body))
        elif b'"stream": true' in body or b'"stream":true' in body:
            self._begin(backend.stream(body))
        else:
            self._later(self._transport.write, CHAT)

    def _begin(self, chunks: list[bytes]) -> None:
        self._chunks, self._next = chunks, 0
        self._backend.num_streams += 1
        self._transport.write(_HEAD)
        self._later(self._step)

    def _later(self, function: object, *arguments: object) -> None:
        if self._backend.interval_s:
            self._timer = self._loop.call_later(self._backend.interval_s, function, *arguments)  # type: ignore[arg-type]
        else:
            self._timer = self._loop.call_soon(function, *arguments)  # type: ignore[arg-type]

    def _step(self) -> None:
        self._transport.write(self._chunks[self._next])
        self._next += 1
        if self._next == len(self._chunks):
            self._backend.num_streams -= 1
        elif not self._is_paused:
            self._later(self._step)


def cached_prompt() -> bytes:
    """A batch of KV events: the prompts of the load client, and all longer ones, are cached."""
    tokens = list(range(_CACHED_TOKENS))
    hashes: list[bytes | int] = list(range(1, _CACHED_TOKENS // _BLOCK_SIZE + 1))
    return msgspec.msgpack.encode(Batch(0.0, [BlockStored(hashes, None, tokens, _BLOCK_SIZE)]))


async def _serve(port: int, backend: Backend) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(backend), "127.0.0.1", port)
    await server.serve_forever()


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--interval-ms", type=float, default=0.0)
@click.option("--kv-events", is_flag=True)
def main(port: int, interval_ms: float, kv_events: bool) -> None:
    """Serve until killed."""
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(FakePublisher()) if kv_events else None
        if publisher is not None:
            publisher.publish(cached_prompt())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(port, Backend(interval_ms / 1e3, publisher)))


if __name__ == "__main__":
    main()
