"""A relay cuts the stream that it is told to cut, at the byte that it is told."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.testing.relay import Cut, Relay, _Cutter

EVENTS = [b"data: %d\n\n" % number for number in range(9)]


class Streams(BaseHTTPRequestHandler):
    """Answers everything with the events, an event a chunk."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in [*EVENTS, b""]:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def relay() -> Iterator[Relay]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Streams) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with Relay(("/stream",), deque()) as relay:
                relay.port = server.server_port
                yield relay
        finally:
            server.shutdown()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=30.0) as client:
        yield client


def ask(client: httpx.Client, relay: Relay, path: str = "/stream") -> tuple[bytes, bool]:
    """What came, and whether it was whole."""
    came = b""
    with client.stream("POST", relay.url + path, content=b"{}") as reply:
        try:
            for part in reply.iter_raw():
                came += part
        except httpx.RemoteProtocolError:
            return came, False
    return came, True


def test_without_cuts_all_passes(client: httpx.Client, relay: Relay) -> None:
    assert ask(client, relay) == (b"".join(EVENTS), True)
    assert ask(client, relay) == (b"".join(EVENTS), True)
    assert relay.num_cut == 0


def test_cuts_are_taken_in_turn_by_streams_alone(client: httpx.Client, relay: Relay) -> None:
    relay.cuts.extend([Cut(2), Cut(what=b"data: 5", num_bytes=0)])
    assert ask(client, relay, "/tokenize") == (b"".join(EVENTS), True)
    came, is_whole = ask(client, relay)
    assert came.startswith(b"".join(EVENTS[:2]))
    assert len(came) < len(b"".join(EVENTS[:3]))
    assert not is_whole
    came, is_whole = ask(client, relay)
    assert came == b"".join(EVENTS[:5]) + b"data: 5"
    assert not is_whole
    assert ask(client, relay) == (b"".join(EVENTS), True)
    assert relay.num_cut == 2


def test_a_server_that_is_gone_is_no_answer(client: httpx.Client, relay: Relay) -> None:
    relay.port = 1
    with pytest.raises(httpx.TransportError):
        ask(client, relay)


@given(
    sizes=st.lists(st.integers(1, 7)),
    num_times=st.integers(1, 9),
    num_bytes=st.integers(0, 5),
    what=st.sampled_from([b"\n\n", b"data: ", b"\n"]),
)
def test_the_place_does_not_depend_on_how_it_is_read(
    sizes: list[int], num_times: int, num_bytes: int, what: bytes
) -> None:
    whole = b"".join(EVENTS)
    end = -1
    for _ in range(num_times):
        end = whole.find(what, end + 1 if end < 0 else end + len(what))
    cutter = _Cutter(Cut(num_times, what, num_bytes))
    passed, rest = b"", whole
    while rest and not cutter.is_over:
        size = sizes.pop() if sizes else len(rest)
        passed += cutter.take(rest[:size])
        rest = rest[size:]
    assert passed == whole[: end + len(what) + num_bytes]
