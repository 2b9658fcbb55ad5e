"""Events in order: gaps, replays and restarts, on paper and over sockets."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest
import zmq.asyncio

from xllm_plugin.registration import KvEventSource
from xllm_plugin.service.kv_index.index import PrefixIndex, packed
from xllm_plugin.service.kv_index.subscriber import Follower, State, Subscriber
from xllm_plugin.service.kv_index.wire import AllBlocksCleared, Batch, BlockRemoved, BlockStored
from xllm_plugin.testing.fake_publisher import FakePublisher

PROMPT = packed(range(33))


def block(number: int, *, gone: bool = False) -> bytes:
    """The event of block `number` of PROMPT, 4 tokens a block."""
    event: Any = BlockRemoved([str(number).encode()])
    if not gone:
        parent = str(number - 1).encode() if number else None
        tokens = list(range(4 * number, 4 * number + 4))
        event = BlockStored([str(number).encode()], parent, tokens, 4)
    return msgspec.msgpack.encode(Batch(0.0, [event]))


CLEARED = msgspec.msgpack.encode(Batch(0.0, [AllBlocksCleared()]))


class Followed:
    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.follower = Follower(self.index, self.index.add(), "one")

    @property
    def num_held(self) -> int:
        found = self.index.holders(PROMPT)
        return found[0].held.device if found else 0


def test_from_the_first_event_on_it_is_exact() -> None:
    it = Followed()
    assert it.follower.state is State.JOINING
    for number in range(3):
        assert it.follower.take(number, block(number))
    assert (it.follower.state, it.num_held) == (State.LIVE, 3)


def test_a_gap_waits_for_its_replay() -> None:
    it = Followed()
    assert it.follower.take(0, block(0))
    assert not it.follower.take(3, block(3))
    assert it.follower.next_sequence == 1
    for number in (0, 1, 2, 3):
        it.follower.take_replayed(number, block(number))
    it.follower.replayed()
    assert it.follower.take(3, block(3))  # it was in the replay too
    assert it.follower.take(4, block(4))
    assert (it.follower.state, it.num_held, it.follower.num_gaps) == (State.LIVE, 5, 0)


def test_a_gap_that_cannot_be_filled_empties_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A removal may be among what was missed: nothing that was known can be relied on."""
    it = Followed()
    assert it.follower.take(0, block(0))
    assert not it.follower.take(5, block(1))
    it.follower.lost(5, "events 1 to 4 were missed")
    assert it.follower.take(5, block(1))
    assert (it.follower.state, it.num_held) == (State.DEGRADED, 0)
    assert "degraded (events 1 to 4 were missed)" in caplog.text
    assert it.follower.take(6, block(0))
    assert it.follower.take(7, block(1))
    assert (it.follower.state, it.num_held) == (State.DEGRADED, 2)
    assert it.follower.take(8, CLEARED)
    assert (it.follower.state, it.num_held) == (State.LIVE, 0)


def test_a_replay_that_begins_too_late_is_no_history() -> None:
    it = Followed()
    it.follower.take_replayed(7, block(0))
    it.follower.replayed()
    assert (it.follower.state, it.follower.next_sequence) == (State.DEGRADED, 8)
    assert "0 to 6 are no longer kept" in it.follower.reason


def test_a_publisher_that_was_started_anew_has_an_empty_cache() -> None:
    it = Followed()
    for number in range(3):
        it.follower.take(number, block(number))
    assert it.follower.take(0, block(0))
    assert (it.follower.state, it.num_held) == (State.LIVE, 1)
    it.follower.take(1, block(1))
    assert not it.follower.take(3, block(3))


def test_nonsense_costs_what_was_known_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    it = Followed()
    nonsense = msgspec.msgpack.encode(Batch(0.0, [BlockStored([b"x"], None, [-1, 0], 2)]))
    for payload in (b"\xc1", nonsense):
        assert it.follower.take(it.follower.next_sequence, block(0))
        assert it.follower.take(it.follower.next_sequence, payload)
        assert (it.follower.state, it.num_held) == (State.DEGRADED, 0)
    assert it.follower.take(it.follower.next_sequence, block(0))
    assert it.num_held == 1
    assert "is not understood" in caplog.text


# -- over sockets -------------------------------------------------------------------------------


def follow(run: Any, script: Any, *, replays: bool = True, keeps: int = 100) -> None:
    """Run `script(publisher, followed, until)` beside a subscriber."""

    async def check() -> None:
        it = Followed()
        with FakePublisher(replays=replays, keeps=keeps) as publisher, zmq.asyncio.Context() as ctx:
            source = KvEventSource(
                endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint
            )
            subscriber = Subscriber(source, it.follower, replay_timeout_s=20.0, context=ctx)

            async def until(num_held: int, state: State = State.LIVE) -> None:
                async with asyncio.timeout(30):
                    while (it.num_held, it.follower.state) != (num_held, state):
                        assert not task.done()
                        await asyncio.sleep(0.005)

            task = asyncio.create_task(subscriber.run())
            try:
                await script(publisher, it, until)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    run(check())


def test_what_was_published_before_is_replayed(run: Any) -> None:
    async def script(publisher: FakePublisher, it: Followed, until: Any) -> None:
        await until(0)  # an idle engine: the replay is empty, which is the whole history
        for number in range(4):
            publisher.publish(block(number), lose=number < 2)
        await until(4)
        publisher.publish(block(3, gone=True))
        await until(3)

    follow(run, script)


def test_a_history_that_is_not_kept_is_degraded(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def script(publisher: FakePublisher, it: Followed, until: Any) -> None:
        await until(0)
        publisher.publish(block(0))
        await until(1)
        for _ in range(6):
            publisher.publish(block(1), lose=True)
        publisher.publish(block(0))
        await until(1, State.DEGRADED)
        assert it.follower.num_gaps == 1

    with caplog.at_level(logging.INFO):
        follow(run, script, keeps=2)
    assert "no longer kept" in caplog.text


def test_an_endpoint_that_is_none_is_degraded_and_no_fault(run: Any) -> None:
    async def check() -> None:
        it = Followed()
        with zmq.asyncio.Context() as context:
            source = KvEventSource(endpoint="tcp://nowhere", replay_endpoint="tcp://x:y:z")
            subscriber = Subscriber(source, it.follower, replay_timeout_s=1.0, context=context)
            assert not await subscriber._replay("tcp://x:y:z")
            await subscriber.run()
        assert it.follower.state is State.DEGRADED
        assert "tcp://nowhere" in it.follower.reason

    run(check())


def test_without_a_replay_endpoint_a_gap_is_degraded(run: Any) -> None:
    async def script(publisher: FakePublisher, it: Followed, until: Any) -> None:
        async with asyncio.timeout(30):
            while it.follower.num_events == 0:  # a subscription takes a moment
                publisher.publish(block(0))
                await asyncio.sleep(0.02)
        publisher.publish(block(1), lose=True)
        publisher.publish(block(0))
        await until(1, State.DEGRADED)
        assert "no replay endpoint" in it.follower.reason

    follow(run, script, replays=False)
