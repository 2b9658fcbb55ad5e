"""What goes through the proxy: bytes, both ways, for every framing and every split of them."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_plugin.service.cost_choice import cost_in_seconds
from xllm_plugin.service.policy import Choice, Slo
from xllm_plugin.testing.fake_instance import (
    FakeInstance,
    Received,
    answer,
    answer_raw,
    chunked,
    stream,
)
from xllm_plugin.testing.service_harness import PATIENCE_S, request, serving

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Odd: 1\r\n\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in pieces, cut at `places` modulo its length."""
    borders = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(borders) if b > a]


@given(
    parts=st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    places=st.lists(st.integers(0, 10_000), max_size=6),
    is_chunked=st.booleans(),
)
@FUZZ
def test_an_answer_arrives_byte_for_byte_however_it_is_cut(
    run: Any, parts: list[bytes], places: list[int], is_chunked: bool
) -> None:
    body = chunked(parts) if is_chunked else b"".join(parts)
    head = (
        CHUNKED_HEAD if is_chunked else b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    pieces = cut(head + body, places)

    async def check() -> None:
        instance = FakeInstance(script=answer_raw(*pieces, pause_s=0.0005))
        async with serving(instance) as harness:
            client = await harness.connect()
            for _ in range(2):  # the second goes over the kept connections of both sides
                client.send(request())
                assert await client.read_answer() == (head, body)
            assert instance.num_connections == 1
            await harness.settle()

    run(check())


@given(
    parts=st.lists(st.binary(min_size=1, max_size=300), max_size=6),
    places=st.lists(st.integers(0, 10_000), max_size=6),
    is_chunked=st.booleans(),
)
@FUZZ
def test_a_request_arrives_byte_for_byte_however_it_is_cut(
    run: Any, parts: list[bytes], places: list[int], is_chunked: bool
) -> None:
    body = b"".join(parts)
    raw = request(body, path=b"/v1/audio/transcriptions?x=%20", headers=b"X-Mine:  a b \r\n")
    if is_chunked:
        raw = request(b"", path=b"/v1/audio/transcriptions?x=%20", headers=b"X-Mine:  a b \r\n")
        raw = raw.replace(b"X-Mine", b"Transfer-Encoding: chunked\r\nX-Mine") + chunked(parts)

    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            client = await harness.connect()
            for _ in range(2):
                for piece in cut(raw, places):
                    client.send(piece)
                    await asyncio.sleep(0.0005)
                await client.read_answer()
            for received in harness.instances[0].requests:
                assert received.body == body
                assert received.target == b"/v1/audio/transcriptions?x=%20"
                assert received.headers()["x-mine"] == "a b"
                assert "transfer-encoding" not in received.headers()
                assert received.headers()["content-length"] == str(len(body))

    run(check())


def test_pipelined_requests_are_answered_in_their_order(run: Any) -> None:
    async def echo(received: Received, writer: asyncio.StreamWriter) -> None:
        number = json.loads(received.body)["number"]
        await asyncio.sleep(0.01 if number == 0 else 0)
        await answer(received.body)(received, writer)

    async def check() -> None:
        async with serving(FakeInstance(script=echo), FakeInstance(script=echo)) as harness:
            client = await harness.connect()
            bodies = [b'{"number": %d}' % number for number in range(40)]
            client.send(b"".join(request(body) for body in bodies))
            assert [(await client.read_answer())[1] for _ in bodies] == bodies
            await harness.settle()

    run(check())


def test_headers_about_the_connection_stay_on_their_side(run: Any) -> None:
    raw = request(
        headers=b"Connection: keep-alive, X-Secret\r\nX-Secret: 1\r\nTE: trailers\r\n"
        b"Proxy-Authorization: x\r\nKeep-Alive: timeout=5\r\nAuthorization: Bearer t\r\n"
    )
    reply = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\n"
    reply += b"Content-Length: 2\r\n\r\n{}"

    async def check() -> None:
        async with serving(FakeInstance(script=answer_raw(reply))) as harness:
            head, body = await harness.ask(raw)
            received = harness.instances[0].requests[0].headers()
            assert set(received) == {"host", "content-length", "authorization"}
            assert received["authorization"] == "Bearer t"
            assert b"eep-" not in head.replace(b"Content-Length: 2", b"")
            assert body == b"{}"

    run(check())


def test_an_instance_that_closes_after_its_answer_is_no_error(run: Any) -> None:
    reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"

    async def check() -> None:
        async with serving(FakeInstance(script=answer_raw(reply, close=True))) as harness:
            client = await harness.connect()
            for _ in range(3):
                client.send(request())
                assert (await client.read_answer())[1] == b"{}"
            assert harness.instances[0].num_connections == 3
            assert not next(iter(harness.proxy.fleet)).stats.errors

    run(check())


def test_an_answer_without_a_length_ends_with_its_connection(run: Any) -> None:
    async def check() -> None:
        script = answer_raw(b"HTTP/1.1 200 OK\r\n\r\nabc", b"def", close=True, pause_s=0.002)
        async with serving(FakeInstance(script=script)) as harness:
            client = await harness.connect()
            client.send(request())
            assert await client.read_all() == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabcdef"
            await harness.settle()

    run(check())


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answers_that_have_no_body(run: Any, status: str) -> None:
    raw = f"HTTP/1.1 {status}\r\nETag: x\r\n\r\n".encode()

    async def check() -> None:
        async with serving(FakeInstance(script=answer_raw(raw))) as harness:
            client = await harness.connect()
            for _ in range(2):
                client.send(request())
                async with asyncio.timeout(30):
                    assert await client.reader.readuntil(b"\r\n\r\n") == raw
            assert harness.instances[0].num_connections == 1

    run(check())


def test_head_is_answered_without_a_body(run: Any) -> None:
    async def check() -> None:
        script = answer_raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        async with serving(FakeInstance(script=script)) as harness:
            client = await harness.connect()
            for path in (b"/version", b"/v1/models", b"/health"):
                client.send(request(b"", path, b"HEAD"))
                async with asyncio.timeout(30):
                    head = await client.reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")

    run(check())


def test_interim_answers_of_an_instance_stay_with_us(run: Any) -> None:
    final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def check() -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        async with serving(FakeInstance(script=answer_raw(interim + final))) as harness:
            assert b"".join(await harness.ask(request())) == final

    run(check())


def test_a_client_that_waits_for_continue_gets_it(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            client = await harness.connect()
            head, _, body = request(headers=b"Expect: 100-continue\r\n").partition(b"\r\n\r\n")
            client.send(head + b"\r\n\r\n")
            async with asyncio.timeout(30):
                assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            client.send(body)
            assert (await client.read_answer())[1] == b"{}"
            assert "expect" not in harness.instances[0].requests[0].headers()

    run(check())


def test_an_http_1_0_client_gets_no_chunks(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=stream(b"data: a\n\n", b"data: b\n\n"))) as harness:
            client = await harness.connect()
            client.send(request().replace(b"HTTP/1.1", b"HTTP/1.0"))
            head, _, body = (await client.read_all()).partition(b"\r\n\r\n")
            assert body == b"data: a\n\ndata: b\n\n"
            assert b"ransfer-" not in head
            assert b"connection: close" in head
            await harness.settle()

    run(check())


def test_the_loop_of_asyncio_serves_as_well() -> None:
    """Where there is no uvloop."""

    async def check() -> None:
        async with serving(FakeInstance(script=stream(b"data: a\n\n"))) as harness:
            client = await harness.connect()
            for _ in range(2):
                client.send(request(b'{"model":"fake"}'.ljust(200_000)))
                assert b"data: a" in (await client.read_answer())[1]
            await harness.settle()

    with asyncio.Runner() as runner:
        runner.run(check())


def test_a_wish_for_http_2_is_ignored_and_its_body_arrives(run: Any) -> None:
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"

    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            client = await harness.connect()
            client.send(request(b'{"model":"fake","n":1}', headers=wish) + request(b"{}"))
            assert (await client.read_answer())[1] == b"{}"
            assert (await client.read_answer())[1] == b"{}"
            first, second = harness.instances[0].requests
            assert (first.body, second.body) == (b'{"model":"fake","n":1}', b"{}")
            assert not {"upgrade", "http2-settings", "connection"} & set(first.headers())

    run(check())


def test_a_websocket_is_relayed_both_ways(run: Any) -> None:
    switch = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    )
    wish = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n"

    async def check() -> None:
        got: asyncio.Queue[bytes] = asyncio.Queue()

        async def script(received: Received, writer: asyncio.StreamWriter) -> None:
            assert received.headers()["upgrade"] == "websocket"
            writer.write(switch + b"\x00hello")
            await received.gone.wait()

        async with serving(FakeInstance(script=script)) as harness:
            instance = harness.instances[0]

            async def watch(reader: asyncio.StreamReader, received: Received) -> None:
                while data := await reader.read(100):
                    got.put_nowait(data)
                received.gone.set()

            instance._watch = watch  # type: ignore[method-assign]
            client = await harness.connect()
            client.send(request(b"", b"/v1/realtime?model=fake", b"GET", wish) + b"\x01early")
            async with asyncio.timeout(30):
                assert await client.reader.readexactly(len(switch) + 6) == switch + b"\x00hello"
                assert await got.get() == b"\x01early"
                client.send(b"\xffGET / HTTP/1.1\r\n\r\n")
                assert await got.get() == b"\xffGET / HTTP/1.1\r\n\r\n"
                client.writer.close()
                await instance.requests[0].gone.wait()
            await harness.settle()

    run(check())


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
WISH = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


def test_a_websocket_that_its_instance_closes(run: Any) -> None:
    async def check() -> None:
        script = answer_raw(SWITCH, b"bye", close=True, pause_s=0.01)
        async with serving(FakeInstance(script=script)) as harness:
            client = await harness.connect()
            client.send(request(b"", b"/v1/realtime", b"GET", WISH))
            assert await client.read_all() == SWITCH + b"bye"
            await harness.settle()

    run(check())


def test_a_websocket_passes_pressure_on_to_its_client(run: Any) -> None:
    """An instance that does not read stops the client, and gets everything when it does."""
    sent = b"z" * 40_000_000
    got = bytearray()

    async def check() -> None:
        reads = asyncio.Event()

        async def watch(reader: asyncio.StreamReader, received: Received) -> None:
            await reads.wait()
            while data := await reader.read(2**20):
                got.extend(data)
            received.gone.set()

        async def script(received: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(SWITCH)
            await received.gone.wait()

        instance = FakeInstance(script=script)
        instance._watch = watch  # type: ignore[method-assign]
        async with serving(instance) as harness:
            client = await harness.connect()
            client.send(request(b"", b"/v1/realtime", b"GET", WISH))
            await client.reader.readuntil(b"\r\n\r\n")
            client.send(sent)
            await asyncio.sleep(0.3)
            (connection,) = harness.proxy.clients
            assert connection._tunnel is not None
            assert connection._tunnel.get_write_buffer_size() < 2_000_000
            reads.set()
            await client.writer.drain()
            client.writer.close()
            await instance.requests[0].gone.wait()
            assert bytes(got) == sent

    run(check())


def test_a_refused_websocket_is_an_ordinary_answer(run: Any) -> None:
    wish = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"

    async def check() -> None:
        async with serving(FakeInstance(script=answer(b"no", "403 Forbidden"))) as harness:
            client = await harness.connect()
            client.send(request(b"", b"/v1/realtime", b"GET", wish))
            whole = await client.read_all()
            assert whole.startswith(b"HTTP/1.1 403")
            assert whole.endswith(b"no")

    run(check())


def test_a_large_body_goes_both_ways(run: Any) -> None:
    body = b'{"model":"fake","prompt":"' + b"x" * 20_000_000 + b'"}'

    async def echo(received: Received, writer: asyncio.StreamWriter) -> None:
        await answer(received.body)(received, writer)

    async def check() -> None:
        async with serving(FakeInstance(script=echo)) as harness:
            _, got = await harness.ask(request(body))
            assert got == body
            await harness.settle()

    run(check())


def test_large_bodies_one_after_the_other_are_kept_apart(run: Any) -> None:
    """The second begins in the read that ends the first, and both are too large to be parsed."""
    bodies = [b'{"model":"fake","n":%d,"x":"%b"}' % (n, b"x" * (300_000 + n)) for n in range(4)]

    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            client = await harness.connect()
            client.send(b"".join(map(request, bodies)))
            for _ in bodies:
                await client.read_answer()
            assert [one.body for one in harness.instances[0].requests] == bodies
            await harness.settle()

    run(check())


def test_models_are_those_of_all_instances(run: Any) -> None:
    async def check() -> None:
        instances = FakeInstance(models=["a", "b"]), FakeInstance(models=["b", "c"])
        async with serving(*instances) as harness:
            _, body = await harness.ask(request(b"", b"/v1/models", b"GET"))
            assert [one["id"] for one in json.loads(body)["data"]] == ["a", "b", "c"]
            _, body = await harness.ask(request(b"", b"/v1/models/c", b"GET"))
            assert json.loads(body) == {"id": "c"}
            head, _ = await harness.ask(request(b"", b"/v1/models/d", b"GET"))
            assert head.startswith(b"HTTP/1.1 404")

    run(check())


def test_a_request_goes_where_its_model_is(run: Any) -> None:
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nwav\r\n'
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n--x--\r\n'
    )

    async def check() -> None:
        a, b = FakeInstance(models=["a"]), FakeInstance(models=["b"])
        async with serving(a, b) as harness:
            await harness.ask(request(b'{"x": {"model": "a"}, "model": "b"}'))
            await harness.ask(request(b'{"model": "a"}'))
            multipart = b"Content-Type: multipart/form-data; boundary=x\r\n"
            await harness.ask(request(form, b"/v1/audio/transcriptions", headers=multipart))
            assert [one.body[:9] for one in a.requests] == [b'{"model":']
            assert [one.body[:5] for one in b.requests] == [b'{"x":', b"--x\r\n"]
            head, body = await harness.ask(request(b'{"model": "c"}'))
            assert head.startswith(b"HTTP/1.1 404")
            assert "`a`, `b`" in json.loads(body)["error"]["message"]
            head, body = await harness.ask(request(b'{"model": "%b"}' % (b"c" * 9999)))
            assert head.startswith(b"HTTP/1.1 404")
            assert len(body) < 999, "a name is not repeated at any length"
            head, body = await harness.ask(request(b"{}"))
            assert head.startswith(b"HTTP/1.1 400")
            assert json.loads(body)["error"]["param"] == "model"

    run(check())


def test_a_stored_response_stays_with_its_instance(run: Any) -> None:
    async def check() -> None:
        made = answer(b'{"id": "resp_17", "object": "response"}')
        instances = [FakeInstance(script=made) for _ in range(4)]
        async with serving(*instances) as harness:
            await harness.ask(request(path=b"/v1/responses"))
            (maker,) = (one for one in instances if one.requests)
            for _ in range(5):
                await harness.ask(request(b"", b"/v1/responses/resp_17", b"GET"))
            again = b'{"model": "fake", "previous_response_id": "resp_17"}'
            await harness.ask(request(again, b"/v1/responses"))
            assert len(maker.requests) == 7

    run(check())


def test_a_session_is_named_by_a_header_a_cache_key_or_a_user(run: Any) -> None:
    async def check() -> None:
        keys: list[str] = []

        def noted(asked: Any, _: Any) -> Choice:
            keys.append(asked.session_key)
            return Choice(0, "noted")

        async with serving(FakeInstance(), policy=noted) as harness:
            both = b'{"model":"fake","user":"u","prompt_cache_key":"k"}'
            await harness.ask(request(both, headers=b"X-Session-Id: s\r\n"))
            assert harness.instances[0].requests[0].headers()["x-session-id"] == "s"
            await harness.ask(request(both))
            await harness.ask(request(b'{"model":"fake","user":"u"}'))
            await harness.ask(request(b'{"model":"fake","user":7}'))
            assert keys == ["s", "k", "u", ""]

    run(check())


def test_a_promise_reaches_the_policy(run: Any) -> None:
    """From headers and body; what is wrong is the instance's to refuse, and counts as nothing."""
    header, wrong = b"x-xllm-ttft-ms: 250\r\n", b"x-xllm-tpot-ms: soon\r\n"
    in_body = b'{"model":"fake","vllm_xargs":{"xllm_tpot_ms":20}}'
    in_params = b'{"model":"fake","sampling_params":{"extra_args":{"xllm_class":"offline"}}}'

    async def check() -> None:
        found: list[Slo | None] = []

        def noted(asked: Any, _: Any) -> Choice:
            found.append(asked.slo)
            return Choice(0, "noted")

        async with serving(FakeInstance(), policy=noted) as harness:
            client = await harness.connect()
            for raw in (
                *(request(), request(headers=header), request(headers=header)),
                *(request(in_body), request(in_body, headers=header)),
                request(in_params, b"/inference/v1/generate"),
                *(request(headers=b"X-Xllm-Class: Offline\r\n"), request(headers=wrong)),
            ):
                client.send(raw)
                head, _ = await client.read_answer()
                assert head.startswith(b"HTTP/1.1 200")
            never, early = float("inf"), pytest.approx(0.25, abs=PATIENCE_S)
            offline = Slo(is_offline=True)
            assert found == [
                *(None, (early, never, False), (early, never, False), (never, 0.02, False)),
                *((early, 0.02, False), offline, offline, None),
            ]
            assert all(slo is None or slo.ttft_s <= 0.25 or slo.ttft_s == never for slo in found)

    run(check())


def test_offline_requests_are_counted_where_they_run(run: Any) -> None:
    async def check() -> None:
        counts: list[tuple[int, int]] = []

        async def counting(received: Received, writer: asyncio.StreamWriter) -> None:
            (there,) = harness.proxy.fleet
            counts.append((there.in_flight, there.offline_requests))
            await answer()(received, writer)

        async with serving(FakeInstance(script=counting)) as harness:
            for headers in (b"x-xllm-class: offline\r\n", b"x-xllm-ttft-ms: 5\r\n", b""):
                await harness.ask(request(headers=headers))
                await harness.settle()
            assert counts == [(1, 1), (1, 0), (1, 0)]

    run(check())


def test_explain_says_how_late_a_request_would_be(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), FakeInstance(), policy=cost_in_seconds) as harness:
            headers = b"X-XLLM-Explain: 1\r\nx-xllm-ttft-ms: 0.001\r\n"
            head, _ = await harness.ask(request(headers=headers))
            line = next(one for one in head.split(b"\r\n") if one.startswith(b"x-xllm-explain: "))
            reason = json.loads(line.partition(b": ")[2])["reason"]
            assert re.search(r" x late [\d.]+; next best", reason), reason
            (decision,) = harness.proxy.router.decisions
            assert decision.described()["reason"] == reason

    run(check())


def test_explain_says_which_instance_and_why(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), FakeInstance()) as harness:
            head, _ = await harness.ask(request(headers=b"X-XLLM-Explain: 1\r\n"))
            line = next(one for one in head.split(b"\r\n") if one.startswith(b"x-xllm-explain: "))
            decision = json.loads(line.partition(b": ")[2])
            assert decision["instance"] in {one.name for one in harness.proxy.fleet}
            assert decision["num_candidates"] == 2
            assert decision["policy"] == "tested"
            assert harness.proxy.router.decisions[-1].instance == decision["instance"]
            received = [one for instance in harness.instances for one in instance.requests]
            assert "x-xllm-explain" not in received[0].headers()

    run(check())
