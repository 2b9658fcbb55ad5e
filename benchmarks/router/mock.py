"""A backend that costs little: answers like vLLM, with a pace of its own.

``python mock.py --port N [--interval-ms 10]``; with an interval, a stream's first event and every
one after it wait that long, and an answer that is not streamed waits once.
"""

from __future__ import annotations

import asyncio
import json
from typing import cast

import click
import httptools
import uvloop

NUM_EVENTS = 64
_EVENT = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"mock",'
_EVENT += b'"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
_HEAD += b"transfer-encoding: chunked\r\n\r\n"


def whole(payload: object, content_type: str = "application/json") -> bytes:
    """An answer with a length."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


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


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._left = 0
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

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        """Wait for a slow reader."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Go on."""
        self._is_paused = False
        if self._left:
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
        if not self._url.startswith(b"/v1/chat"):
            self._transport.write(ANSWERS.get(self._url, OTHER))
            return
        body = b"".join(self._body)
        if b'"stream": true' not in body and b'"stream":true' not in body:
            self._later(self._transport.write, CHAT)
            return
        self._left = NUM_EVENTS + 1
        self._transport.write(_HEAD)
        self._later(self._step)

    def _later(self, function: object, *arguments: object) -> None:
        if self._interval_s:
            self._timer = self._loop.call_later(self._interval_s, function, *arguments)  # type: ignore[arg-type]
        else:
            self._timer = self._loop.call_soon(function, *arguments)  # type: ignore[arg-type]

    def _step(self) -> None:
        self._left -= 1
        self._transport.write(_CHUNK if self._left else _LAST)
        if self._left and not self._is_paused:
            self._later(self._step)


async def _serve(port: int, interval_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(interval_s), "127.0.0.1", port)
    await server.serve_forever()


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--interval-ms", type=float, default=0.0)
def main(port: int, interval_ms: float) -> None:
    """Serve until killed."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(port, interval_ms / 1e3))


if __name__ == "__main__":
    main()
