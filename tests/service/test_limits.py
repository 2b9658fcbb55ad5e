"""Clients that send what they should not: answered in OpenAI's form, and no longer listened to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_plugin.testing.fake_instance import FakeInstance, answer
from xllm_plugin.testing.service_harness import request, serving

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /v1/../sleep HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /x#/sleep HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Content-Length: 0x3\r\n\r\nabc", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: identity\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (POST + b"X: " + b"x" * 3000 + b"\r\n\r\n", 431),
        (POST + b"X: " + b"x" * 3000, 431),
        (b"GET /" + b"x" * 3000, 431),
        (POST + b"Content-Length: 5000\r\n\r\n", 413),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1388\r\n" + b"x" * 5000, 413),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1;" + b"e" * 5000, 413),
    ],
)
def test_what_is_refused(run: Any, raw: bytes, status: int) -> None:
    async def check() -> None:
        limits = {"max_header_bytes": 2048, "max_body_bytes": 4096}
        async with serving(FakeInstance(), limits=limits) as harness:
            client = await harness.connect()
            client.send(raw)
            client.writer.write_eof()
            head, _, body = (await client.read_all()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status), head
            assert b"connection: close" in head
            assert json.loads(body)["error"]["code"] == status
            assert not harness.instances[0].requests
            await harness.settle()

    run(check())


def test_a_body_of_the_largest_size_passes(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), limits={"max_body_bytes": 4096}) as harness:
            body = b'{"model":"fake"}'.ljust(4096)
            assert (await harness.ask(request(body)))[0].startswith(b"HTTP/1.1 200")

    run(check())


def test_a_refusal_waits_for_the_answers_before_it(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            client = await harness.connect()
            client.send(request() + b"nonsense\r\n\r\n" + request())
            everything = await client.read_all()
            assert everything.count(b"content-length: ") == 2 - everything.count(
                b"Content-Length: "
            )
            assert everything.startswith(b"HTTP/1.1 200 OK")
            assert b"HTTP/1.1 400 " in everything
            assert len(harness.instances[0].requests) == 1

    run(check())


@pytest.mark.parametrize("path", [b"/sleep", b"/%73leep?level=1", b"//sleep/", b"/xllm/engines"])
def test_control_routes_are_refused_and_the_connection_is_left_usable_or_closed(
    run: Any, path: bytes
) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            for target in (path, b"http://a" + path):
                head, body = await harness.ask(request(path=target))
                assert head.startswith(b"HTTP/1.1 403")
                assert json.loads(body)["error"]["type"] == "PermissionDeniedError"
            assert not harness.instances[0].requests

    run(check())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", b""),
        (POST, b"headers did not"),
        (POST + b"Content-Length: 9\r\n\r\nabc", b"body did not"),
    ],
)
def test_clients_that_dawdle(run: Any, raw: bytes, says: bytes) -> None:
    """Whoever opens a connection and sends nothing is closed without a word."""

    async def check() -> None:
        timeouts = {"header_s": 0.1, "body_s": 0.1}
        async with serving(FakeInstance(), timeouts=timeouts) as harness:
            client = await harness.connect()
            client.send(raw)
            everything = await client.read_all()
            assert says in everything
            assert everything.startswith(b"HTTP/1.1 408") if raw else everything == b""

    run(check())


def test_an_idle_connection_is_closed(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), timeouts={"client_idle_s": 0.1}) as harness:
            client = await harness.connect()
            client.send(request())
            await client.read_answer()
            assert await client.read_all() == b""

    run(check())


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(run: Any) -> None:
    """It would hold an instance's slot for as long as it likes."""

    async def check() -> None:
        instance = FakeInstance(script=answer(b"x" * 30_000_000))
        async with serving(instance, timeouts={"client_stalled_s": 0.1}) as harness:
            client = await harness.connect()
            client.writer.transport.pause_reading()
            client.send(request())
            while not instance.requests:
                await asyncio.sleep(0.002)
            await harness.settle()
            (known,) = harness.proxy.fleet
            assert known.stats.errors == {"client gone": 1}

    run(check())


TOKENS = st.sampled_from(
    [
        *(b"GET / HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n"),
        *(b"Content-Length: 3\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"),
        *(b"Transfer-Encoding: identity\r\n", b"Content-Length : 3\r\n", b"Connection: close\r\n"),
        *(b"3\r\nabc\r\n", b"0\r\n\r\n", b"abc", b" \r\n", b"\n", b"\x00", b"X: \x0b\r\n", b"{}"),
        *(b"Content-Length: 3, 3\r\n", b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n"),
    ]
)


def read_by_h11(raw: bytes) -> list[tuple[bytes, bytes]] | None:
    """(Target, body) of each whole request as h11 reads them; None if it balks."""
    found = []
    rest = raw
    while rest:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(rest)
        target, body = b"", b""
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError:
                return None
            if isinstance(event, h11.Request):
                target = event.target
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.append((target, body))
                break
            else:
                return found
        rest = connection.trailing_data[0]
    return found


@given(tokens=st.lists(TOKENS, max_size=14))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_instances_see_only_requests_that_an_independent_parser_sees_too(
    run: Any, shared: Any, tokens: list[bytes]
) -> None:
    """No smuggling: what arrives is a prefix of what h11 reads from the client's bytes.

    h11 may balk where we do not (it stops at `Connection: close`, for example), never the reverse.
    """
    raw = b"".join(tokens)
    expected = read_by_h11(raw)

    async def check() -> None:
        (instance,) = shared.instances
        instance.requests.clear()
        client = await shared.connect()
        client.send(raw)
        client.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await client.read_all()
        client.writer.close()
        await shared.settle()
        seen = [(one.target, one.body) for one in instance.requests]
        if expected is not None:
            assert seen == expected[: len(seen)]

    run(check())


@pytest.fixture(scope="module")
def shared(run: Any) -> Any:
    """One proxy for many examples."""
    context = serving(FakeInstance())
    yield run(context.__aenter__())
    run(context.__aexit__(None, None, None))
