"""One client's connection: bytes in, requests out, answers in the order of their requests.

Rule 1: what is sent to an instance is built from what the parser understood, never copied from the
client's bytes, so that both read the same request (no request smuggling).
Rule 2: headers that are about this connection (RFC 9110, 7.6.1) stay here.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import httptools

from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.exchange import Exchange
from xllm_plugin.service.flow.wishes import HEADERS, TENANT_HEADER
from xllm_plugin.service.held_bodies import LARGE_BYTES, HeldBodies
from xllm_plugin.service.keys import Account, Grant, KeyRing
from xllm_plugin.service.known_head import KnownHead
from xllm_plugin.service.replies import Refusal, json_reply, unknown_model
from xllm_plugin.service.routes import Kind, Route, route_of

if TYPE_CHECKING:
    from xllm_plugin.service.proxy import Proxy

__all__ = ["ClientConnection", "HeadersOfNote", "headers_of_note"]

logger = logging.getLogger(__name__)

EXPLAIN_HEADER = b"x-xllm-explain"
TRACE_HEADERS = frozenset({b"traceparent", b"tracestate"})  # W3C Trace Context
_NEVER: Final = float("inf")
_NO_PROMISES: dict[str, str] = {}
_LINGER_S: Final = 2.0
_MAX_EARLY_BYTES: Final = 64 * 1024
_SMALL_PART_BYTES: Final = 4096
"""Of a body: those below are put together as they come."""
_CONNECTION_HEADERS: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te"),
        *(b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"content-length"),
    }
)
_AUTHORIZATION: Final = b"authorization"
_ONLY_ONCE: Final = frozenset({b"host", b"content-length", b"transfer-encoding", _AUTHORIZATION})
_REQUEST_ID: Final = b"x-request-id"
_NOTED_HEADERS: Final = frozenset(
    {_REQUEST_ID, b"x-xllm-class", b"x-xllm-ttft-ms", b"x-xllm-tpot-ms", *TRACE_HEADERS}
)


class HeadersOfNote(NamedTuple):
    """Names in lower case: what is read here, and which of that goes no further."""

    read: frozenset[bytes]
    stay: frozenset[bytes]


def headers_of_note(config: ServiceConfig, *, traces: bool) -> HeadersOfNote:
    """What the settings make of note: a header nobody asks for is passed on unread.

    Args:
        config: in force.
        traces: whether requests get a span, whose own context takes the place of the client's.
    """
    stay = {*_CONNECTION_HEADERS, EXPLAIN_HEADER, *(TRACE_HEADERS if traces else ())}
    session = config.routing.session_header.lower().encode("latin-1")
    read = {b"host", b"content-type", session, *_NOTED_HEADERS}
    if config.flow.enabled or config.keys.file is not None:
        read |= HEADERS.keys()
    if config.keys.file is not None:
        read.add(_AUTHORIZATION)
        stay |= {TENANT_HEADER} if config.keys.forward else {TENANT_HEADER, _AUTHORIZATION}
    return HeadersOfNote(frozenset(read | stay), frozenset(stay))


class _RefusedError(Exception):
    """Carries a refusal out of a parser callback."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class ClientConnection(asyncio.Protocol):
    """Parses requests, holds them while an earlier one is answered, passes pressure on."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_head_bytes",
        "_headers",
        "_held",
        "_ignores_input",
        "_incoming",
        "_is_lingering",
        "_is_reading_paused",
        "_is_starting",
        "_known",
        "_learns_from",
        "_method",
        "_overhead_bytes",
        "_parser",
        "_remaining_bytes",
        "_shown",
        "_target",
        "_tunnel",
        "_upgrading",
        "_waiting",
        "deadline_s",
        "exchange",
        "is_write_paused",
        "paused_s",
        "peer",
        "proxy",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.exchange: Exchange | None = None
        self.is_write_paused = False
        self.paused_s = 0.0
        """Since when it takes nothing, if `is_write_paused`."""
        self.peer: Any = None
        """Address, and port, as the socket gives them."""
        self.deadline_s = _NEVER
        self._shown: tuple[object, bytes, Account] | None = None
        """The keys in force when a key was shown, its header, and whose it is."""
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Exchange] = deque()
        self._incoming: Exchange | None = None
        self._method = b""
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = -1
        self._known: KnownHead | None = None
        """What the last request's head was understood as."""
        self._learns_from: bytes | None = b""
        """What was read from the first byte of a head on; None: they are compared no more."""
        self._body: list[bytes | bytearray] = []
        self._body_bytes = 0
        self._overhead_bytes = 0
        self._remaining_bytes = 0
        self._held = HeldBodies(proxy.bodies)
        self._ignores_input = False
        self._is_lingering = False
        self._is_reading_paused = False
        self._is_starting = False
        self._upgrading: Exchange | None = None
        self._tunnel: asyncio.Transport | None = None

    @property
    def is_idle(self) -> bool:
        """Between two requests."""
        return self.exchange is None and not self._waiting and self._head_bytes < 0

    # -- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's derives from nothing
        self.deadline_s = self.proxy.loop.time() + self.proxy.config.timeouts.header_s
        self.peer = transport.get_extra_info("peername")
        self.proxy.clients.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._tunnel is not None:
            self._tunnel.write(data)
            return
        if self._ignores_input:
            return
        if self._upgrading is not None:
            self._keep_early(self._upgrading, data)
            return
        if self._remaining_bytes:
            self._take_body(data)
        else:
            self._feed(data)
        if self._head_bytes >= 0 and not self._ignores_input:
            self._in_mid_request(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        del exc
        self.proxy.clients.discard(self)
        self._waiting.clear()
        self._held.close()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.is_write_paused = True
        self.paused_s = self.proxy.loop.time()
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.is_write_paused = False
        if self.exchange is not None:
            self.exchange.resume()

    # -- httptools ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._target = b""
        self._headers = []
        self._head_bytes = 0
        self._incoming = None

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if self._incoming is None:  # else a trailer, which nobody here reads
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        try:
            self._incoming = self._understand()
        except Refusal as refusal:
            raise _RefusedError(refusal) from None
        self._body_bytes = self._overhead_bytes = 0
        if self._learns_from:
            self._known = KnownHead.of(self._learns_from, self._headers, self._incoming)
            self._learns_from = b""

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._body_bytes += len(body)
        if self._body_bytes > self.proxy.config.limits.max_body_bytes:
            raise _RefusedError(self._body_too_large())
        self._overhead_bytes -= len(body)
        parts = self._body
        if not parts or len(body) >= _SMALL_PART_BYTES:
            parts.append(body)
            return
        last = parts[-1]  # an object for each small part would take many times its length
        if isinstance(last, bytearray) and len(last) < LARGE_BYTES:
            last += body
        else:
            parts.append(bytearray(body))

    def on_message_complete(self) -> None:
        """The request is whole."""
        exchange = self._incoming
        assert exchange is not None
        self._incoming = None
        self._head_bytes = -1
        self.deadline_s = _NEVER
        body = self._body
        first = body[0] if len(body) == 1 else None
        exchange.body = first if isinstance(first, bytes) else b"".join(body)
        self._body = []
        if self._parser.should_upgrade():
            if not exchange.upgrades:
                return  # `_upgrade` reads it again
            self._upgrading = exchange
        length = len(exchange.body)
        if length or exchange.method not in (b"GET", b"HEAD", b"OPTIONS", b"DELETE"):
            exchange.head += b"content-length: %d\r\n\r\n" % length
        else:
            exchange.head += b"\r\n"
        if length > LARGE_BYTES:
            exchange.body_bytes = length
            if not self._held.whole(length):
                self._turn_away(exchange)
        self._waiting.append(exchange)
        self._advance()

    # -- what an exchange asks ------------------------------------------------------------------

    def exchange_done(self, exchange: Exchange) -> None:
        """Its answer is written: close, or go on with the next request."""
        self.exchange = None
        if exchange.body_bytes > LARGE_BYTES:
            self._held.done(exchange.body_bytes)
        if not exchange.keep_alive or self.proxy.is_draining:
            self._waiting.clear()
            self.close()
            return
        timeouts = self.proxy.config.timeouts
        self.deadline_s = self.proxy.loop.time() + (
            timeouts.client_idle_s if self._head_bytes < 0 else timeouts.body_s
        )
        if self._is_reading_paused and not self._has_read_ahead():
            self._is_reading_paused = False
            self.transport.resume_reading()
        self._advance()

    def begin_tunnel(self, upstream: asyncio.Transport) -> None:
        """From here on what the client sends goes to `upstream` as it is."""
        self._tunnel = upstream
        self.transport.resume_reading()

    def close(self) -> None:
        """Close once what is written has been read; discard what still comes until then."""
        if self.transport.is_closing() or self._is_lingering:
            return
        self._ignores_input = True
        if self._head_bytes < 0:
            self.transport.close()
            return
        # Closing with unread bytes would reset the connection under our last answer.
        self._is_lingering = True
        self.deadline_s = self.proxy.loop.time() + _LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def abort(self) -> None:
        """Cut the connection: the client has to see that its answer is not whole."""
        self.transport.abort()

    def timed_out(self) -> None:
        """The deadline has passed."""
        if self._is_lingering or self.is_idle:
            self.transport.close()
            return
        self.deadline_s = _NEVER
        leg = "headers" if self._incoming is None else "body"
        self._refuse(Refusal(408, f"The request's {leg} did not arrive in time.", close=True))

    # -- parts ----------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        if self._head_bytes < 0 and self._learns_from is not None:
            if self._known is not None and not self._known.is_in_force(self.proxy):
                self._known = None
            if self._known is not None and (end := self._recall(self._known, data)):
                if len(data) > end and not self._ignores_input:
                    # However many requests these are, the parser reads them in one go.
                    self._parse(data[end:])
                return
            # Heads of a client that sends several kinds would be compared in vain.
            self._learns_from = data if self._known is None else None
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if isinstance(cause, _RefusedError):
                cause.refusal.close = True
                self._refuse(cause.refusal)
            else:
                logger.exception("a request could not be handled; please report this")
                self._ignores_input = True
                self.abort()
        except httptools.HttpParserError as error:
            self._refuse(Refusal(400, f"Not a valid HTTP/1.1 request: {error}.", close=True))

    def _recall(self, known: KnownHead, data: bytes) -> int:
        """Begin a request whose head is the last one's.

        Returns how much of `data` is of it; 0 if it is another one's.
        """
        length, begin = known.read(data)
        config = self.proxy.config
        if not 0 <= length <= config.limits.max_body_bytes:
            return 0
        self._incoming = known.again(self, length)
        part = data[begin : begin + length]
        self._head_bytes = 0
        self._body = [part] if part else []
        self._body_bytes, self._overhead_bytes = len(part), -len(part)
        self._remaining_bytes = length - len(part)
        if self._remaining_bytes:
            self.deadline_s = self.proxy.loop.time() + config.timeouts.body_s
        else:
            self.on_message_complete()
        return begin + len(part)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer in turn with an error, and take nothing more from this client."""
        exchange = self._asked()
        exchange.draw = random.getrandbits(64)
        exchange.keep_alive = False
        exchange.refusal = refusal
        self._held.drop()
        self._body = []
        self._ignore_input()
        self._waiting.append(exchange)
        self._advance()

    def _turn_away(self, exchange: Exchange) -> None:
        """Its body is whole, and there is no room for it."""
        self._held.done(exchange.body_bytes)
        exchange.body, exchange.body_bytes = b"", 0
        exchange.refusal = self._bodies_too_many()
        self._ignore_input()

    def _ignore_input(self) -> None:
        self._ignores_input = True
        self._head_bytes = max(self._head_bytes, 0)  # something may be unread: linger

    def _asked(self) -> Exchange:
        """An exchange for the request that is being read, as far as that is known."""
        incoming = self._incoming
        if incoming is not None:
            exchange = Exchange(self, incoming.method, incoming.route)
            exchange.noted = incoming.noted
        elif self._head_bytes >= 0 and self._headers:  # its request line is whole
            exchange = Exchange(self, self._parser.get_method(), _route_to_name(self._target))
            names = {name.lower(): value for name, value in self._headers}
            exchange.noted = {_REQUEST_ID: names[_REQUEST_ID]} if _REQUEST_ID in names else {}
        else:
            exchange = Exchange(self, b"", _NO_ROUTE)
        return exchange

    def _advance(self) -> None:
        """Start waiting requests, one after the other."""
        if self._is_starting:
            return
        self._is_starting = True
        try:
            while self.exchange is None and self._waiting:
                self.exchange = exchange = self._waiting.popleft()
                self._start(exchange)
        finally:
            self._is_starting = False
        if self._has_read_ahead() and not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pause_reading()

    def _has_read_ahead(self) -> bool:
        """Whether enough requests wait, by number or by size."""
        waiting = self._waiting
        limit = self.proxy.config.limits.max_pipelined
        return bool(waiting) and (len(waiting) >= limit or waiting[-1].body_bytes > LARGE_BYTES)

    def _start(self, exchange: Exchange) -> None:
        self.deadline_s = _NEVER
        exchange.started_s = self.proxy.loop.time()
        if self.proxy.is_draining:
            exchange.keep_alive = False
        if exchange.refusal is None:
            exchange.prepare()
        if exchange.refusal is not None:
            exchange.refuse(exchange.refusal)
            return
        kind = exchange.route.kind
        if kind is Kind.HEALTH:
            self._answer_health(exchange)
        elif kind is Kind.MODELS and exchange.method in (b"GET", b"HEAD"):
            self._answer_models(exchange)
        else:
            self.proxy.dispatch(exchange)

    def _answer_health(self, exchange: Exchange) -> None:
        if self.proxy.fleet.candidates(None):
            exchange.status = 200
            exchange.answer(json_reply({"status": "ok"}, close=not exchange.keep_alive))
        else:
            exchange.refuse(self.proxy.router.no_instance("none is ready"))

    def _answer_models(self, exchange: Exchange) -> None:
        models = self.proxy.fleet.models()
        wanted = exchange.route.path.removeprefix("/v1/models").strip("/")
        if not wanted:
            payload: object = {"object": "list", "data": list(models.values())}
        elif wanted in models:
            payload = models[wanted]
        else:
            exchange.refuse(unknown_model(wanted, models))
            return
        exchange.status = 200
        exchange.answer(json_reply(payload, close=not exchange.keep_alive))

    def _in_mid_request(self, num_bytes: int) -> None:
        """Part of a request has come: bound its size and its time."""
        if self._incoming is not None:
            self._expect_body(self._incoming)
            # Chunk extensions and trailers are not body, and not free either.
            self._overhead_bytes += num_bytes
            if self._overhead_bytes > self.proxy.config.limits.max_body_bytes:
                self._refuse(self._body_too_large())
            elif self._body_bytes > LARGE_BYTES and not self._held.read(self._body_bytes):
                self._refuse(self._bodies_too_many())
            return
        self._head_bytes += num_bytes
        if self._head_bytes > self.proxy.config.limits.max_header_bytes:
            self._refuse(self._head_too_large())
        elif self._head_bytes == num_bytes and self.exchange is None:
            self.deadline_s = self.proxy.loop.time() + self.proxy.config.timeouts.header_s

    def _expect_body(self, exchange: Exchange) -> None:
        """Take the rest of a large body of known length past the parser, which would copy it."""
        remaining = exchange.body_bytes - self._body_bytes
        if remaining > LARGE_BYTES and not self._remaining_bytes:
            self._remaining_bytes = remaining
            self._parser = httptools.HttpRequestParser(self)

    def _take_body(self, data: bytes) -> None:
        rest = b""
        if len(data) > self._remaining_bytes:
            data, rest = data[: self._remaining_bytes], data[self._remaining_bytes :]
        self._remaining_bytes -= len(data)
        self._body_bytes += len(data)
        self._overhead_bytes -= len(data)
        self._body.append(data)
        if not self._remaining_bytes:
            self.on_message_complete()
            if rest:
                self._feed(rest)

    def _understand(self) -> Exchange:
        """Turn a parsed head into an exchange.

        Raises:
            Refusal: it is refused by its head alone.
        """
        parser = self._parser
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise Refusal(505, f"HTTP/{version} is not spoken here; use HTTP/1.1.", close=True)
        self._method = method = parser.get_method()
        if method == b"CONNECT":
            raise Refusal(405, "CONNECT is not supported: this is no forward proxy.", close=True)
        route = route_of(self._target)
        if route.kind is Kind.CONTROL:
            raise Refusal(
                403,
                f"{route.path} steers an instance and is not served on this port. "
                "Operators reach it through the service's admin port.",
            )
        exchange = Exchange(self, method, route)
        exchange.unframes = version == "1.0"
        exchange.keep_alive = version == "1.1" and parser.should_keep_alive()
        lines = [method, b" ", route.target, b" HTTP/1.1\r\n"]
        special = self._sort(lines)
        self._heed_caller(exchange, special)
        self._heed(exchange, special, lines, version)
        if b"host" not in special:  # of HTTP/1.0; what goes on is HTTP/1.1, which needs one
            lines.append(b"host: \r\n")
        if exchange.grant is not None:  # last, where no `Connection: authorization` drops it
            lines += (exchange.grant.account.tenant_line, self.proxy.instances_key_line)
        exchange.head = b"".join(lines)
        if len(exchange.head) > self.proxy.config.limits.max_header_bytes:
            raise self._head_too_large()
        return exchange

    def _sort(self, lines: list[bytes]) -> dict[bytes, bytes]:
        """Add what goes on to the instance to `lines`; return what is for us, by lower-case name.

        Raises:
            Refusal: a header is given twice that two readers could take differently.
        """
        special: dict[bytes, bytes] = {}
        read_headers, stay_here = self.proxy.headers_of_note
        for name, value in self._headers:
            key = name.lower()
            if key in read_headers:
                if key not in special:
                    special[key] = value
                elif key in _ONLY_ONCE:
                    raise Refusal(400, f"Header {key.decode()} is given twice.", close=True)
                else:
                    special[key] += b", " + value
                if key in stay_here:
                    continue
            lines += (name, b": ", value, b"\r\n")
        return special

    def _heed(
        self, exchange: Exchange, special: dict[bytes, bytes], lines: list[bytes], version: str
    ) -> None:
        """Act on the headers that are about this connection or for us."""
        if version == "1.1" and b"host" not in special:
            raise Refusal(400, "An HTTP/1.1 request needs a Host header.", close=True)
        connection = special.get(b"connection")
        if connection is not None and connection.lower() not in (b"keep-alive", b"close"):
            self._heed_connection(exchange, connection, special, lines)
        exchange.noted = special
        exchange.content_type = special.get(b"content-type", b"").lower()
        exchange.wants_reason = EXPLAIN_HEADER in special
        session = special.get(self.proxy.session_header)
        if session is not None:
            exchange.session_key = session.decode("latin-1")
        coding = special.get(b"transfer-encoding")
        if coding is not None and (version == "1.0" or coding.lower() != b"chunked"):
            raise Refusal(
                501, f"Transfer-Encoding {coding[:40]!r}: only 'chunked' is read.", close=True
            )
        length = int(special.get(b"content-length", b"0"))
        if length > self.proxy.config.limits.max_body_bytes:
            raise self._body_too_large()
        exchange.body_bytes = length
        if length or coding is not None:
            self.deadline_s = self.proxy.loop.time() + self.proxy.config.timeouts.body_s
        if special.get(b"expect", b"").lower() == b"100-continue" and self.exchange is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _heed_caller(self, exchange: Exchange, special: dict[bytes, bytes]) -> None:
        """Who asks, and what they were promised.  Raises `Refusal`: 401, nobody we know."""
        keys = self.proxy.keys
        # As vLLM has it: browsers ask what they may without a key.
        is_open = exchange.route.kind is Kind.HEALTH or exchange.method == b"OPTIONS"
        if keys is not None and not is_open:
            exchange.grant = Grant(self._account(keys, special.get(_AUTHORIZATION, b"")))
        if special.keys().isdisjoint(HEADERS):
            exchange.promised = _NO_PROMISES
            return
        exchange.promised = {
            HEADERS[name]: value.decode("latin-1")
            for name, value in special.items()
            if name in HEADERS
        }

    def _account(self, keys: KeyRing, authorization: bytes) -> Account:
        """Whose the key in a header is, hashed once for a connection.

        It is compared with what this same client has shown before, never with what another one
        has: how long that takes tells nothing that the client does not know.
        """
        shown = self._shown
        if shown is not None and shown[0] is keys.edition and shown[1] == authorization:
            return shown[2]
        account = keys.account(authorization)
        self._shown = (keys.edition, authorization, account)
        return account

    def _heed_connection(
        self,
        exchange: Exchange,
        connection: bytes,
        special: dict[bytes, bytes],
        lines: list[bytes],
    ) -> None:
        named = {token.strip().lower() for token in connection.split(b",")}
        if b"upgrade" in named and special.get(b"upgrade", b"").lower() == b"websocket":
            exchange.upgrades = True
            lines += (b"connection", b": ", b"Upgrade\r\nupgrade: websocket", b"\r\n")
            return
        # Lines of four parts each, after the four of the request line.
        for start in range(4, len(lines), 4):
            if lines[start].lower() in named and lines[start].lower() != b"host":
                lines[start : start + 4] = (b"", b"", b"", b"")

    def _upgrade(self, rest: bytes) -> None:
        """The parser has stopped after a head that asks for another protocol."""
        self._parser = httptools.HttpRequestParser(self)
        if self._upgrading is not None:
            self._keep_early(self._upgrading, rest)
            return
        # Only WebSocket is relayed.  Other wishes are ignored, as RFC 9110, 7.8 allows (Java's
        # client asks for h2c each time): read the same request again without its wish.
        kept = [
            b"%b: %b\r\n" % (name, value)
            for name, value in self._headers
            if name.lower() not in (b"connection", b"upgrade", b"http2-settings")
        ]
        head = b"%b %b HTTP/1.1\r\n%b\r\n"
        # Nobody sent this head; a body is to follow in the parser that has read it.
        self._learns_from = None
        self._parse(head % (self._method, self._target, b"".join(kept)))
        if rest and not self._ignores_input:
            self._parse(rest)

    def _keep_early(self, exchange: Exchange, data: bytes) -> None:
        if exchange.is_done:
            return
        exchange.early += data
        if len(exchange.early) > _MAX_EARLY_BYTES:
            self.transport.pause_reading()

    def _head_too_large(self) -> Refusal:
        limit = self.proxy.config.limits.max_header_bytes
        return Refusal(431, f"Request line and headers are over {limit} bytes.", close=True)

    def _body_too_large(self) -> Refusal:
        limit = self.proxy.config.limits.max_body_bytes
        return Refusal(413, f"The request's body is over {limit} bytes.", close=True)

    def _bodies_too_many(self) -> Refusal:
        config = self.proxy.config
        return Refusal(
            503,
            f"All requests here together hold over {self.proxy.bodies.max_bytes} bytes.",
            retry_after_s=config.routing.retry_after_s,
            close=True,
        )


def _route_to_name(target: bytes) -> Route:
    """The route of a request that is refused, perhaps for its very target."""
    try:
        return route_of(target)
    except Refusal:
        return Route(Kind.OTHER, target.partition(b"?")[0].decode("latin-1"), target)


_NO_ROUTE: Final = Route(Kind.OTHER, "", b"")
