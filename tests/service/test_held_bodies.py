"""Large bodies are counted while they are here, in every order in which they come and go."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.held_bodies import LARGE_BYTES, BodyMemory, HeldBodies
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer
from xllm_plugin.testing.service_harness import Harness, request, serving

LARGE = b'{"model":"fake"}'.ljust(2 * LARGE_BYTES)
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(LARGE), LARGE)
CHUNKED_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
ROOM = {"max_body_bytes": 3 * LARGE_BYTES, "max_total_body_bytes": 3 * LARGE_BYTES}
NUMBERS = st.integers(0, 2)
SIZES = st.integers(1, 100)


class Connections(RuleBasedStateMachine):
    """Three connections beside what they should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = BodyMemory(200)
        self.held = [HeldBodies(self.memory) for _ in range(3)]
        self.whole: list[list[int]] = [[], [], []]
        self.reading = [0, 0, 0]

    @rule(number=NUMBERS, more=SIZES)
    def read(self, number: int, more: int) -> None:
        self.reading[number] += more
        has_room = self.held[number].read(self.reading[number])
        assert has_room == (self.total() <= 200)

    @rule(number=NUMBERS, more=SIZES)
    def complete(self, number: int, more: int) -> None:
        self.whole[number].append(self.reading[number] + more)
        self.reading[number] = 0
        assert self.held[number].whole(self.whole[number][-1]) == (self.total() <= 200)

    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        self.held[number].drop()
        self.reading[number] = 0

    @rule(number=NUMBERS)
    def end(self, number: int) -> None:
        if self.whole[number]:
            self.held[number].done(self.whole[number].pop(0))

    @rule(number=NUMBERS, late=SIZES)
    def lose(self, number: int, late: int) -> None:
        self.held[number].close()
        self.whole[number], self.reading[number] = [], 0
        self.held[number].done(late)  # an answer that ends after its client

    def total(self) -> int:
        return sum(map(sum, self.whole)) + sum(self.reading)

    @invariant()
    def all_is_counted(self) -> None:
        assert self.memory.num_bytes == self.total()


TestConnections = Connections.TestCase
TestConnections.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def until_held(harness: Harness, num_bytes: int) -> None:
    while harness.proxy.bodies.num_bytes != num_bytes:
        await asyncio.sleep(0.002)


def waits_for(goes_on: asyncio.Event) -> Any:
    """An instance that answers once it may."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        await goes_on.wait()
        await answer()(received, writer)

    return script


@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_does_not_fit_beside_what_runs_is_told_to_come_again(
    run: Any, is_chunked: bool
) -> None:
    async def check() -> None:
        goes_on = asyncio.Event()
        raw = CHUNKED_HEAD + CHUNKED if is_chunked else request(LARGE)
        async with serving(FakeInstance(script=waits_for(goes_on)), limits=ROOM) as harness:
            first, second = await harness.connect(), await harness.connect()
            first.send(raw)
            await until_held(harness, len(LARGE))
            second.send(raw)
            refused = await second.read_all()
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: 1\r\n" in refused
            assert harness.proxy.bodies.num_bytes == len(LARGE)
            small = await harness.connect()
            small.send(request())
            goes_on.set()
            for client in (first, small):
                assert (await client.read_answer())[0].startswith(b"HTTP/1.1 200")
            assert harness.proxy.bodies.num_bytes == 0
            first.send(raw)
            assert (await first.read_answer())[0].startswith(b"HTTP/1.1 200")
            assert [len(one.body) for one in harness.instances[0].requests].count(len(LARGE)) == 2

    run(check())


def test_a_body_that_comes_whole_is_no_way_around_it(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), limits=ROOM) as harness:
            harness.proxy.bodies.num_bytes += 2 * LARGE_BYTES  # others'
            client = await harness.connect()
            while not harness.proxy.clients:
                await asyncio.sleep(0.002)
            (connection,) = harness.proxy.clients
            connection.data_received(request(LARGE))
            assert (await client.read_all()).startswith(b"HTTP/1.1 503 ")
            assert not harness.instances[0].requests
            harness.proxy.bodies.num_bytes -= 2 * LARGE_BYTES

    run(check())


@pytest.mark.parametrize("comes_whole", [False, True])
def test_what_is_refused_behind_a_running_request_holds_nothing(
    run: Any, comes_whole: bool
) -> None:
    async def check() -> None:
        goes_on = asyncio.Event()
        async with serving(FakeInstance(script=waits_for(goes_on)), limits=ROOM) as harness:
            harness.proxy.bodies.num_bytes += 2 * LARGE_BYTES  # others'
            client = await harness.connect()
            client.send(request())
            while not harness.instances[0].requests:
                await asyncio.sleep(0.002)
            (connection,) = harness.proxy.clients
            if comes_whole:
                connection.data_received(request(LARGE) + request())
            else:
                client.send(request(LARGE))
            while not connection._ignores_input:
                await asyncio.sleep(0.002)
            assert harness.proxy.bodies.num_bytes == 2 * LARGE_BYTES
            goes_on.set()
            answers = await client.read_all()
            assert answers.count(b"HTTP/1.1 200 ") == 1
            assert answers.count(b"HTTP/1.1 503 ") == 1
            assert len(harness.instances[0].requests) == 1
            harness.proxy.bodies.num_bytes -= 2 * LARGE_BYTES

    run(check())


@pytest.mark.looks_inside
def test_small_parts_take_no_more_room_than_they_are_long(run: Any) -> None:
    async def check() -> None:
        body = LARGE[:-3].ljust(2 * LARGE_BYTES)
        chunks = b"".join(b"2\r\n%b\r\n" % body[at : at + 2] for at in range(0, len(body), 2))
        limits = {"max_body_bytes": 64 * LARGE_BYTES}
        async with serving(FakeInstance(), limits=limits) as harness:
            client = await harness.connect()
            client.send(CHUNKED_HEAD + chunks)
            await until_held(harness, len(body))
            (connection,) = harness.proxy.clients
            assert sum(map(sys.getsizeof, connection._body)) < 1.5 * len(body)
            client.send(b"0\r\n\r\n")
            assert (await client.read_answer())[0].startswith(b"HTTP/1.1 200")
            assert harness.instances[0].requests[0].body == body
            await harness.settle()

    run(check())


def test_a_client_that_leaves_takes_its_body_with_it(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), limits=ROOM) as harness:
            client = await harness.connect()
            client.send(request(LARGE)[:-9])
            await until_held(harness, len(LARGE) - 9)
            client.writer.close()
            await until_held(harness, 0)

    run(check())


def test_one_body_fits() -> None:
    with pytest.raises(ValueError, match=r"is less than max_body_bytes=4096.*raise the first"):
        ServiceConfig.model_validate(
            {"limits": {"max_body_bytes": 4096, "max_total_body_bytes": 4095}}
        )
