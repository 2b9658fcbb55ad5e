"""Instances that fail in every way, and clients that leave: no silence, no request left counted."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.lifecycle import State
from xllm_plugin.testing.fake_instance import (
    FakeInstance,
    Received,
    answer,
    answer_raw,
    stream,
)
from xllm_plugin.testing.instance_faults import (
    BEFORE_AN_ANSWER,
    BUSY,
    HALF_ANSWERS,
    STREAM_HEAD,
)
from xllm_plugin.testing.service_harness import PATIENCE_S, Harness, request, serving

EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"


def first(_: Any, __: Any) -> Any:
    """A policy that always takes the first candidate."""
    from xllm_plugin.service.policy import Choice

    return Choice(0, "the first")


async def eventually(true: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.002)


async def never(received: Received, _: asyncio.StreamWriter) -> None:
    """A script that takes a request and does nothing."""
    await received.gone.wait()


def known(harness: Harness) -> list[Instance]:
    return list(harness.proxy.fleet)


def error_of(body: bytes) -> dict[str, Any]:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@pytest.mark.parametrize("fault", [*BEFORE_AN_ANSWER.values(), BUSY])
def test_a_fault_before_the_first_byte_costs_the_client_nothing(run: Any, fault: Any) -> None:
    async def check() -> None:
        bad, good = FakeInstance(script=fault), FakeInstance(script=answer(b"good"))
        async with serving(bad, good, policy=first) as harness:
            head, body = await harness.ask(request())
            assert (head[:12], body) == (b"HTTP/1.1 200", b"good")
            assert bad.requests[0].body == good.requests[0].body
            assert known(harness)[0].stats.retries == 1
            await harness.settle()

    run(check())


@pytest.mark.parametrize("fault", BEFORE_AN_ANSWER.values())
def test_a_fault_everywhere_is_said(run: Any, fault: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=fault)) as harness:
            head, body = await harness.ask(request())
            assert head.startswith((b"HTTP/1.1 502", b"HTTP/1.1 503"))
            assert error_of(body)["code"] in (502, 503)
            await harness.settle()

    run(check())


def test_the_last_503_of_an_instance_is_passed_on(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=BUSY), FakeInstance(script=BUSY)) as harness:
            head, body = await harness.ask(request())
            assert (head[:12], body) == (b"HTTP/1.1 503", b'{"busy":1}')
            await harness.settle()

    run(check())


def test_an_instance_that_refuses_whatever_comes_is_no_black_hole(run: Any) -> None:
    """It is idle, as it does nothing; between two probes it gets as much as tells that."""

    async def check() -> None:
        bad, good = FakeInstance(script=BUSY), FakeInstance(script=answer(b"good"))
        async with serving(bad, good, policy=first) as harness:
            for _ in range(9):
                assert (await harness.ask(request()))[1] == b"good"
            assert len(bad.requests) == harness.proxy.fleet.timings.num_failures
            assert known(harness)[0].life.state is State.SUSPECT
            fleet = harness.proxy.fleet
            fleet.report(known(harness)[0], lifecycle.Alive(""))
            await harness.ask(request())
            assert len(bad.requests) == harness.proxy.fleet.timings.num_failures + 1
            await harness.settle()

    run(check())


def test_an_instance_that_refuses_because_it_has_too_much_to_do_stays_ready(run: Any) -> None:
    """It is to get on with that, and others would soon have too much to do as well."""

    async def take_one(received: Received, writer: asyncio.StreamWriter) -> None:
        if len(full.requests) == 1:
            await received.gone.wait()
        else:
            await BUSY(received, writer)

    full, other = FakeInstance(script=take_one), FakeInstance(script=answer(b"good"))

    async def check() -> None:
        async with serving(full, other, policy=first) as harness:
            held = await harness.connect()
            held.send(request())
            await eventually(lambda: full.requests)
            for _ in range(5):
                assert (await harness.ask(request()))[1] == b"good"
            assert known(harness)[0].life.state is State.READY

    run(check())


def test_settings_that_are_read_again_give_no_new_burst_of_retries(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=BUSY)) as harness:
            proxy = harness.proxy
            before = proxy.retry_budget, proxy.hedge_budget
            proxy.reconfigure(proxy.config)
            assert (proxy.retry_budget, proxy.hedge_budget) == before
            routing = proxy.config.routing.model_copy(update={"retry_share": 0.5})
            proxy.reconfigure(proxy.config.model_copy(update={"routing": routing}))
            assert proxy.retry_budget.share == proxy.hedge_budget.share == 0.5
            assert proxy.retry_budget is not proxy.hedge_budget

    run(check())


@pytest.mark.parametrize(
    ("fault", "timeouts", "status"),
    [(BUSY, {}, b"503"), (never, {"first_byte_s": 0.05}, b"504")],
)
def test_retries_of_what_others_may_be_too_busy_for_are_a_share_of_requests(
    run: Any, fault: Any, timeouts: dict[str, float], status: bytes
) -> None:
    async def check() -> None:
        bad, good = FakeInstance(script=fault), FakeInstance(script=answer(b"good"))
        sections: Any = {"routing": {"retry_share": 0.0}, "timeouts": timeouts}
        async with serving(bad, good, policy=first, **sections) as harness:
            head, _ = await harness.ask(request())
            assert head.startswith(b"HTTP/1.1 " + status)
            assert not good.requests
            await harness.settle()
        dead = FakeInstance(script=BEFORE_AN_ANSWER["closes the connection"])
        async with serving(dead, good, policy=first, **sections) as harness:
            assert (await harness.ask(request()))[1] == b"good"  # its work was lost
            await harness.settle()

    run(check())


def test_an_instance_that_refuses_connections_is_suspect_at_once(run: Any) -> None:
    async def check() -> None:
        dead, good = FakeInstance(), FakeInstance(script=answer(b"good"))
        async with serving(dead, good, policy=first) as harness:
            await dead.die()
            for _ in range(3):
                assert (await harness.ask(request()))[1] == b"good"
            states = [one.life.state for one in known(harness)]
            assert states == [State.SUSPECT, State.READY]
            assert known(harness)[0].stats.errors == {"refused": 1}
            await harness.settle()

    run(check())


def test_suspects_are_tried_when_nothing_else_is_left(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            (only,) = known(harness)
            harness.proxy.fleet.report(only, lifecycle.Failed("a probe", certain=True))
            assert only.life.state is State.SUSPECT
            assert (await harness.ask(request()))[0].startswith(b"HTTP/1.1 200")

    run(check())


def test_no_instance_is_said_with_a_time_to_come_back(run: Any) -> None:
    async def check() -> None:
        async with serving(routing={"retry_after_s": 7}) as harness:
            head, body = await harness.ask(request())
            assert head.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 7" in head
            assert error_of(body)["type"] == "ServiceUnavailableError"
            assert (await harness.ask(request(b"", b"/health", b"GET")))[0][9:12] == b"503"

    run(check())


def test_a_policy_that_fails_is_an_error_and_not_the_end(run: Any) -> None:
    async def check() -> None:
        def broken(_: Any, candidates: Any) -> Any:
            return candidates[99]

        async with serving(FakeInstance(), policy=broken) as harness:
            client = await harness.connect()
            for _ in range(2):
                client.send(request())
                head, body = await client.read_answer()
                assert head.startswith(b"HTTP/1.1 500")
                assert "'tested' has failed" in error_of(body)["message"]
            await harness.settle()

    run(check())


def test_an_unknown_path_is_not_sent_twice(run: Any) -> None:
    """Its effects are not known, so an instance that may have seen it was the only one to."""

    async def check() -> None:
        instances = FakeInstance(script=answer_raw(close=True)), FakeInstance()
        instances[1].script = instances[0].script
        async with serving(*instances) as harness:
            head, _ = await harness.ask(request(path=b"/v1/files"))
            assert head.startswith(b"HTTP/1.1 502")
            assert sum(len(one.requests) for one in instances) == 1

    run(check())


def test_a_kept_connection_that_has_gone_stale_is_no_failure(run: Any) -> None:
    async def check() -> None:
        calls = 0

        async def script(received: Received, writer: asyncio.StreamWriter) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:  # as if closed just before the request arrived
                writer.transport.abort()
                return
            await answer(b"ok")(received, writer)

        async with serving(FakeInstance(script=script)) as harness:
            client = await harness.connect()
            for _ in range(2):
                client.send(request())
                assert (await client.read_answer())[1] == b"ok"
            (instance,) = known(harness)
            assert instance.life.state is State.READY
            assert not instance.stats.errors

    run(check())


def test_a_stream_that_is_cut_ends_with_an_error_event(run: Any) -> None:
    script = answer_raw(STREAM_HEAD, b"9\r\ndata: a\n\n\r\n", close=True, pause_s=0.002)

    async def check() -> None:
        async with serving(FakeInstance(script=script)) as harness:
            client = await harness.connect()
            client.send(request())
            head, body = await client.read_answer()
            assert head == STREAM_HEAD
            events = [line for line in body.split(b"\r\n") if line.startswith(b"data: ")]
            assert events[0] == b"data: a\n\n"
            assert error_of(events[1].removeprefix(b"data: "))["code"] == 502
            assert await client.read_all() == b""
            await harness.settle()

    run(check())


@pytest.mark.parametrize("raw", HALF_ANSWERS.values())
def test_half_an_answer_is_a_cut_connection(run: Any, raw: bytes) -> None:
    """No client may take it for a whole one."""

    async def check() -> None:
        async with serving(FakeInstance(script=answer_raw(raw, close=True))) as harness:
            client = await harness.connect()
            client.send(request())
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.read_answer()
            await harness.settle()

    run(check())


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" + EVIL,
        STREAM_HEAD + b"0\r\n\r\n" + EVIL,
        STREAM_HEAD + b"zz\r\nevil",
    ],
)
def test_more_than_an_answer_reaches_nobody(run: Any, raw: bytes) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=answer_raw(raw))) as harness:
            client = await harness.connect()
            client.send(request() + request(headers=b"Connection: close\r\n"))
            try:
                everything = await client.read_all()
            except ConnectionError:
                everything = b""
            assert b"evil" not in everything
            await harness.settle()

    run(check())


@pytest.mark.parametrize("rest", [b"zz\r\nevil", b"0\r\n\r\n" + EVIL])
def test_nonsense_in_mid_stream_is_said(run: Any, rest: bytes) -> None:
    script = answer_raw(STREAM_HEAD + b"9\r\ndata: a\n\n\r\n", rest, pause_s=0.03)

    async def check() -> None:
        async with serving(FakeInstance(script=script)) as harness:
            client = await harness.connect()
            client.send(request())
            _, body = await client.read_answer()
            assert b"data: a\n\n" in body
            assert b"what is no answer" in body
            assert b"evil" not in body
            await harness.settle()

    run(check())


def test_an_answer_that_nobody_asked_for_closes_its_connection(run: Any) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        await answer(b"right")(received, writer)
        await asyncio.sleep(0.02)
        await answer(b"evil!")(received, writer)

    async def check() -> None:
        async with serving(FakeInstance(script=script)) as harness:
            assert (await harness.ask(request()))[1] == b"right"
            await asyncio.sleep(0.1)
            assert (await harness.ask(request()))[1] == b"right"

    run(check())


def test_an_instance_that_never_answers_is_given_up(run: Any) -> None:
    async def check() -> None:
        silent, good = FakeInstance(script=never), FakeInstance(script=answer(b"good"))
        limits = {"first_byte_s": 0.1}
        async with serving(silent, good, policy=first, timeouts=limits) as harness:
            assert (await harness.ask(request()))[1] == b"good"
            await eventually(silent.requests[0].gone.is_set)
            good.script = never
            head, body = await harness.ask(request())
            assert head.startswith(b"HTTP/1.1 504")  # nobody is left to ask
            assert "did not answer within 0.1 s" in error_of(body)["message"]
            await harness.settle()

    run(check())


def test_an_unrepeatable_request_that_is_never_answered_gets_504(run: Any) -> None:
    async def check() -> None:
        instances = FakeInstance(script=never), FakeInstance(script=never)
        async with serving(*instances, timeouts={"first_byte_s": 0.05}) as harness:
            head, _ = await harness.ask(request(path=b"/v1/files"))
            assert head.startswith(b"HTTP/1.1 504")

    run(check())


def test_a_stream_that_stalls_is_ended(run: Any) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"9\r\ndata: a\n\n\r\n")
        await received.gone.wait()

    async def check() -> None:
        async with serving(FakeInstance(script=script), timeouts={"stalled_s": 0.1}) as harness:
            _, body = await harness.ask(request())
            assert b"nothing was heard" in body
            await eventually(harness.instances[0].requests[0].gone.is_set)

    run(check())


def test_a_client_that_leaves_before_the_answer_cancels_it(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=never)) as harness:
            client = await harness.connect()
            client.send(request())
            await eventually(lambda: harness.instances[0].requests)
            assert known(harness)[0].in_flight == 1
            client.writer.transport.abort()
            await eventually(harness.instances[0].requests[0].gone.is_set)
            await harness.settle()

    run(check())


def test_a_client_that_leaves_in_mid_stream_cancels_it(run: Any) -> None:
    async def check() -> None:
        endless = stream(*[b"data: x\n\n"] * 100_000, pause_s=0.001)
        async with serving(FakeInstance(script=endless)) as harness:
            client = await harness.connect()
            client.send(request())
            await client.reader.readuntil(b"data: x")
            client.writer.close()
            await eventually(harness.instances[0].requests[0].gone.is_set)
            await harness.settle()
            assert known(harness)[0].stats.errors == {"client gone": 1}
            assert known(harness)[0].life.state is State.READY

    run(check())


def test_a_client_that_leaves_while_we_connect(run: Any) -> None:
    async def check() -> None:
        with socket.socket() as full:  # listens, and its queue of connections is full
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            async with serving() as harness:
                fleet = harness.proxy.fleet
                entry = InstanceEntry(url=f"http://127.0.0.1:{full.getsockname()[1]}")
                instance = fleet.register(entry, source="test")
                fleet.set_models(instance, {"fake": {}})
                fleet.report(instance, lifecycle.Alive(""))
                client = await harness.connect()
                client.send(request())
                await eventually(lambda: instance.in_flight)
                client.writer.close()
                await eventually(lambda: not instance.in_flight)
            for filler in fillers:
                filler.close()

    run(check())


def test_a_slow_reader_slows_its_instance_and_nothing_piles_up(run: Any) -> None:
    sent = 0

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(STREAM_HEAD)
        for _ in range(400):
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")

    async def check() -> None:
        async with serving(FakeInstance(script=script)) as harness:
            client = await harness.connect()
            client.reader._limit = 1024  # type: ignore[attr-defined]
            client.send(request())
            await eventually(lambda: sent > 5)
            before = -1
            while before != sent:  # until the instance is held back
                before = sent
                await asyncio.sleep(0.1)
            assert sent < 300
            (connection,) = harness.proxy.clients
            assert connection.transport.get_write_buffer_size() < 2_000_000
            _, body = await client.read_answer()
            assert body.count(b"x") == 400 * 65536
            await harness.settle()

    run(check())


def test_a_slow_reader_of_two_answers(run: Any) -> None:
    """The second begins while the client is still behind with the first."""
    body = b"y" * 3_000_000

    async def check() -> None:
        async with serving(FakeInstance(script=answer(body))) as harness:
            client = await harness.connect()
            client.reader._limit = 1024  # type: ignore[attr-defined]
            client.send(request() * 4)
            await asyncio.sleep(0.2)
            for _ in range(4):
                assert (await client.read_answer())[1] == body
            await harness.settle()

    run(check())


def test_load_is_booked_at_dispatch(run: Any) -> None:
    async def check() -> None:
        instances = FakeInstance(script=never), FakeInstance(script=never)
        async with serving(*instances) as harness:
            clients = [await harness.connect() for _ in range(6)]
            for client in clients:
                client.send(request())
            await eventually(lambda: sum(len(one.requests) for one in instances) == 6)
            assert [one.in_flight for one in known(harness)] == [3, 3]
            for client in clients:
                client.writer.close()
            await harness.settle()

    run(check())


def test_draining_finishes_what_runs_and_takes_nothing_new(run: Any) -> None:
    async def check() -> None:
        slow = stream(*[b"data: x\n\n"] * 20, pause_s=0.01)
        async with serving(FakeInstance(script=slow)) as harness:
            idle, busy = await harness.connect(), await harness.connect()
            busy.send(request())
            await busy.reader.readuntil(b"data: x")
            drain = asyncio.ensure_future(harness.proxy.drain(PATIENCE_S))
            assert await idle.read_all() == b""
            assert (await busy.read_all()).count(b"data: x") == 19
            assert await drain == 0
            with pytest.raises(ConnectionError):
                await harness.connect()

    run(check())


def test_draining_has_a_bound(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=never)) as harness:
            client = await harness.connect()
            client.send(request())
            await eventually(lambda: harness.instances[0].requests)
            assert await harness.proxy.drain(0.05) == 1
            await eventually(harness.instances[0].requests[0].gone.is_set)

    run(check())
