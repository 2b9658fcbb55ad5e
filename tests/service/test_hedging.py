"""Requests that are asked twice: one answer, and nothing left of the other sending."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.service import lifecycle
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.flow.wishes import read_wishes
from xllm_plugin.service.hedging import hedge_wait_s
from xllm_plugin.service.key_file import KeyRecord, hash_of, write
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.policy import Choice
from xllm_plugin.service.routes import Kind
from xllm_plugin.service.stats import Stats
from xllm_plugin.testing.fake_instance import (
    FakeInstance,
    Received,
    Script,
    answer,
    chunked,
    stream,
)
from xllm_plugin.testing.fake_streams import Death, FakeModel, events_of, stream_instance
from xllm_plugin.testing.instance_faults import BEFORE_AN_ANSWER, BUSY, STREAM_HEAD
from xllm_plugin.testing.service_harness import PATIENCE_S, Harness, request, serving

SOON: dict[str, Any] = {"routing": {"hedge_after_s": 0.02}}
LATE: dict[str, Any] = {"routing": {"hedge_after_s": 600.0}}
STREAM = b'{"model":"fake","stream":true,"prompt":"x"}'
UNARMED = b'{"model":"fake","stream":true,"n":2}'
EXPLAINED = b"x-xllm-explain: 1\r\n"
PIECES = [b"a", b"b", b"c", b"d"]


def first(_: Any, __: Any) -> Choice:
    """A policy that always takes the first candidate."""
    return Choice(0, "the first")


async def silent(received: Received, _: asyncio.StreamWriter) -> None:
    """A script that takes a request and never answers."""
    await received.gone.wait()


async def only_head(received: Received, writer: asyncio.StreamWriter) -> None:
    """A script that begins a stream, as vLLM does long before its first token, and no more."""
    writer.write(STREAM_HEAD)
    await received.gone.wait()


def after(event: asyncio.Event, script: Script) -> Script:
    """A script that begins when it is let."""

    async def waiting(received: Received, writer: asyncio.StreamWriter) -> None:
        await event.wait()
        await script(received, writer)

    return waiting


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.002)


def known(harness: Harness) -> list[Instance]:
    return list(harness.proxy.fleet)


def hedges(harness: Harness) -> list[dict[str, int]]:
    return [one.stats.hedges for one in known(harness)]


def name_of(instance: FakeInstance) -> str:
    return f"127.0.0.1:{instance.port}"


@pytest.mark.parametrize(
    ("fault", "body", "good"),
    [
        (silent, UNARMED, answer(b"good")),
        (silent, STREAM, stream_instance(FakeModel([b"good"])).script),
        (only_head, STREAM, stream_instance(FakeModel([b"good"])).script),
        (only_head, UNARMED, stream(b"data: good\n\n")),
    ],
)
def test_a_second_instance_answers_for_a_silent_one(
    run: Any, fault: Script, body: bytes, good: Script
) -> None:
    async def check() -> None:
        bad, other = FakeInstance(script=fault), FakeInstance(script=good)
        async with serving(bad, other, policy=first, **SOON) as harness:
            head, found = await harness.ask(request(body, headers=EXPLAINED))
            assert head.count(b"HTTP/1.1 200") == 1
            assert b"good" in found
            await until(bad.requests[0].gone.is_set)
            assert bad.requests[0].body == other.requests[0].body
            assert hedges(harness) == [{}, {"won": 1}]
            said = json.loads(head.partition(b"x-xllm-explain: ")[2].partition(b"\r\n")[0])
            assert (said["instance"], said["attempt"]) == (name_of(other), 2)
            assert said["asked"] == [name_of(bad), name_of(other)]
            assert known(harness)[0].life.state is State.READY
            await harness.settle()

    run(check())


def test_the_first_may_still_be_faster(run: Any) -> None:
    async def check() -> None:
        asked = asyncio.Event()

        async def slow(received: Received, _: asyncio.StreamWriter) -> None:
            asked.set()
            await received.gone.wait()

        one, two = FakeInstance(script=after(asked, answer(b"one"))), FakeInstance(script=slow)
        async with serving(one, two, policy=first, **SOON) as harness:
            head, body = await harness.ask(request(UNARMED, headers=EXPLAINED))
            assert body == b"one"
            await until(two.requests[0].gone.is_set)
            assert hedges(harness) == [{}, {"lost": 1}]
            said = json.loads(head.partition(b"x-xllm-explain: ")[2].partition(b"\r\n")[0])
            assert (said["instance"], said["attempt"]) == (name_of(one), 1)
            assert said["asked"] == [name_of(two), name_of(one)]
            await harness.settle()

    run(check())


def test_who_answers_in_time_is_the_only_one_that_is_asked(run: Any) -> None:
    async def check() -> None:
        one, two = FakeInstance(script=answer(b"one")), FakeInstance()
        async with serving(one, two, policy=first, **LATE) as harness:
            head, body = await harness.ask(request(UNARMED, headers=EXPLAINED))
            assert body == b"one"
            assert b'"asked"' not in head
            assert not two.requests
            await harness.settle()

    run(check())


def test_a_stream_that_has_begun_may_take_its_time(run: Any) -> None:
    async def check() -> None:
        let = asyncio.Event()

        async def slow(_: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM_HEAD + b"9\r\ndata: a\n\n\r\n")
            await let.wait()
            writer.write(b"0\r\n\r\n")

        one, two = FakeInstance(script=slow), FakeInstance()
        async with serving(one, two, policy=first, **SOON) as harness:
            client = await harness.connect()
            client.send(request(UNARMED))
            await client.reader.readuntil(b"data: a")
            await asyncio.sleep(0.1)
            assert not two.requests
            let.set()
            assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"\n\n\r\n0\r\n\r\n")
            await harness.settle()

    run(check())


@pytest.mark.looks_inside
def test_the_time_to_the_first_token_that_was_promised_is_not_used_up_by_waiting(
    run: Any, monkeypatch: Any
) -> None:
    async def check() -> None:
        one, two = FakeInstance(script=silent), FakeInstance(script=answer(b"two"))
        async with serving(one, two, policy=first, **LATE) as harness:
            found = await harness.ask(request(UNARMED, headers=b"x-xllm-ttft-ms: 40\r\n"))
            assert found[1] == b"two"
            await harness.settle()

    monkeypatch.setattr("xllm_plugin.service.hedging._LEAST_PART", 0.0)
    run(check())


@pytest.mark.looks_inside
@pytest.mark.parametrize(
    ("ttft_ms", "spent_s", "wait_s"),
    [
        (None, 0.0, 8.0),
        (None, 5.0, 8.0),  # nothing was promised, so nothing is late
        ("12000", 0.0, 6.0),
        ("12000", 3.0, 3.0),
        ("60000", 3.0, 8.0),
        ("12000", 5.0, 2.0),
        ("12000", 50.0, 2.0),
        ("1", 0.0, 2.0),
    ],
)
def test_a_promise_brings_a_hedge_forward_within_bounds(
    ttft_ms: str | None, spent_s: float, wait_s: float
) -> None:
    headers = {"xllm_ttft_ms": ttft_ms} if ttft_ms else {}
    exchange: Any = SimpleNamespace(
        route=SimpleNamespace(kind=Kind.INFERENCE),
        wants_stream=True,
        upgrades=False,
        response_id="",
        wishes=read_wishes(headers, None, None),
        started_s=100.0,
        proxy=SimpleNamespace(loop=SimpleNamespace(time=lambda: 100.0 + spent_s)),
    )
    assert hedge_wait_s(exchange, 8.0) == pytest.approx(wait_s)
    exchange.wants_stream = False
    assert hedge_wait_s(exchange, 8.0) is None


def test_hedges_take_no_retries_and_retries_no_hedges(run: Any) -> None:
    async def check(fault: Script, spent: str, found: bytes) -> None:
        one, two = FakeInstance(script=fault), FakeInstance(script=answer(b"two"))
        timeouts = {"first_byte_s": 600.0}
        async with serving(one, two, policy=first, timeouts=timeouts, **SOON) as harness:
            budget = getattr(harness.proxy, spent)
            while budget.take(0):
                pass
            assert (await harness.ask(request(UNARMED)))[1] == found
            await harness.settle()

    run(check(BUSY, "hedge_budget", b"two"))
    run(check(silent, "retry_budget", b"two"))
    run(check(BUSY, "retry_budget", b'{"busy":1}'))


ERROR = b'data: {"error":{"message":"no","type":"InternalServerError","code":500}}\n\n'


@pytest.mark.parametrize("num_early", [0, len(STREAM_HEAD)])
def test_a_stream_that_begins_with_an_error_has_not_won(run: Any, num_early: int) -> None:
    async def check() -> None:
        fail, let = asyncio.Event(), asyncio.Event()
        model = FakeModel(PIECES)

        async def late(received: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM_HEAD[:num_early])
            await let.wait()
            events = model.events(received.target.decode(), json.loads(received.body))
            writer.write(STREAM_HEAD[num_early:] + chunked(events))

        one = FakeInstance(script=after(fail, stream(ERROR)))
        two = FakeInstance(script=late)
        async with serving(one, two, policy=first, **SOON) as harness:
            asking = asyncio.create_task(harness.ask(request(STREAM, headers=EXPLAINED)))
            await until(lambda: two.requests)
            fail.set()
            await until(lambda: known(harness)[0].stats.retries)
            assert [one.in_flight for one in known(harness)] == [0, 1]
            let.set()
            _, body = await asking
            events = events_of(body)
            assert events[-1] == "[DONE]"
            assert "".join(one["choices"][0]["text"] for one in events[:-1]) == "abcd"
            assert len(two.requests) == 1
            assert hedges(harness) == [{}, {"won": 1}]
            await harness.settle()

    run(check())


OFFLINE = b"x-xllm-class: offline\r\n"
OFFLINE_BODY = b'{"model":"fake","stream":true,"vllm_xargs":{"xllm_class":"offline"}}'


@pytest.mark.parametrize(
    ("raw", "routing"),
    [
        (request(), {}),
        (request(b'{"model":"fake","stream":false}'), {}),
        (request(UNARMED, headers=OFFLINE), {}),
        (request(OFFLINE_BODY), {}),
        (request(UNARMED, path=b"/v1/files"), {}),
        (request(path=b"/version", body=b"", method=b"GET"), {}),
        (request(UNARMED, path=b"/v1/responses"), {}),
        (request(b'{"model":"fake","stream":true,"previous_response_id":"resp_1"}'), {}),
        (request(UNARMED), {"retry_share": 0.0}),
        (request(UNARMED), {"num_retries": 0}),
    ],
)
def test_what_is_never_asked_twice(run: Any, raw: bytes, routing: dict[str, Any]) -> None:
    async def check() -> None:
        let = asyncio.Event()
        one, two = FakeInstance(script=after(let, answer(b"one"))), FakeInstance()
        settings = {"hedge_after_s": 0.001, **routing}
        async with serving(one, two, policy=first, routing=settings) as harness:
            asking = asyncio.create_task(harness.ask(raw))
            await until(lambda: one.requests)
            await asyncio.sleep(0.05)
            assert not two.requests
            let.set()
            assert (await asking)[1] == b"one"
            await harness.settle()

    run(check())


@pytest.mark.parametrize(
    "fault",
    [
        BUSY,
        answer(b"{}", "429 Too Many Requests"),
        answer(b"{}", "500 Internal Server Error"),
        BEFORE_AN_ANSWER["closes the connection"],
        BEFORE_AN_ANSWER["garbage"],
    ],
)
def test_a_hedge_that_fails_leaves_the_first_where_it_is(run: Any, fault: Script) -> None:
    async def check() -> None:
        let = asyncio.Event()
        one, two = FakeInstance(script=after(let, answer(b"one"))), FakeInstance(script=fault)
        async with serving(one, two, policy=first, **SOON) as harness:
            asking = asyncio.create_task(harness.ask(request(UNARMED)))
            await until(lambda: known(harness)[1].stats.errors)
            assert [one.in_flight for one in known(harness)] == [1, 0]
            let.set()
            assert (await asking)[1] == b"one"
            assert hedges(harness) == [{}, {"lost": 1}]
            await harness.settle()

    run(check())


@pytest.mark.parametrize("fault", [BUSY, BEFORE_AN_ANSWER["closes the connection"]])
def test_a_first_that_fails_leaves_the_hedge_where_it_is(run: Any, fault: Script) -> None:
    async def check() -> None:
        fail, let = asyncio.Event(), asyncio.Event()
        one = FakeInstance(script=after(fail, fault))
        two = FakeInstance(script=after(let, answer(b"two")))
        async with serving(one, two, policy=first, **SOON) as harness:
            asking = asyncio.create_task(harness.ask(request(UNARMED)))
            await until(lambda: two.requests)
            fail.set()
            await until(lambda: known(harness)[0].stats.retries)
            assert [one.in_flight for one in known(harness)] == [0, 1]
            let.set()
            assert (await asking)[1] == b"two"
            assert len(two.requests) == 1
            assert hedges(harness) == [{}, {"won": 1}]
            await harness.settle()

    run(check())


def test_where_both_fail_a_third_is_asked(run: Any) -> None:
    async def check() -> None:
        fail = asyncio.Event()
        scripts = (after(fail, BEFORE_AN_ANSWER["closes the connection"]), BUSY, answer(b"three"))
        instances = [FakeInstance(script=script) for script in scripts]
        async with serving(*instances, policy=first, **SOON) as harness:
            asking = asyncio.create_task(harness.ask(request(UNARMED)))
            await until(lambda: known(harness)[1].stats.errors)
            fail.set()
            assert (await asking)[1] == b"three"
            assert [len(one.requests) for one in instances] == [1, 1, 1]
            await harness.settle()

    run(check())


def test_where_the_hedge_fails_another_one_is_sent(run: Any) -> None:
    """The first is silent for ever."""

    async def check() -> None:
        scripts = (silent, BUSY, answer(b"three"))
        instances = [FakeInstance(script=script) for script in scripts]
        async with serving(*instances, policy=first, **SOON) as harness:
            assert (await harness.ask(request(UNARMED)))[1] == b"three"
            await until(instances[0].requests[0].gone.is_set)
            assert hedges(harness) == [{}, {"lost": 1}, {"won": 1}]
            await harness.settle()

    run(check())


def test_the_last_answer_of_two_that_refuse_is_passed_on(run: Any) -> None:
    async def check() -> None:
        fail = asyncio.Event()
        instances = FakeInstance(script=after(fail, BUSY)), FakeInstance(script=BUSY)
        async with serving(*instances, policy=first, **SOON) as harness:
            asking = asyncio.create_task(harness.ask(request(UNARMED)))
            await until(lambda: known(harness)[1].stats.errors)
            fail.set()
            head, body = await asking
            assert (head[:12], body) == (b"HTTP/1.1 503", b'{"busy":1}')
            await harness.settle()

    run(check())


def test_a_client_that_leaves_cancels_both(run: Any) -> None:
    async def check() -> None:
        instances = FakeInstance(script=silent), FakeInstance(script=only_head)
        async with serving(*instances, policy=first, **SOON) as harness:
            client = await harness.connect()
            client.send(request(STREAM))
            await until(lambda: instances[1].requests)
            assert [one.in_flight for one in known(harness)] == [1, 1]
            client.writer.transport.abort()
            for instance in instances:
                await until(instance.requests[0].gone.is_set)
            await harness.settle()
            assert [one.stats.errors for one in known(harness)] == [{"client gone": 1}] * 2
            assert hedges(harness) == [{}, {"lost": 1}]

    run(check())


@pytest.mark.parametrize(
    ("name", "script", "number"), [("first_byte_s", silent, 3), ("stalled_s", only_head, 2)]
)
def test_two_that_are_silent_are_given_up(run: Any, name: str, script: Script, number: int) -> None:
    async def check() -> None:
        instances = [FakeInstance(script=script) for _ in range(number)]
        async with serving(*instances, policy=first, timeouts={name: 0.1}, **SOON) as harness:
            head, body = await harness.ask(request(STREAM))
            assert head.startswith(b"HTTP/1.1 504")
            assert b"did not answer within 0.1 s" in body
            assert [len(one.requests) for one in instances] == [1] * number
            await harness.settle()

    run(check())


def test_a_head_alone_is_no_answer_that_is_late(run: Any) -> None:
    """Prompts may take longer than a server that lives takes to say that it does."""

    async def check() -> None:
        let = asyncio.Event()

        async def slow(_: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM_HEAD)
            await let.wait()
            writer.write(b"9\r\ndata: a\n\n\r\n0\r\n\r\n")

        async with serving(
            FakeInstance(script=slow), timeouts={"first_byte_s": 0.05}, **SOON
        ) as harness:
            asking = asyncio.create_task(harness.ask(request(UNARMED)))
            await asyncio.sleep(0.2)
            let.set()
            assert b"data: a" in (await asking)[1]
            await harness.settle()

    run(check())


def test_only_the_one_that_is_heard_is_measured(run: Any) -> None:
    async def check() -> None:
        bad = FakeInstance(script=only_head)
        good = FakeInstance(script=stream(b"data: a\n\n"))
        async with serving(bad, good, policy=first, **SOON) as harness:
            await harness.ask(request(UNARMED))
            await harness.settle()
            loser, winner = known(harness)
            assert (loser.paces.ttft.weight, winner.paces.ttft.weight) == (0.0, 1.0)
            assert (loser.stats.ttft.sum_s, loser.stats.duration.sum_s) == (0.0, 0.0)
            assert winner.stats.ttft.sum_s > 0.0
            # Its own time, without that in which only the other one was asked.
            assert winner.paces.ttft.y < winner.stats.ttft.sum_s
            assert loser.stats.answered == {}

    run(check())


def test_the_first_is_measured_from_its_own_sending(run: Any) -> None:
    async def check() -> None:
        asked = asyncio.Event()

        async def slow(received: Received, _: asyncio.StreamWriter) -> None:
            asked.set()
            await received.gone.wait()

        one = FakeInstance(script=after(asked, stream(b"data: a\n\n")))
        two = FakeInstance(script=slow)
        routing = {"hedge_after_s": 0.1}
        async with serving(one, two, policy=first, routing=routing) as harness:
            await harness.ask(request(UNARMED))
            await harness.settle()
            winner, loser = known(harness)
            assert winner.paces.ttft.y > 0.09
            assert loser.paces.ttft.weight == 0.0

    run(check())


def test_a_hedge_comes_after_those_that_wait(run: Any) -> None:
    async def check() -> None:
        instances = FakeInstance(script=silent), FakeInstance(script=answer(b"two"))
        flow = {"enabled": True, "max_in_flight": 1, "max_waiting": 0}
        sections: dict[str, Any] = {"flow": flow, "routing": {"hedge_after_s": 0.05}}
        async with serving(*instances, policy=first, sweep_s=600.0, **sections) as harness:
            other = known(harness)[1]
            other.num_waiting = 1
            held = await harness.connect()
            held.send(request(UNARMED))
            await until(lambda: instances[0].requests)
            waiting = asyncio.create_task(harness.ask(request(UNARMED, headers=OFFLINE)))
            flow_control = harness.proxy.flow
            assert flow_control is not None
            await until(lambda: flow_control.queue)
            other.num_waiting = 0  # nobody has looked yet
            await asyncio.sleep(0.15)
            assert not instances[1].requests
            flow_control.sweep()
            assert (await waiting)[1] == b"two"
            held.writer.transport.abort()
            await harness.settle()

    run(check())


def test_a_hedge_needs_room(run: Any) -> None:
    async def check() -> None:
        let = asyncio.Event()
        instances = FakeInstance(script=after(let, answer(b"one"))), FakeInstance(script=silent)
        sections: dict[str, Any] = {"flow": {"enabled": True, "max_in_flight": 1}, **SOON}
        async with serving(*instances, policy=first, **sections) as harness:
            other = await harness.connect()
            asking = asyncio.create_task(harness.ask(request(UNARMED)))
            await until(lambda: instances[0].requests)
            other.send(request(UNARMED, headers=OFFLINE))
            await until(lambda: instances[1].requests)
            await asyncio.sleep(0.05)
            assert [len(one.requests) for one in instances] == [1, 1]
            let.set()
            assert (await asking)[1] == b"one"
            other.writer.transport.abort()
            await harness.settle()
            flow = harness.proxy.flow
            assert flow is not None
            assert all(flow.has_room(one) for one in known(harness))

    run(check())


def test_the_room_of_the_one_that_is_not_heard_is_given_to_who_waits(run: Any) -> None:
    async def check() -> None:
        instances = FakeInstance(script=silent), FakeInstance(script=answer(b"two"))
        sections: dict[str, Any] = {"flow": {"enabled": True, "max_in_flight": 1}, **SOON}
        async with serving(*instances, policy=first, **sections) as harness:
            found = await asyncio.gather(*(harness.ask(request(UNARMED)) for _ in range(6)))
            assert [body for _, body in found] == [b"two"] * 6
            await harness.settle()

    run(check())


def test_a_key_pays_for_one(run: Any, tmp_path: Any) -> None:
    async def check() -> None:
        usage = b'{"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}}'
        path = tmp_path / "keys.yaml"
        write(path, [KeyRecord(name="ann", sha256=hash_of("k"), max_concurrency=1)])
        instances = FakeInstance(script=silent), FakeInstance(script=answer(usage))
        async with serving(*instances, policy=first, keys={"file": path}, **SOON) as harness:
            for _ in range(3):
                head, _ = await harness.ask(
                    request(UNARMED, headers=b"authorization: Bearer k\r\n")
                )
                assert head.startswith(b"HTTP/1.1 200")
            await harness.settle()
            assert harness.proxy.keys is not None
            (account,) = harness.proxy.keys
            assert (account.in_flight, account.num_requests) == (0, 3)
            assert account.num_tokens == 3 * 8

    run(check())


def test_a_stream_that_was_hedged_outlives_who_has_won(run: Any) -> None:
    """Its tokens are known, and those of nobody else."""

    async def check() -> None:
        model = FakeModel(PIECES)
        bad = FakeInstance(script=only_head)
        dying, third = stream_instance(model, Death(400)), stream_instance(model)
        async with serving(bad, dying, third, policy=first, **SOON) as harness:
            bad_later = bad.script

            async def resumed(received: Received, writer: asyncio.StreamWriter) -> None:
                script = third.script if b"/resume" in received.target else bad_later
                await script(received, writer)

            bad.script = resumed
            _, body = await harness.ask(request(STREAM))
            events = events_of(body)
            assert events[-1] == "[DONE]"
            assert "".join(one["choices"][0]["text"] for one in events[:-1]) == "abcd"
            await harness.settle()

    run(check())


def test_hedges_of_other_processes_are_added() -> None:
    here, there = Stats(hedges={"won": 1}), Stats(hedges={"won": 2, "lost": 3})
    assert not there.is_empty
    here.add(there.take())
    assert here.hedges == {"won": 3, "lost": 3}
    assert there.is_empty


@pytest.mark.looks_inside
def test_it_is_tried_again_while_nobody_has_time(run: Any, monkeypatch: Any) -> None:
    async def check() -> None:
        one, two = FakeInstance(script=silent), FakeInstance(script=answer(b"two"))
        async with serving(one, two, policy=first, **SOON) as harness:
            fleet = harness.proxy.fleet
            fleet.report(known(harness)[1], lifecycle.Drain())
            asking = asyncio.create_task(harness.ask(request(UNARMED)))
            await until(lambda: one.requests)
            await asyncio.sleep(0.05)
            assert not two.requests
            fleet.report(known(harness)[1], lifecycle.Undrain())
            fleet.report(known(harness)[1], lifecycle.Alive(""))
            assert (await asking)[1] == b"two"
            await harness.settle()

    monkeypatch.setattr("xllm_plugin.service.hedging._NOT_NOW_S", 0.02)
    run(check())
