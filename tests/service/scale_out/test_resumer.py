"""Streams that go on at a server without this plugin: whole, or with an error that says why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_plugin.instance.resumption import RESUME_PATH
from xllm_plugin.service import lifecycle
from xllm_plugin.service.scale_out.resumer import Resumer
from xllm_plugin.testing.fake_instance import FakeInstance
from xllm_plugin.testing.fake_scale_out import RouteFault, scale_out_instance
from xllm_plugin.testing.fake_streams import Death, FakeModel, stream_instance
from xllm_plugin.testing.service_harness import PATIENCE_S, Harness, request, serving
from xllm_plugin.testing.stream_requests import (
    CHAT,
    COMPLETION,
    PIECES,
    ask,
    body_of,
    error_in,
    expected,
    first,
)
from xllm_plugin.testing.streams import say_together

GENERATE = "/inference/v1/generate"


@contextlib.asynccontextmanager
async def resuming(*instances: FakeInstance, **sections: Any) -> AsyncIterator[Harness]:
    """A proxy that has learned who has the routes."""
    async with (
        aiohttp.ClientSession() as session,
        serving(*instances, policy=first, **{"routing": {"num_retries": 4}, **sections}) as harness,
    ):
        harness.proxy.resumer = Resumer(session)
        for known, instance in zip(harness.proxy.fleet, instances, strict=True):
            known.scales_out = instance.scales_out
        yield harness


def sizes(model: FakeModel, path: str, body: dict[str, Any]) -> list[int]:
    return [len(one) for one in model.events(path, body | {"return_token_ids": True})]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([CHAT, COMPLETION]),
    per_event=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    has_usage=st.booleans(),
    wants_ids=st.booleans(),
    where=st.floats(0, 1),
    where_too=st.none() | st.floats(0, 1),
)
def test_wherever_it_dies_a_plain_server_goes_on(  # noqa: PLR0917
    run: Any,
    path: str,
    per_event: tuple[int, ...],
    has_usage: bool,
    wants_ids: bool,
    where: float,
    where_too: float | None,
) -> None:
    """No token is lost or doubled; the server that goes on may die in the middle of it too."""

    async def check() -> None:
        model = FakeModel(PIECES, per_event=per_event)
        body = body_of(
            path, stream_options={"include_usage": has_usage}, return_token_ids=wants_ids
        )
        size = sum(sizes(model, path, body))
        dying = [scale_out_instance(model, death=Death(int(where * (size - 1))))]
        if where_too is not None:
            dying.append(scale_out_instance(model, death=Death(int(where_too * 700))))
        async with resuming(*dying, scale_out_instance(model)) as harness:
            events = await ask(harness, path, body)
            assert say_together(events) == say_together(expected(model, path, body))
            await harness.settle()

    run(check())


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_events_have_the_form_that_they_would_have_had(run: Any, path: str) -> None:
    """One by one, where the server sends them so."""

    async def check() -> None:
        model = FakeModel(PIECES)
        body = body_of(path, stream_options={"include_usage": True}, return_token_ids=True)
        begun = sum(sizes(model, path, body)[:2])
        dying = scale_out_instance(model, death=Death(begun))
        good = scale_out_instance(model, pause_s=0.02)
        async with resuming(dying, good) as harness:
            assert await ask(harness, path, body) == expected(model, path, body)
            bad, other = harness.proxy.fleet
            assert (bad.stats.resumes, other.stats.answered) == (1, {200: 1})
            await harness.settle()

    run(check())


def test_calls_carry_the_clients_key_and_nothing_of_its_frame(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        good = scale_out_instance(model)
        async with resuming(scale_out_instance(model, death=Death(500)), good) as harness:
            headers = b"Authorization: Bearer k\r\nX-Request-Id: r1\r\nAccept-Encoding: gzip\r\n"
            await ask(harness, COMPLETION, body_of(COMPLETION), headers)
            targets = [one.target.decode() for one in good.requests]
            assert targets[:3] == [f"{COMPLETION}/render", f"{COMPLETION}/derender", GENERATE]
            assert set(targets[3:]) == {f"{COMPLETION}/derender"}
            for one in good.requests:
                found = one.headers()
                assert found["authorization"] == "Bearer k"
                assert found["x-request-id"] == "r1"
                assert found["accept-encoding"] == "identity"
                assert found["content-type"] == "application/json"
                assert found["host"] == f"127.0.0.1:{good.port}"
            await harness.settle()

    run(check())


def test_an_instance_with_this_plugin_is_asked_first(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        dying, plain = stream_instance(model, Death(500)), scale_out_instance(model)
        without, ours = FakeInstance(), stream_instance(model)
        async with resuming(dying, without, plain, ours) as harness:
            list(harness.proxy.fleet)[3].resumes = True
            await ask(harness, COMPLETION, body_of(COMPLETION))
            assert [one.target for one in ours.requests] == [RESUME_PATH.encode()]
            assert not plain.requests
            assert not without.requests
        async with resuming(stream_instance(model, Death(500)), without, plain) as harness:
            await ask(harness, COMPLETION, body_of(COMPLETION))
            assert plain.requests
            assert not without.requests, "who cannot is asked when nobody else is left"

    run(check())


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("route", ["render", "generate", "derender"])
@pytest.mark.parametrize("how", ["404", "500", "garbage"])
def test_a_route_that_fails_is_not_asked_for_more(
    run: Any, path: str, route: str, how: str
) -> None:
    """Before anything was sent: the next instance goes on, and the last one's reason is told."""

    async def check() -> None:
        model = FakeModel(PIECES)
        body = body_of(path)
        bad = scale_out_instance(model, RouteFault(route, how))
        dying = stream_instance(model, Death(600))
        async with resuming(dying, bad, scale_out_instance(model)) as harness:
            events = await ask(harness, path, body)
            assert say_together(events) == say_together(expected(model, path, body))
            other = list(harness.proxy.fleet)[1]
            assert other.life.state is lifecycle.State.READY, "it may be well for all else"
            assert other.stats.errors == {"not continued": 1}
            await harness.settle()
        async with resuming(stream_instance(model, Death(600)), bad) as harness:
            events = await ask(harness, path, body)
            message = error_in(events)
            assert route in message
            whole = say_together(expected(model, path, body))
            assert whole.text.startswith(say_together(events[:-1]).text)
            await harness.settle()

    run(check())


@pytest.mark.parametrize(
    "fault",
    [
        RouteFault("render", "reset"),
        RouteFault("derender", "reset"),
        RouteFault("generate", "reset"),
        RouteFault("generate", "cut"),
        RouteFault("generate", "unended"),
        RouteFault("generate", "error"),
        RouteFault("generate", "no event"),
        RouteFault("derender", "reset", after=2),
        RouteFault("derender", "500", after=1),
        RouteFault("derender", "404", after=2),
        RouteFault("derender", "garbage", after=3),
    ],
    ids=lambda fault: f"{fault.route} {fault.how} {fault.after}",
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_server_that_dies_or_fails_in_the_middle_is_continued_too(
    run: Any, path: str, fault: RouteFault
) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        body = body_of(path, stream_options={"include_usage": True})
        bad = scale_out_instance(
            model, RouteFault(fault.route, fault.how, fault.after), pause_s=0.005
        )
        dying = stream_instance(model, Death(600))
        async with resuming(dying, bad, scale_out_instance(model)) as harness:
            events = await ask(harness, path, body)
            assert say_together(events) == say_together(expected(model, path, body))
            _, other, _ = harness.proxy.fleet
            assert other.life.state is lifecycle.State.SUSPECT
            assert sum(other.stats.errors.values()) == 1
            await harness.settle()

    run(check())


def test_a_dead_server_is_passed_over(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        dead, good = scale_out_instance(model), scale_out_instance(model)
        async with resuming(stream_instance(model, Death(600)), dead, good) as harness:
            await dead.die()
            body = body_of(COMPLETION)
            events = await ask(harness, COMPLETION, body)
            assert say_together(events) == say_together(expected(model, COMPLETION, body))
            assert list(harness.proxy.fleet)[1].life.state is lifecycle.State.SUSPECT
            await harness.settle()

    run(check())


@pytest.mark.parametrize(
    ("rendered", "why"),
    [
        ({"sampling_params": {"seed": 3}}, "a seed"),
        ({"sampling_params": {"stop": ["x"]}}, "stop strings"),
        ({"sampling_params": {"max_tokens": 1}}, "it has all its tokens"),
        ({"features": {}}, "media"),
    ],
)
def test_what_it_cannot_continue_ends_in_an_error_that_says_why(
    run: Any, rendered: dict[str, Any], why: str
) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        plain = scale_out_instance(model, rendered=rendered)
        async with resuming(stream_instance(model, Death(600)), plain) as harness:
            message = error_in(await ask(harness, COMPLETION, body_of(COMPLETION)))
            assert f"cannot continue the stream (HTTP 400: " in message  # noqa: F541
            assert why in message
            assert [one.target.decode() for one in plain.requests] == [f"{COMPLETION}/render"]
            await harness.settle()

    run(check())


def test_a_server_with_a_parser_of_chats_is_told_by_its_state(run: Any) -> None:
    """It wants all of the output with each chunk; what it has parsed is not compared with vLLM."""

    async def check() -> None:
        model = FakeModel(PIECES)
        plain = scale_out_instance(model)
        inner = plain.script

        async def script(received: Any, writer: Any) -> None:
            if received.target.endswith(b"/derender"):
                state = {"output_token_ids": [1], "output_chunk_lens": [1]}
                said = {"chunk": {"model": "fake", "choices": []}, "stream_state": state}
                body = json.dumps(said).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                return
            await inner(received, writer)

        plain.script = script
        async with resuming(stream_instance(model, Death(600)), plain) as harness:
            assert "parser" in error_in(await ask(harness, CHAT, body_of(CHAT)))
            assert GENERATE.encode() not in {one.target for one in plain.requests}

    run(check())


@pytest.mark.parametrize("route", ["render", "generate", "derender"])
def test_a_client_that_goes_ends_the_call_at_once(run: Any, route: str) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        silent = scale_out_instance(model, RouteFault(route, "silence"))
        async with resuming(stream_instance(model, Death(600)), silent) as harness:
            client = await harness.connect()
            client.send(request(json.dumps(body_of(COMPLETION)).encode()))
            async with asyncio.timeout(PATIENCE_S):
                while not any(one.target.endswith(route.encode()) for one in silent.requests):
                    await asyncio.sleep(0.002)
            client.writer.transport.abort()
            async with asyncio.timeout(PATIENCE_S):
                await silent.requests[-1].gone.wait()
            await harness.settle()

    run(check())


def test_a_client_that_goes_in_mid_stream_ends_the_generation(run: Any) -> None:
    async def check() -> None:
        model = FakeModel([b"a"] * 2000)
        slow = scale_out_instance(model, pause_s=0.01)
        async with resuming(stream_instance(model, Death(600)), slow) as harness:
            client = await harness.connect()
            body = body_of(COMPLETION)
            client.send(request(json.dumps(body).encode()))
            async with asyncio.timeout(PATIENCE_S):
                while not any(one.target == GENERATE.encode() for one in slow.requests):
                    await asyncio.sleep(0.002)
            (generating,) = [one for one in slow.requests if one.target == GENERATE.encode()]
            client.writer.transport.abort()
            async with asyncio.timeout(PATIENCE_S):
                await generating.gone.wait()
            await harness.settle()

    run(check())


def test_a_client_that_reads_nothing_stops_the_generation(run: Any) -> None:
    """Between the server and the client no more is held than the buffers of a few sockets."""
    size, number = 50_000, 1000

    async def check() -> None:
        model = FakeModel([b"a" * size] * number)
        begun = sum(sizes(model, COMPLETION, body_of(COMPLETION))[:2])
        plain = scale_out_instance(model, pad_bytes=size)
        async with resuming(stream_instance(model, Death(begun)), plain) as harness:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", harness.port))
                await loop.sock_sendall(client, request(json.dumps(body_of(COMPLETION)).encode()))
                num_asked = -1
                async with asyncio.timeout(PATIENCE_S):
                    while num_asked != len(model.asked) or num_asked < 4:
                        num_asked = len(model.asked)
                        await asyncio.sleep(0.3)
            states = [one["stream_state"] for one in model.asked if one.get("stream_state")]
            assert states[-1]["num_tokens"] < number // 2
            await harness.settle()

    run(check())
