"""What goes on to an instance is one request that everybody reads alike.

The client's bytes are made of pieces that are known to divide parsers, cut at any place, and sent
through the real protocol, router and connection; only the two transports are fakes.  h11, which has
no code in common with llhttp, is the judge of both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import h11
import httptools
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from xllm_plugin.service import lifecycle
from xllm_plugin.service.client import ClientConnection
from xllm_plugin.service.config import InstanceEntry, ServiceConfig
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.known_head import KnownHead
from xllm_plugin.service.policies import least_loaded
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.router import Router
from xllm_plugin.service.upstream import Pool, UpstreamConnection

HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"http2-settings"),
}
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class FakeTransport:
    """The client's end of a connection."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def get_extra_info(self, _: str) -> Any:
        return ("127.0.0.1", 1)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def get_write_buffer_size(self) -> int:
        return 0


class InstanceTransport(FakeTransport):
    """An instance's end: notes every request and answers it later, as a socket would."""

    def __init__(self, seen: list[bytes], later: Callable[[Callable[[], None]], Any]) -> None:
        super().__init__()
        self.seen = seen
        self.later = later
        self.protocol: UpstreamConnection | None = None

    def write(self, data: bytes) -> None:
        self.seen.append(data)
        protocol = self.protocol
        assert protocol is not None
        self.later(lambda: None if self.is_closed else protocol.data_received(REPLY))


class FakePool(Pool):
    """Connections that are always there."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 1, tls=None, connect_timeout_s=1.0)
        self.seen: list[bytes] = []

    def take(self) -> UpstreamConnection:
        connection = UpstreamConnection(self)
        transport = InstanceTransport(self.seen, asyncio.get_running_loop().call_soon)
        transport.protocol = connection
        connection.connection_made(transport)  # type: ignore[arg-type]
        return connection

    async def connect(self) -> UpstreamConnection:
        return self.take()

    def give(self, connection: UpstreamConnection) -> None:
        pass


@dataclass
class Read:
    """One request, as h11 reads it."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    rest: bytes = field(default=b"", compare=False)


def read_one(raw: bytes) -> Read | None:
    """The first request in `raw`, or None if h11 balks or it is not whole."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    connection.receive_data(raw)
    found: Read | None = None
    with contextlib.suppress(h11.RemoteProtocolError):
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                headers = [(name, value) for name, value in event.headers]
                found = Read(event.method, event.target, headers)
            elif isinstance(event, h11.Data) and found is not None:
                found.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and found is not None:
                found.rest = connection.trailing_data[0]
                return found
            else:
                return None
    return None


def send(runner: asyncio.Runner, pieces: list[bytes]) -> list[bytes]:
    """What reaches instances when a client sends `pieces` and hangs up."""

    async def talk() -> list[bytes]:
        pool = FakePool()
        config = ServiceConfig()
        fleet = Fleet(config.instances.timings(), lambda _: pool)
        policy = RoutingPolicy("tested", "", least_loaded)
        router = Router(fleet, policy, num_decisions=1, retry_after_s=1.0, clock=time.time)
        instance = fleet.register(InstanceEntry(url="http://127.0.0.1:1"), source="test")
        fleet.set_models(instance, {"fake": {}})
        fleet.report(instance, lifecycle.Alive(""))
        client = ClientConnection(Proxy(config, fleet, router))
        client.connection_made(FakeTransport())  # type: ignore[arg-type]
        for piece in pieces:
            client.data_received(piece)
            for _ in range(3):
                await asyncio.sleep(0)
        for _ in range(60):
            await asyncio.sleep(0)
        client.connection_lost(None)
        fleet.check_integrity()
        return pool.seen

    return runner.run(talk())


def end_to_end(read: Read) -> list[tuple[bytes, bytes]]:
    """The headers that an instance is to get, length and host aside."""
    named = {
        token.strip().lower()
        for name, value in read.headers
        if name == b"connection"
        for token in value.split(b",")
    }
    dropped = HOP_BY_HOP | named | {b"content-length", b"host"}
    return [(name, value) for name, value in read.headers if name not in dropped]


def check_forwarded(raw: bytes, seen: list[bytes]) -> None:
    """Everything that was sent is one clear request each, and one that the client made."""
    rest: bytes = raw
    is_read_by_h11 = True
    for sent in seen:
        got = read_one(sent)
        assert got is not None, sent
        assert got.rest == b"", sent
        names = [name for name, _ in got.headers]
        assert not set(names) & HOP_BY_HOP, sent
        assert names.count(b"content-length") <= 1, sent
        assert names.count(b"content-length") == 1 or not got.body, sent
        assert names.count(b"host") <= 1, sent
        head = sent.split(b"\r\n\r\n", 1)[0]
        assert b"\n" not in head.replace(b"\r\n", b""), sent
        assert b"\r" not in head.replace(b"\r\n", b""), sent
        assert b"\x00" not in head, sent
        # h11 balks where we need not, and reads no further after `Connection: close`.
        made = read_one(rest) if is_read_by_h11 else None
        is_read_by_h11 = made is not None
        if made is not None:
            rest = made.rest
            target = made.target.removeprefix(b"http://a")  # to an origin server
            assert (got.method, got.target, got.body) == (made.method, target, made.body)
            assert end_to_end(got) == end_to_end(made)


LINES = st.sampled_from(
    [
        *(b"Host: a\r\n", b"Host: b\r\n", b"Content-Length: 3\r\n", b"Content-Length: 5\r\n"),
        *(b"Content-Length: 3, 3\r\n", b"Content-Length: +3\r\n", b"Content-Length: 03\r\n"),
        *(b"Content-Length : 3\r\n", b"Content-Length:\x0b3\r\n", b"Content-Length: 3 \r\n"),
        *(b"Content_Length: 3\r\n", b"\x00Content-Length: 3\r\n", b"Content-Length: 3\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:chunked \r\n"),
        *(b"Transfer-Encoding: xchunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n"),
        *(b"Transfer-Encoding\r\n : chunked\r\n", b"Transfer-Encoding: \x0bchunked\r\n"),
        *(b"tRANSFER-eNCODING: CHUNKED\r\n", b"X: y\r\nTransfer-Encoding: chunked\r\n"),
        *(b"Connection: close\r\n", b"Connection: keep-alive, x-a\r\n", b"X-A: 1\r\n"),
        *(b"Connection: content-length, host\r\n", b"Connection: x-a\r\nConnection: x-b\r\n"),
        *(b"X-B: \tb b\t\r\n", b"X-C: a\r\n folded\r\n", b"X-D: a\rb\r\n", b"X-E: \x80\xff\r\n"),
        *(b"TE: trailers\r\n", b"Trailer: x-t\r\n", b"Expect: 100-continue\r\n"),
        *(b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: x\r\n",),
        *(b"Keep-Alive: 5\r\n", b"Proxy-Connection: x\r\n", b"Proxy-Authorization: x\r\n"),
        *(b": empty\r\n", b"No-Colon\r\n", b"X F: 1\r\n", b"\r\n", b"\n", b"\r"),
    ]
)
STARTS = st.sampled_from(
    [
        *(b"POST /v1/completions HTTP/1.1\r\n", b"GET /version HTTP/1.1\r\n"),
        *(b"POST http://a/v1/completions HTTP/1.1\r\n", b"POST /x HTTP/1.0\r\n"),
        *(b"POST /v1/completions  HTTP/1.1\r\n", b"POST /a\x0bb HTTP/1.1\r\n"),
        *(b"POST /v1/completions HTTP/1.1\n", b"\r\nPOST /v1/completions HTTP/1.1\r\n"),
        *(
            b"PO ST / HTTP/1.1\r\n",
            b"POST /v1/completions HTTP/1.01\r\n",
            b"DELETE /x HTTP/1.1\r\n",
        ),
    ]
)
BODIES = st.sampled_from(
    [
        *(b"", b"abc", b"{}\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"3;x=y\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"),
        *(b"3\nabc\n0\n\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"03\r\nabc\r\n00\r\n\r\n", b"-1\r\n"),
        *(b"3\r\nabcd\r\n0\r\n\r\n", b"0\r\nContent-Length: 9\r\n\r\n", b"3 \r\nabc\r\n0\r\n\r\n"),
        *(b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"abcGET /x HTTP/1.1\r\n"),
        *(b"fffffffffffffffff\r\n", b"3\r\nabc0\r\n\r\n", b"3;\nabc\r\n0\r\n\r\n"),
    ]
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Something like a request, most often nearly a good one."""
    lines = draw(st.lists(LINES, max_size=5))
    host = draw(st.sampled_from([b"Host: a\r\n", b"Host: a\r\n", b"Host: a\r\n", b""]))
    return draw(STARTS) + host + b"".join(lines) + b"\r\n" + draw(BODIES)


POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.looks_inside
@given(parts=st.lists(requests(), min_size=1, max_size=3), cuts=st.lists(st.integers(0, 600)))
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(
    parts=[POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n"], cuts=[]
)
@example(parts=[POST + b"Transfer-Encoding: xchunked\r\nContent-Length: 3\r\n\r\nabc"], cuts=[])
@example(parts=[POST + b"Connection: content-length\r\nContent-Length: 3\r\n\r\nabc"], cuts=[])
@example(parts=[POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: 1\r\n\r\n"], cuts=[])
def test_instances_get_single_clear_requests(
    runner: asyncio.Runner, parts: list[bytes], cuts: list[int]
) -> None:
    raw = b"".join(parts)
    borders = [0, *sorted({cut for cut in cuts if 0 < cut < len(raw)}), len(raw)]
    pieces = [raw[start:end] for start, end in pairwise(borders)]
    check_forwarded(raw, send(runner, pieces))


@pytest.mark.looks_inside
def test_the_fuzz_would_see_a_request_in_another(runner: asyncio.Runner) -> None:
    """The judge judges: a copied Transfer-Encoding, a second length, a header that should stay."""
    good = POST + b"Content-Length: 3\r\n\r\nabc"
    check_forwarded(good, send(runner, [good]))
    assert send(runner, [good]), "it arrives at all"
    for bad in (
        good.replace(
            b"Content-Length: 3\r\n", b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"
        ),
        good.replace(b"Content-Length: 3", b"Content-Length: 2"),
        good.replace(b"Host: a\r\n", b"Host: a\r\nKeep-Alive: 5\r\n"),
        good + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        with pytest.raises(AssertionError):
            check_forwarded(good, [bad])


ABC = POST + b"Content-Length: 3\r\n\r\nabc"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
UPGRADE = POST + (
    b"Content-Length: %d\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: x\r\n\r\n%b" % (len(SMUGGLED), SMUGGLED)
)


@pytest.mark.looks_inside
@given(
    parts=st.lists(requests(), min_size=1, max_size=3),
    order=st.lists(st.integers(0, 2), min_size=2, max_size=5),
    cuts=st.lists(st.integers(0, 600), max_size=2),
    joins=st.lists(st.integers(0, 9), max_size=4),
)
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(parts=[ABC], order=[0, 0, 0], cuts=[], joins=[])
@example(parts=[ABC], order=[0, 0, 0], cuts=[100], joins=[])
@example(parts=[ABC], order=[0, 0, 0, 0], cuts=[], joins=[1, 1])
@example(
    parts=[POST + b"Content-Length: %b\r\n\r\nabcde" % length for length in (b"3", b"5", b"+3")],
    order=[0, 1, 0, 2],
    cuts=[],
    joins=[],
)
@example(parts=[ABC, UPGRADE], order=[0, 1, 0], cuts=[], joins=[0])
def test_a_head_that_is_known_means_what_the_parser_says(
    runner: asyncio.Runner, parts: list[bytes], order: list[int], cuts: list[int], joins: list[int]
) -> None:
    """Clients that repeat their heads, in one read or several: with and without the memory."""
    pieces = []
    for number in order:
        part = parts[number % len(parts)]
        borders = [0, *sorted({cut for cut in cuts if 0 < cut < len(part)}), len(part)]
        pieces += [part[start:end] for start, end in pairwise(borders)]
    for place in joins:
        pieces[place : place + 2] = [b"".join(pieces[place : place + 2])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnownHead, "of", lambda *_: None)
        expected = send(runner, pieces)
    assert send(runner, pieces) == expected


@pytest.mark.looks_inside
def test_many_requests_with_one_head_in_a_read(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = send(runner, [ABC, ABC * 600])
    monkeypatch.setattr(KnownHead, "of", lambda *_: None)
    assert found == send(runner, [ABC, ABC * 600])
    assert len(found) > 50, "as many as may be read ahead"


@pytest.mark.looks_inside
def test_a_repeated_head_is_known(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length of the body, and in whatever parts it comes; else it is parsed."""
    fed: list[bytes] = []

    class Parser:
        def __init__(self, protocol: Any) -> None:
            self._parser = httptools.HttpRequestParser(protocol)

        def feed_data(self, data: bytes) -> None:
            fed.append(data)
            self._parser.feed_data(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._parser, name)

    made = SimpleNamespace(**vars(httptools) | {"HttpRequestParser": Parser})
    monkeypatch.setattr("xllm_plugin.service.client.httptools", made)
    head = POST + b"X-A: 1\r\ncontent-length: %d\r\nX-B: 2\r\n\r\n"
    first, second, other = head % 3 + b"abc", head % 12 + b"abcdefghijkl", POST + b"\r\n"
    long = head % 100_000 + b"x" * 100_000
    seen = send(runner, [first, second, second[:-5], second[-5:], long[:70_000], long[70_000:]])
    assert [read.body for read in map(read_one, seen) if read] == [
        *(b"abc", b"abcdefghijkl", b"abcdefghijkl"),
        b"x" * 100_000,
    ]
    assert fed == [first]
    fed.clear()
    assert len(send(runner, [first + second, first, other, first])) == 5
    assert fed == [first + second, other, first], "who sends other heads too is not compared"


@pytest.fixture(scope="module")
def runner() -> Any:
    with asyncio.Runner() as found:
        yield found
