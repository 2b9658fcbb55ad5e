"""An instance with faults on demand: a real server on a real socket, played by a script.

::

    async with FakeInstance() as instance:
        instance.script = drop_before_answer
        ...
        instance.requests[-1].body

It answers `/health`, `/v1/models`, `/metrics`, `/kv_event_sources` and probes of scale-out routes
as vLLM does, `/xllm/load` as this plugin does, and everything else by its script.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

__all__ = [
    "FakeInstance",
    "Received",
    "Script",
    "answer",
    "answer_raw",
    "chunked",
    "stream",
]

_SCALE_OUT = ("/inference/v1/generate", "/v1/completions/derender")
"""Asked by probes with an empty object."""


@dataclass(slots=True)
class Received:
    """One request as it came off the socket."""

    head: bytes
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the peer has closed the connection before the answer was complete."""

    @property
    def target(self) -> bytes:
        """Of the request line."""
        return self.head.split(b" ", 2)[1]

    def headers(self) -> dict[str, str]:
        """By lower-case name."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        pairs = (line.split(":", 1) for line in lines if line)
        return {name.lower(): value.strip() for name, value in pairs}


Script = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def chunked(parts: Iterable[bytes]) -> bytes:
    """The chunked coding of `parts`, with its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def answer(body: bytes = b"{}", status: str = "200 OK", headers: Iterable[str] = ()) -> Script:
    """A whole answer with a length."""
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", "")
    return answer_raw("\r\n".join(lines).encode("latin-1") + body)


def answer_raw(*parts: bytes, close: bool = False, pause_s: float = 0.0) -> Script:
    """Bytes as they are, one write each; then the connection stays or is closed."""

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            if pause_s:
                await asyncio.sleep(pause_s)
        if close:
            writer.close()

    return script


def stream(*events: bytes, pause_s: float = 0.0) -> Script:
    """Server-sent events, one chunk each."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    return answer_raw(head, *chunks, b"0\r\n\r\n", pause_s=pause_s)


class FakeInstance:
    """One server on loopback.

    Args:
        models: names that /v1/models gives.
        script: what to do with a request.
        port: 0 takes a free one.
        tls: speaks HTTPS with it.
    """

    def __init__(
        self,
        *,
        models: Iterable[str] = ("fake",),
        script: Script | None = None,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.models = tuple(models)
        self.script = script or answer()
        self.port = port
        self.tls = tls
        self.is_healthy = True
        self.metrics = ""
        self.kv_event_sources: dict[str, dict[str, str]] = {}
        """Data-parallel rank -> where it says that it publishes its cache."""
        self.heartbeat: dict[str, object] | None = None
        """What /xllm/load tells; None: it is a plain server."""
        self.scales_out = False
        """Whether it has vLLM's routes of `--enable-scale-out`; they are answered by its script."""
        self.lies: dict[str, bytes] = {}
        """What it answers to probes instead of the above, by path."""
        self.num_lies = 0
        """Probes that were answered so."""
        self.requests: list[Received] = []
        self.num_connections = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Stop listening and cut every connection, as a killed process does."""
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while not writer.is_closing():
                await self._serve_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the peer has closed, or `die` was called
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = Received(head, b"")
        length = int(request.headers().get("content-length", "0"))
        request.body = await reader.readexactly(length)
        if await self._answer_own(request, writer):
            return
        self.requests.append(request)
        watch = asyncio.ensure_future(self._watch(reader, request))
        try:
            with contextlib.suppress(ConnectionError):
                await self.script(request, writer)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, reader: asyncio.StreamReader, request: Received) -> None:
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.002)
        request.gone.set()

    async def _answer_own(self, request: Received, writer: asyncio.StreamWriter) -> bool:
        path = request.target.decode("latin-1").split("?")[0]
        if path in self.lies:
            self.num_lies += 1
            await answer(self.lies[path])(request, writer)
        elif path == "/health":
            status = "200 OK" if self.is_healthy else "503 Service Unavailable"
            await answer(b"", status)(request, writer)
        elif path == "/v1/models":
            records = [{"id": name, "object": "model", "root": self.url} for name in self.models]
            body = json.dumps({"object": "list", "data": records}).encode()
            await answer(body)(request, writer)
        elif path == "/kv_event_sources":
            await answer(json.dumps(self.kv_event_sources).encode())(request, writer)
        elif path == "/xllm/load":
            status = "200 OK" if self.heartbeat else "404 Not Found"
            await answer(json.dumps(self.heartbeat or {}).encode(), status)(request, writer)
        elif path in _SCALE_OUT and request.body == b"{}":
            status = "400 Bad Request" if self.scales_out else "403 Forbidden"
            await answer(b"{}", status)(request, writer)
        elif path == "/metrics":
            await answer(self.metrics.encode())(request, writer)
        else:
            return False
        return True
