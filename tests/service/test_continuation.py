"""Streams whose instance dies: what the client gets is the undisturbed stream, wherever it died."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httptools
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_plugin.instance.resumption import RESUME_PATH, Resumption
from xllm_plugin.service import lifecycle
from xllm_plugin.service.chunks import content_start
from xllm_plugin.service.continuation import ArmedStream, arm
from xllm_plugin.service.exchange import peek
from xllm_plugin.service.routes import route_of
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer, answer_raw
from xllm_plugin.testing.fake_streams import Death, FakeModel, events_of, stream_instance
from xllm_plugin.testing.instance_faults import STREAM_HEAD
from xllm_plugin.testing.service_harness import PATIENCE_S, request, serving
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


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("changes", [{}, {"return_token_ids": True}, {"return_token_ids": False}])
def test_an_armed_stream_is_the_instances_own(run: Any, path: str, changes: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES, per_event=(1, 2))
        body = body_of(path, stream_options={"include_usage": True}, **changes)
        async with serving(stream_instance(model)) as harness:
            assert await ask(harness, path, body) == expected(model, path, body)
            assert model.asked[0]["return_token_ids"] is True
            await harness.settle()

    run(check())


def num_bytes(model: FakeModel, path: str, body: dict[str, Any]) -> int:
    return sum(map(len, model.events(path, body | {"return_token_ids": True})))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([CHAT, COMPLETION]),
    per_event=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    has_usage=st.booleans(),
    wants_ids=st.booleans(),
    where=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    how=st.sampled_from(["reset", "end"]),
)
def test_wherever_instances_die_the_client_gets_the_undisturbed_stream(  # noqa: PLR0917
    run: Any,
    path: str,
    per_event: tuple[int, ...],
    has_usage: bool,
    wants_ids: bool,
    where: list[float],
    how: str,
) -> None:
    """Before the first event, in one, between two, in a character, before usage or [DONE]."""

    async def check() -> None:
        model = FakeModel(PIECES, per_event=per_event)
        body = body_of(
            path, stream_options={"include_usage": has_usage}, return_token_ids=wants_ids
        )
        size = num_bytes(model, path, body)
        dying = [stream_instance(model, Death(int(part * (size - 1)), how)) for part in where]
        retries = {"num_retries": 3}
        instances = (*dying, stream_instance(model))
        async with serving(*instances, policy=first, routing=retries) as harness:
            assert await ask(harness, path, body) == expected(model, path, body)
            await harness.settle()

    run(check())


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_every_cut_of_one_stream(run: Any, path: str) -> None:
    """Byte by byte; what was asked for on the way is checked by the fake model."""

    async def check() -> None:
        body = body_of(path, stream_options={"include_usage": True})
        model = FakeModel([b"a", "ü".encode()[:1], "ü".encode()[1:]])
        wanted = expected(model, path, body)
        for cut in range(0, num_bytes(model, path, body), 29):
            dying, good = stream_instance(model, Death(cut)), stream_instance(model)
            async with serving(dying, good, policy=first) as harness:
                assert await ask(harness, path, body) == wanted, cut
                await harness.settle()

    run(check())


def test_what_happened_is_counted(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        dying, good = stream_instance(model, Death(500)), stream_instance(model)
        async with serving(dying, good, policy=first) as harness:
            head, answered = await harness.ask(request(json.dumps(body_of(COMPLETION)).encode()))
            assert good.requests[0].target == RESUME_PATH.encode()
            bad, other = harness.proxy.fleet
            assert (bad.stats.resumes, bad.stats.errors) == (1, {"broken": 1})
            assert bad.life.state is lifecycle.State.SUSPECT
            assert other.stats.answered == {200: 1}
            assert bad.stats.bytes_from > 0
            assert bad.stats.bytes_from + other.stats.bytes_from == len(head) + len(answered)
            await harness.settle()

    run(check())


def test_a_continued_prompt_is_computed_once_its_stream_goes_on(run: Any) -> None:
    """It is in front of nobody any more; the instance's speed is not learned from it."""

    async def check() -> None:
        model = FakeModel([b"a", b"b", b"c", b"d"])
        body = body_of(COMPLETION)
        sizes = [len(e) for e in model.events(COMPLETION, body | {"return_token_ids": True})]
        dying = stream_instance(model, Death(sizes[0] + sizes[1]))
        slow = stream_instance(model, Death(sizes[2], "silence"))
        async with serving(dying, slow, policy=first) as harness:
            client = await harness.connect()
            client.send(request(json.dumps(body).encode()))
            async with asyncio.timeout(PATIENCE_S):
                await client.reader.readuntil(b'"text":"c"')
            _, other = harness.proxy.fleet
            assert (other.in_flight, other.prefill_tokens) == (1, 0)
            assert other.paces.ttft.weight == 0
            client.writer.transport.abort()
            await harness.settle()

    run(check())


def test_the_connection_serves_on_after_a_continuation(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        body = body_of(COMPLETION)
        dying, good = stream_instance(model, Death(500)), stream_instance(model)
        async with serving(dying, good, policy=first) as harness:
            client = await harness.connect()
            for _ in range(3):
                client.send(request(json.dumps(body).encode()))
                _, answered = await client.read_answer()
                assert events_of(answered) == expected(model, COMPLETION, body)
            client.send(request(b'{"model":"fake","prompt":"x"}'))  # unarmed, after an armed one
            good.script = answer(b"whole")
            for instance in harness.instances:
                instance.script = good.script
            assert (await client.read_answer())[1] == b"whole"
            await harness.settle()

    run(check())


def test_an_engine_that_fails_behind_its_server(run: Any) -> None:
    """vLLM's server then ends its streams with an error event, or an abort, and [DONE]."""
    model = FakeModel(PIECES)
    body = body_of(COMPLETION)
    error = b'data: {"error":{"message":"EngineDead","type":"x","param":null,"code":500}}\n\n'
    abort = model.events(COMPLETION, {"return_token_ids": True})[3].replace(
        b'"finish_reason":null', b'"finish_reason":"abort"'
    )

    async def check(last: bytes) -> None:
        class Failing(FakeModel):
            def events(self, path: str, body: dict[str, Any]) -> list[bytes]:
                return [*super().events(path, body)[:2], last, b"data: [DONE]\n\n"]

        async with serving(
            stream_instance(Failing(PIECES)), stream_instance(model), policy=first
        ) as harness:
            assert await ask(harness, COMPLETION, body) == expected(model, COMPLETION, body)
            await harness.settle()

    run(check(error))
    run(check(abort))


def test_events_that_are_there_for_their_ids_alone_are_not_shown() -> None:
    """A parser that waits shows nothing; with ids asked for, vLLM sends an empty delta."""
    body = json.dumps(body_of(CHAT)).encode()
    stream = arm(route_of(CHAT.encode()), body, peek(body, b"application/json"))
    assert stream is not None
    opening, first_event, *_ = FakeModel(PIECES).events(CHAT, json.loads(stream.body))
    waiting = first_event.replace(b'{"content":"Gr"}', b"{}").replace(b"[0]", b"[5,6]")
    stream.parts += [opening[:50], opening[50:] + first_event, waiting, b"data: {"]
    shown = stream.take()
    assert shown.count(b"\n\n") == 2
    assert b'ids":[' not in shown
    stream.is_begun = True
    stream.restart()
    _, raw = stream.next_request(b"POST / HTTP/1.1\r\ncontent-length: 1\r\n\r\n", b"/")
    assert msgspec.json.decode(raw, type=Resumption).chunks == [[0], [5, 6]]


def relayed(stream: ArmedStream, events: list[bytes]) -> bytes:
    """What the client gets of chunks that come one by one."""
    shown = b""
    for event in events:
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        found = stream.take_token(chunk, content_start(chunk)) if content_start(chunk) else b""
        if not found:
            stream.parts.append(event)
            taken = stream.take()
            found = b"%x\r\n%b\r\n" % (len(taken), taken) if taken else b""
        shown += found
    return unchunked(shown)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_event_cut_in_two_chunks_is_not_taken_for_a_whole_one(path: str, number: int) -> None:
    body = json.dumps(body_of(path)).encode()

    def shown(cut: int) -> bytes:
        stream = arm(route_of(path.encode()), body, peek(body, b""))
        assert stream is not None
        events = FakeModel(PIECES, (1,)).events(path, json.loads(stream.body))
        events[number : number + 1] = filter(None, (events[number][:cut], events[number][cut:]))
        return relayed(stream, events)

    whole = shown(0)
    for cut in range(1, 500):
        assert shown(cut) == whole


@given(
    path=st.sampled_from([CHAT, COMPLETION]),
    per_event=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    wants_ids=st.booleans(),
    has_usage=st.booleans(),
    joins=st.lists(st.integers(0, 9)),
)
def test_an_event_by_itself_says_the_same_as_one_among_others(
    path: str, per_event: tuple[int, ...], wants_ids: bool, has_usage: bool, joins: list[int]
) -> None:
    """Most come one by one, each a chunk, and are read in a shorter way."""
    body = json.dumps(body_of(path, return_token_ids=wants_ids or None)).encode()
    streams = [arm(route_of(path.encode()), body, peek(body, b"")) for _ in range(2)]
    alone, among = streams
    assert alone is not None
    assert among is not None
    asked = json.loads(among.body) | {"stream_options": {"include_usage": has_usage}}
    events = FakeModel([*PIECES, *PIECES], per_event).events(path, asked)
    for place in joins:  # two events in a chunk
        events[place : place + 2] = [b"".join(events[place : place + 2])]
    shown = relayed(alone, events)
    among.parts += events
    assert shown == among.take()
    assert alone.is_done
    assert alone.num_tokens == among.num_tokens == 2 * len(PIECES)
    head = b"POST / HTTP/1.1\r\ncontent-length: 1\r\n\r\n"
    assert alone.next_request(head, b"/") == among.next_request(head, b"/")


def unchunked(data: bytes) -> bytes:
    body: list[bytes] = []
    parser = httptools.HttpResponseParser(SimpleNamespace(on_body=body.append))
    parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data)
    return b"".join(body)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_most_events_are_read_in_the_shorter_way(path: str) -> None:
    """All but the first, those that end it, and one that shows what stands after its ids."""
    body = json.dumps(body_of(path)).encode()
    stream = arm(route_of(path.encode()), body, peek(body, b""))
    assert stream is not None
    events = FakeModel([b"a"] * 9).events(path, json.loads(stream.body))
    num_short = 0
    for event in events:
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        if stream.take_token(chunk, content_start(chunk)):
            num_short += 1
        else:
            stream.parts.append(event)
            stream.take()
    assert num_short == len(events) - 4
    assert stream.num_tokens == 9


def taken(*events: bytes) -> Any:
    """A stream of which the client has these events."""
    body = json.dumps(body_of(COMPLETION)).encode()
    stream = arm(route_of(COMPLETION.encode()), body, peek(body, b"application/json"))
    assert stream is not None
    stream.is_begun = True
    stream.parts += events
    stream.take()
    return stream


def test_ids_are_read_however_they_are_spelt() -> None:
    """Servers that are not vLLM's may write JSON with spaces."""
    choice = {"index": 0, "text": "a", "finish_reason": None, "token_ids": [5, 6]}
    stream = taken(b"data: %b\n\n" % json.dumps({"id": "x", "choices": [choice]}).encode())
    _, raw = stream.next_request(b"POST / HTTP/1.1\r\ncontent-length: 1\r\n\r\n", b"/")
    assert msgspec.json.decode(raw, type=Resumption).chunks == [[5, 6]]


@pytest.mark.parametrize("ids", [b"[x1]", b"[1,", b'["1"]', b"[1 2]", b"[1.5]"])
def test_ids_that_are_none_cannot_be_continued(ids: bytes) -> None:
    """Most are kept unread; whether they are ids is found out when they are needed."""
    opening, second, *_ = FakeModel(PIECES).events(COMPLETION, {"return_token_ids": True})
    stream = taken(opening, second.replace(b"[1]", ids))
    assert stream.failure or not stream.can_resume


def test_an_error_of_the_request_is_passed_on(run: Any) -> None:
    error = b'data: {"error":{"message":"no","type":"x","param":null,"code":400}}\n\n'

    class Refusing(FakeModel):
        def events(self, path: str, body: dict[str, Any]) -> list[bytes]:
            return [*super().events(path, body)[:2], error, b"data: [DONE]\n\n"]

    async def check() -> None:
        model = Refusing(PIECES)
        async with serving(stream_instance(model), stream_instance(model)) as harness:
            events = await ask(harness, COMPLETION, body_of(COMPLETION))
            assert events == expected(model, COMPLETION, body_of(COMPLETION))
            await harness.settle()

    run(check())


def test_a_stream_after_an_answer_that_was_none_can_be_continued_and_hides_its_ids(
    run: Any,
) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        garbage = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n"
        instances = (
            FakeInstance(script=answer_raw(garbage)),
            stream_instance(model, Death(500)),
            stream_instance(model),
        )
        async with serving(*instances, policy=first) as harness:
            body = body_of(CHAT)
            assert await ask(harness, CHAT, body) == expected(model, CHAT, body)
            assert all(one.requests for one in instances)

    run(check())


def test_a_stalled_stream_goes_on_elsewhere(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        silent, good = stream_instance(model, Death(600, "silence")), stream_instance(model)
        limits = {"stalled_s": 0.1}
        async with serving(silent, good, policy=first, timeouts=limits) as harness:
            body = body_of(COMPLETION)
            assert await ask(harness, COMPLETION, body) == expected(model, COMPLETION, body)
            await harness.settle()

    run(check())


@pytest.mark.parametrize("end", [lifecycle.Drain(), lifecycle.Withdrawn(lifecycle.LEFT)])
def test_a_drain_deadline_moves_what_still_runs(run: Any, end: lifecycle.Event) -> None:
    """The service's own, or that of an instance that leaves: its engine stops, its streams hang."""

    async def check() -> None:
        model = FakeModel(PIECES)
        slow, good = stream_instance(model, Death(600, "silence")), stream_instance(model)
        limits = {"drain_s": 0.1, "lease_s": 0.1}
        async with serving(slow, good, policy=first, instances=limits) as harness:
            fleet = harness.proxy.fleet
            (draining, _) = fleet
            fleet.report(draining, lifecycle.Registered("", leased=True))
            client = await harness.connect()
            body = body_of(COMPLETION)
            client.send(request(json.dumps(body).encode()))
            await client.reader.readuntil(b"data: ")
            fleet.report(draining, end)
            wanted = expected(model, COMPLETION, body)
            last = await client.reader.readuntil(b"0\r\n\r\n")
            assert json.dumps(wanted[-2]["choices"][0]["text"]).encode() in last
            assert b"[DONE]" in last
            assert b"error" not in last
            await harness.settle()

    run(check())


@pytest.mark.parametrize(
    ("body", "is_doubtful"),
    [
        (b'{"prompt":"\xff","seed":null}', False),  # no UTF-8: the instance's to judge
        (b'{"prompt":"x","seed":0}', True),
        (b'{"prompt":"x","vllm_xargs":{"a":1}}', True),
    ],
)
def test_what_an_instance_may_refuse_is_told_by_the_body(body: bytes, is_doubtful: bool) -> None:
    assert ArmedStream(COMPLETION, body, hides_ids=True).may_be_refused is is_doubtful


@pytest.mark.parametrize(
    ("resumes", "is_suspect", "changes"),
    [
        (True, False, {}),
        (False, False, {}),
        (True, True, {}),
        (True, False, {"vllm_xargs": {"other": 1}}),
    ],
)
def test_a_drain_by_hand_gives_streams_to_who_can_take_them(
    run: Any, resumes: bool, is_suspect: bool, changes: dict[str, Any]
) -> None:
    """At its deadline, though the instance lives; else they stay where they are."""

    async def check() -> None:
        model = FakeModel(PIECES)
        slow, good = stream_instance(model, Death(600, "silence")), stream_instance(model)
        async with serving(slow, good, policy=first, instances={"drain_s": 0.1}) as harness:
            fleet = harness.proxy.fleet
            draining, other = fleet
            other.resumes = resumes
            client = await harness.connect()
            body = body_of(COMPLETION, **changes)
            client.send(request(json.dumps(body).encode()))
            await client.reader.readuntil(b"data: ")
            if is_suspect:
                fleet.report(other, lifecycle.Failed("was killed", certain=True))
            fleet.report(draining, lifecycle.Drain())
            if not resumes or is_suspect or changes:
                await asyncio.sleep(0.3)
                assert (draining.in_flight, draining.stats.errors) == (1, {})
                assert not good.requests
                return
            last = await client.reader.readuntil(b"0\r\n\r\n")
            wanted = expected(model, COMPLETION, body)
            assert json.dumps(wanted[-2]["choices"][0]["text"]).encode() in last
            assert b"[DONE]" in last
            assert b"error" not in last
            assert draining.life.state is lifecycle.State.DRAINING
            assert draining.stats.errors == {"drained": 1}, "it did nothing wrong"
            await harness.settle()

    run(check())


def test_a_drain_by_hand_leaves_alone_what_nobody_else_has_left_to_try(run: Any) -> None:
    async def refuse(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")

    async def never(received: Received, _: asyncio.StreamWriter) -> None:
        await received.gone.wait()

    async def check() -> None:
        full, slow = FakeInstance(script=refuse), FakeInstance(script=never)
        async with serving(full, slow, policy=first, instances={"drain_s": 0.1}) as harness:
            fleet = harness.proxy.fleet
            refused, draining = fleet
            refused.resumes = draining.resumes = True
            client = await harness.connect()
            client.send(request(json.dumps(body_of(COMPLETION)).encode()))
            async with asyncio.timeout(PATIENCE_S):
                while not slow.requests:
                    await asyncio.sleep(0.002)
            fleet.report(draining, lifecycle.Drain())
            await asyncio.sleep(0.3)
            assert (draining.in_flight, draining.stats.errors) == (1, {})

    run(check())


def test_a_drain_deadline_moves_what_has_not_begun(run: Any) -> None:
    async def never(received: Received, _: asyncio.StreamWriter) -> None:
        await received.gone.wait()

    async def check() -> None:
        model = FakeModel(PIECES)
        busy, good = FakeInstance(script=never), stream_instance(model)
        limits = {"drain_s": 0.1, "lease_s": 0.1}
        async with serving(busy, good, policy=first, instances=limits) as harness:
            fleet = harness.proxy.fleet
            (draining, _) = fleet
            fleet.report(draining, lifecycle.Registered("", leased=True))
            client = await harness.connect()
            client.send(request(json.dumps(body_of(COMPLETION)).encode()))
            async with asyncio.timeout(PATIENCE_S):
                while not busy.requests:
                    await asyncio.sleep(0.002)
            fleet.report(draining, lifecycle.Drain())
            _, answered = await client.read_answer()
            assert events_of(answered) == expected(model, COMPLETION, body_of(COMPLETION))
            await harness.settle()

    run(check())


def test_clients_cannot_ask_for_a_continuation_themselves(run: Any) -> None:
    async def check() -> None:
        async with serving(stream_instance(FakeModel(PIECES))) as harness:
            head, _ = await harness.ask(request(path=RESUME_PATH.encode()))
            assert head.startswith(b"HTTP/1.1 403")

    run(check())


def test_without_another_instance_the_stream_says_so(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        async with serving(stream_instance(model, Death(600))) as harness:
            events = await ask(harness, COMPLETION, body_of(COMPLETION))
            message = error_in(events)
            assert "closed the connection" in message
            assert "every instance was tried" in message
            whole = expected(model, COMPLETION, body_of(COMPLETION))
            assert events[:-1] == whole[: len(events) - 1]
            await harness.settle()

    run(check())


def test_instances_that_cannot_continue_are_passed_over(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        plain = stream_instance(model, resumes=False)
        body = body_of(COMPLETION)
        dying, good = stream_instance(model, Death(600)), stream_instance(model)
        async with serving(dying, plain, good, policy=first) as harness:
            assert await ask(harness, COMPLETION, body) == expected(model, COMPLETION, body)
            other = list(harness.proxy.fleet)[1]
            assert other.stats.errors == {"not continued": 1}
            assert other.life.state is lifecycle.State.READY
        async with serving(stream_instance(model, Death(600)), plain, policy=first) as harness:
            message = error_in(await ask(harness, COMPLETION, body))
            assert "HTTP 404" in message
            await harness.settle()

    run(check())


def test_an_instance_that_refuses_says_why(run: Any) -> None:
    async def refuse(_: Received, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\nX-Xllm-Reason: too odd\r\n\r\n"
        writer.write(head + b"{}")

    async def check() -> None:
        dying = stream_instance(FakeModel(PIECES), Death(600))
        async with serving(dying, FakeInstance(script=refuse), policy=first) as harness:
            message = error_in(await ask(harness, COMPLETION, body_of(COMPLETION)))
            assert "cannot continue the stream (HTTP 400: too odd)." in message
            await harness.settle()

    run(check())


def test_resumes_of_one_stream_are_bounded(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        instances = [stream_instance(model, Death(600)) for _ in range(3)]
        bound = {"max_resumes": 1}
        async with serving(*instances, policy=first, continuation=bound) as harness:
            message = error_in(await ask(harness, COMPLETION, body_of(COMPLETION)))
            assert "continued 1 times already" in message
            await harness.settle()

    run(check())


@pytest.mark.parametrize(
    ("path", "changes", "reason"),
    [
        (COMPLETION, {"n": 2}, "`n` is not 1"),
        (COMPLETION, {"best_of": 2}, "`best_of` is not 1"),
        (COMPLETION, {"echo": True}, "it echoes its prompt"),
        (COMPLETION, {"use_beam_search": True}, "it is a beam search"),
        (COMPLETION, {"prompt": ["a", "b"]}, "it has several prompts"),
        (COMPLETION, {"prompt": [[1], [2]]}, "it has several prompts"),
        (CHAT, {"n": 2}, "`n` is not 1"),
        (CHAT, {"include_reasoning": False}, "`include_reasoning` is false"),
        ("/v1/messages", {}, "only completions and chats can be"),
        ("/v1/responses", {}, "only completions and chats can be"),
        ("/v1/audio/transcriptions", {}, "only completions and chats can be"),
    ],
)
def test_what_cannot_be_continued_ends_in_an_error_event(
    run: Any, path: str, changes: dict[str, Any], reason: str
) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        body = body_of(path, **changes)
        dying, good = stream_instance(model, Death(600)), stream_instance(model)
        async with serving(dying, good, policy=first) as harness:
            _, answered = await harness.ask(request(json.dumps(body).encode(), path.encode()))
            assert f"The stream cannot be continued: {reason}.".encode() in answered
            assert dying.requests[0].body == json.dumps(body).encode()  # as it came
            assert not good.requests
            await harness.settle()

    run(check())


@pytest.mark.parametrize("cut", [b"data: ha", b"data: half\n"])
def test_an_event_that_is_cut_off_is_not_ended_for_an_http_1_0_client(run: Any, cut: bytes) -> None:
    async def check() -> None:
        sent = b"data: a\n\n" + cut
        part = STREAM_HEAD + b"%x\r\n%b" % (len(sent) + 9, sent)
        async with serving(FakeInstance(script=answer_raw(part, close=True))) as harness:
            client = await harness.connect()
            raw = json.dumps(body_of(COMPLETION)).encode()
            client.send(request(raw).replace(b"HTTP/1.1", b"HTTP/1.0"))
            assert (await client.read_all()).endswith(b"\r\n\r\n" + sent)
            await harness.settle()

    run(check())


def test_a_stream_of_an_http_1_0_client_ends_in_an_error_event(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        raw = json.dumps(body_of(COMPLETION)).encode()
        whole = sum(map(len, model.events(COMPLETION, body_of(COMPLETION))[:2]))
        dying, good = stream_instance(model, Death(whole)), stream_instance(model)
        async with serving(dying, good, policy=first) as harness:
            client = await harness.connect()
            client.send(request(raw).replace(b"HTTP/1.1", b"HTTP/1.0"))
            answered = await client.read_all()
            assert b"The stream cannot be continued: its client speaks HTTP/1.0." in answered
            assert dying.requests[0].body == raw  # as it came
            assert not good.requests
            await harness.settle()

    run(check())


def test_it_can_be_switched_off(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        dying, good = stream_instance(model, Death(600)), stream_instance(model)
        async with serving(dying, good, policy=first, continuation={"enabled": False}) as harness:
            raw = json.dumps(body_of(COMPLETION)).encode()
            _, answered = await harness.ask(request(raw))
            assert b"The stream cannot be continued: `continuation.enabled` is off." in answered
            assert dying.requests[0].body == raw
            await harness.settle()

    run(check())


def test_a_client_that_leaves_while_its_stream_moves(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        dying = stream_instance(model, Death(600))
        silent = stream_instance(model, Death(0, "silence"))
        async with serving(dying, silent, policy=first) as harness:
            client = await harness.connect()
            client.send(request(json.dumps(body_of(COMPLETION)).encode()))
            await client.reader.readuntil(b"data: ")
            async with asyncio.timeout(PATIENCE_S):
                while not silent.requests:
                    await asyncio.sleep(0.002)
            client.writer.transport.abort()
            async with asyncio.timeout(PATIENCE_S):
                await silent.requests[0].gone.wait()
            await harness.settle()

    run(check())


@pytest.mark.parametrize("status", ["400 Bad Request", "503 Service Unavailable"])
def test_errors_and_whole_answers_are_passed_on(run: Any, status: str) -> None:
    """A stream was asked for and not given: nothing is armed any more."""

    async def check() -> None:
        async with serving(FakeInstance(script=answer(b'{"error":1}', status))) as harness:
            raw = json.dumps(body_of(COMPLETION)).encode()
            head, answered = await harness.ask(request(raw))
            assert head.startswith(f"HTTP/1.1 {status}".encode())
            assert answered == b'{"error":1}'
            await harness.settle()

    run(check())
