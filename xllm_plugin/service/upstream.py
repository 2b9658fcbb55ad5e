"""Connections to one instance: raw bytes are relayed, a parser only finds where an answer ends."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

import httptools

from xllm_plugin.service.chunks import content_start

if TYPE_CHECKING:
    from xllm_plugin.service.continuation import ArmedStream
    from xllm_plugin.service.exchange import Exchange

__all__ = ["MAX_RESPONSE_HEAD_BYTES", "Pool", "UpstreamConnection"]

MAX_RESPONSE_HEAD_BYTES = 256 * 1024
_HEAD_END: Final = b"\r\n\r\n"
_JOIN_BELOW_BYTES: Final = 64 * 1024


class UpstreamConnection(asyncio.Protocol):
    """One connection.  It serves one exchange at a time and waits in its pool between them."""

    __slots__ = (
        "_collects",
        "_excess",
        "_head",
        "_is_chunked",
        "_open_chunks",
        "_parser",
        "_reading_head",
        "_reusable",
        "_tunnel",
        "_until_close",
        "complete",
        "exchange",
        "held_since_s",
        "idle_since_s",
        "is_at_border",
        "is_open",
        "num_reads",
        "num_uses",
        "pool",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.exchange: Exchange | None = None
        self.is_open = False
        self.num_uses = 0
        self.num_reads = 0
        self.idle_since_s = 0.0
        self.held_since_s = 0.0
        """Since when the head of a stream waits for its first event, if it does."""
        self.complete = True
        self._parser = httptools.HttpResponseParser(self)
        self._head = b""
        self._reading_head = False
        self._until_close = False
        self._excess = False
        self._is_chunked = False
        """Whether the answer comes in chunks, and goes on in chunks."""
        self._open_chunks = 0
        self.is_at_border = False
        """Whether all that has come ends between two chunks of the answer."""
        self._collects = False
        self._reusable = True
        self._tunnel = False

    # -- what an exchange asks ------------------------------------------------------------------

    def begin(self, exchange: Exchange) -> None:
        """Send the request and relay its answer to `exchange`."""
        self.exchange = exchange
        self.num_uses += 1
        self.num_reads = 0
        self.complete = False
        self._reading_head = True
        self._open_chunks = 0
        self.is_at_border = False
        if exchange.stream is not None:
            exchange.stream.restart()
            self._parser = httptools.HttpResponseParser(_Collector(self, exchange.stream))
            self._collects = True
        elif self._collects:
            self._parser = httptools.HttpResponseParser(self)
            self._collects = False
        if exchange.client.is_write_paused:
            self.transport.pause_reading()
        head, body = exchange.head, exchange.body
        if len(body) < _JOIN_BELOW_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    @property
    def holds_head(self) -> bool:
        """Whether the head of a stream has come, and waits for its first event."""
        return self._reading_head and self._head.endswith(_HEAD_END)

    def abandon(self) -> None:
        """The exchange is over on the client's side: stop the instance's work at once."""
        self.exchange = None
        self.transport.abort()

    # -- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The instance has accepted."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's derives from nothing
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Bytes from the instance."""
        exchange = self.exchange
        if exchange is None:
            # Nothing was asked: an answer to nobody must never reach the next one who asks.
            self.transport.abort()
            return
        self.num_reads += 1
        start = content_start(data) if self.is_at_border else 0
        if start and exchange.stream is None:
            exchange.relay(data)
        elif start and exchange.relay_token(data, start):
            return
        elif self._reading_head:
            self._receive_head(exchange, data)
        else:
            self._relay(exchange, data)

    def eof_received(self) -> None:
        """Close: an instance that sends no more is of no use."""
        return

    def connection_lost(self, exc: Exception | None) -> None:
        """The instance has closed, or the connection broke."""
        self.is_open = False
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        if self._until_close and exc is None and not self._reading_head:
            exchange.answered(close=True)
        elif self._tunnel:
            exchange.tunnel_closed()
        elif self._reading_head:
            is_stale = self.num_uses > 1 and not self.num_reads
            exchange.attempt_failed(
                "closed",
                "closed the connection before it answered",
                is_stale=is_stale,
                connection=self,
            )
        else:
            exchange.broken(self, "the instance closed the connection in mid-answer")

    def pause_writing(self) -> None:
        """The instance reads too slowly; only a tunnel can be held back."""
        exchange = self.exchange
        if self._tunnel and exchange is not None:
            exchange.client.transport.pause_reading()

    def resume_writing(self) -> None:
        """The instance has caught up."""
        exchange = self.exchange
        if self._tunnel and exchange is not None:
            exchange.client.transport.resume_reading()

    # -- httptools ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self.complete:
            self._excess = True

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._reusable = self._parser.should_keep_alive()  # afterwards the parser has forgotten

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self._open_chunks += 1

    def on_chunk_complete(self) -> None:
        """A chunk is whole."""
        self._open_chunks -= 1

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self.complete = True

    # -- parts ----------------------------------------------------------------------------------

    def _receive_head(self, exchange: Exchange, data: bytes) -> None:
        data = self._head + data if self._head else data
        end = data.find(_HEAD_END)
        while end >= 0 and data[9:10] == b"1" and data[9:12] != b"101":
            data = data[end + 4 :]  # 100 Continue and 103 Early Hints are for us alone
            end = data.find(_HEAD_END)
        if end < 0:
            self._head = data
            if len(data) > MAX_RESPONSE_HEAD_BYTES:
                self._fail(exchange, f"its headers are over {MAX_RESPONSE_HEAD_BYTES} bytes")
            elif not data.startswith(b"HTTP/1."[: len(data)]):
                self._fail(exchange, "its answer is not HTTP")
            return
        end += 4
        is_hedgeable = exchange.hedging is not None and exchange.hedging.is_open
        if is_hedgeable and end == len(data) and _is_event_stream(data):
            self.held_since_s = exchange.proxy.loop.time()
            self._head = data  # whose first event comes first is relayed, not whose head does
            return
        self._head = b""
        self._answer(exchange, data, end)

    def _answer(self, exchange: Exchange, data: bytes, end: int) -> None:
        head = data[:end]
        if exchange.unframes:
            # An HTTP/1.0 client knows no chunks: only here are bodies taken out of them.
            self._parser = httptools.HttpResponseParser(_Unframer(self, exchange))
        try:
            self._parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError as error:
            self._fail(exchange, f"its answer is not HTTP: {error}")
            return
        status = self._parser.get_status_code()
        if status == 101:  # noqa: PLR2004
            self._begin_tunnel(exchange, head, data[end:])
            return
        lower = head.lower()
        self._frame(exchange, status, lower)
        answer = exchange.begin_answer(
            status, head, lower, until_close=self._until_close, connection=self
        )
        if answer is None:
            self.abandon()
            return
        head = answer
        self._reading_head = False
        if head and (len(data) == end or exchange.unframes):
            exchange.relay_head(head)
            head = b""
        if len(data) > end:
            self._relay(exchange, data[end:], head)
        elif self.complete:
            self._finish(exchange)

    def _frame(self, exchange: Exchange, status: int, lower: bytes) -> None:
        """Find out what ends the answer, and whether the connection lives on."""
        has_no_body = status in (204, 304) or exchange.method == b"HEAD"
        is_coded = b"\r\ntransfer-encoding:" in lower
        self._until_close = not (is_coded or b"\r\ncontent-length:" in lower or has_no_body)
        self._is_chunked = is_coded and not exchange.unframes and _is_chunked(lower)
        self.is_at_border = self._is_chunked
        if exchange.unframes:
            self._reusable = False
        if exchange.method == b"HEAD":
            self._reusable = False  # the parser waits for a body that does not come
            self.complete = True

    def _relay(self, exchange: Exchange, data: bytes, head: bytes = b"") -> None:
        """Pass `data` on, with `head` if that was not sent yet: one system call, not two."""
        why = "" if self._tunnel else self._parse(data)
        if why and head:
            self._fail(exchange, f"sent what is no answer: {why}")
            return
        if why:
            exchange.broken(self, f"the instance sent what is no answer: {why}")
            return
        is_between = self._is_chunked and not self._open_chunks
        self.is_at_border = is_between and data.endswith(b"\r\n")
        stream = exchange.stream
        if stream is not None:
            why = exchange.relay_events(head, is_last=self.complete)
            if why and stream.is_begun:
                exchange.broken(self, why)
                return
            if why:
                self._fail(exchange, why)
                return
        elif not exchange.unframes:
            exchange.relay(data, head)
        if self.complete:
            self._finish(exchange)

    def _parse(self, data: bytes) -> str:
        """Follow the answer; returns what is wrong with it, or nothing."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            return str(error)
        return "more than one answer" if self._excess else ""

    def _finish(self, exchange: Exchange) -> None:
        self.exchange = None
        is_sent = not self.transport.get_write_buffer_size()
        if self._reusable and is_sent and not self._until_close:
            if exchange.client.is_write_paused:
                self.transport.resume_reading()
            self.pool.give(self)
        else:
            self.transport.close()
        exchange.answered(close=False)

    def _fail(self, exchange: Exchange, reason: str) -> None:
        self.abandon()
        exchange.attempt_failed("garbage", reason, connection=self)

    def _begin_tunnel(self, exchange: Exchange, head: bytes, rest: bytes) -> None:
        if not exchange.upgrades:
            self._fail(exchange, "it switched protocols without being asked to")
            return
        self._tunnel = True
        self._reading_head = False
        self._reusable = False
        self.complete = False
        exchange.begin_tunnel(head + rest)


class _Collector:
    """Parser callbacks that collect the body for an armed stream."""

    def __init__(self, connection: UpstreamConnection, stream: ArmedStream) -> None:
        self.on_message_begin = connection.on_message_begin
        self.on_headers_complete = connection.on_headers_complete
        self.on_chunk_header = connection.on_chunk_header
        self.on_chunk_complete = connection.on_chunk_complete
        self.on_message_complete = connection.on_message_complete
        self.on_body = stream.parts.append


def _is_event_stream(head: bytes) -> bool:
    return b"\r\ncontent-type: text/event-stream" in head.lower()


def _is_chunked(lower: bytes) -> bool:
    """Whether nothing but chunks frames the answer with this head, as everybody would read it."""
    return (
        b"\r\ntransfer-encoding: chunked\r\n" in lower
        and lower.count(b"\r\ntransfer-encoding:") == 1
    )


class _Unframer:
    """Parser callbacks that pass the body on without its chunk framing."""

    def __init__(self, connection: UpstreamConnection, exchange: Exchange) -> None:
        self.on_message_begin = connection.on_message_begin
        self.on_message_complete = connection.on_message_complete
        self.on_body = exchange.relay


class Pool:
    """Idle connections to one instance, the one used last first."""

    def __init__(
        self, host: str, port: int, *, tls: ssl.SSLContext | None, connect_timeout_s: float
    ) -> None:
        self._address = (host, port)
        self._tls = tls
        self.connect_timeout_s = connect_timeout_s
        self._idle: deque[UpstreamConnection] = deque()
        self._loop: Any = None

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> UpstreamConnection | None:
        """An open connection, or None."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and not connection.transport.is_closing():
                return connection
        return None

    def give(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose answer is complete."""
        connection.idle_since_s = asyncio.get_running_loop().time()
        self._idle.append(connection)

    async def adopt(self, opened: socket.socket) -> UpstreamConnection:
        """A connection that is open already, to who stands in for the instance."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(
            lambda: UpstreamConnection(self), sock=opened
        )
        return connection

    async def connect(self) -> UpstreamConnection:
        """Open a connection.

        Raises:
            OSError: it was refused, or not accepted in time (`TimeoutError`).
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.connect_timeout_s):
            _, connection = await loop.create_connection(
                lambda: UpstreamConnection(self), *self._address, ssl=self._tls
            )
        return connection

    def close_idle(self, before_s: float = float("inf")) -> None:
        """Close connections that are idle since before `before_s`, and forget closed ones."""
        kept: deque[UpstreamConnection] = deque()
        for connection in self._idle:
            if connection.is_open and connection.idle_since_s >= before_s:
                kept.append(connection)
            elif connection.is_open:
                connection.transport.close()
        self._idle = kept
