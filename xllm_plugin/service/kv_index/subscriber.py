"""Follows the events of one rank: in order, nothing missing, or says that something is.

::

    joining --replayed from the first event--> live --gap, replayed--> live
       |                                        |
       +--- history lost: degraded  <-----------+--- gap that cannot be replayed: emptied first

A fault of ours ends the subscriber of its rank alone, which is emptied and degraded until its
instance starts anew.

While degraded the cache holds at most what the index says of it, as what was missed could only add;
an event that empties it (a reset, a new engine) makes it live again.
"""

from __future__ import annotations

import asyncio
import logging
from enum import StrEnum

import msgspec
import zmq
import zmq.asyncio

from xllm_plugin.registration import KvEventSource
from xllm_plugin.service.kv_index.index import Cache, PrefixIndex
from xllm_plugin.service.kv_index.wire import END_OF_REPLAY, AllBlocksCleared, decode

__all__ = ["Follower", "State", "Subscriber"]

logger = logging.getLogger(__name__)

_QUEUE_BATCHES = 100_000
_SLICE_BATCHES = 32
"""Applied before other work gets its turn: well under a millisecond of events."""
_FRAMES = 3
_SEQUENCE_BYTES = 8


class State(StrEnum):
    """How far the index of a rank can be trusted."""

    JOINING = "joining"
    LIVE = "live"
    DEGRADED = "degraded"


class Follower:
    """Puts batches in order into the index.  Does no I/O: what it needs is asked for by `take`.

    Args:
        index: gets the events.
        cache: whose events they are.
        name: for the log.
    """

    def __init__(self, index: PrefixIndex, cache: Cache, name: str) -> None:
        self.cache = cache
        self.state = State.JOINING
        self.reason = "not asked yet"
        self.num_events = 0
        self.num_gaps = 0
        self._index = index
        self._name = name
        self._next = 0
        self._last_live = -1

    @property
    def next_sequence(self) -> int:
        """The batch that is due, and from which a replay has to start."""
        return self._next

    def take(self, sequence: int, payload: bytes) -> bool:
        """Take a batch as it was published; False if a replay of what is missing comes first."""
        if sequence <= self._last_live:
            # Publishers count upward and a socket keeps their order: this is another engine.
            self._empty()
            self._next, self._last_live = 0, -1
            self._become(State.JOINING, "the publisher was started anew")
        if sequence > self._next:
            return False
        self._last_live = sequence
        if sequence == self._next:
            self._apply(sequence, payload)
            if self.state is State.JOINING:
                self._become(State.LIVE, "from the first event on")
        return True

    def take_replayed(self, sequence: int, payload: bytes) -> None:
        """Take a batch of a replay; older ones than the one that is due are known."""
        if sequence < self._next:
            return
        if sequence > self._next:
            self._lose(f"events {self._next} to {sequence - 1} are no longer kept")
        self._apply(sequence, payload)

    def replayed(self) -> None:
        """The replay is complete."""
        if self.state is State.JOINING:
            self._become(State.LIVE, "replayed")

    def lost(self, sequence: int, reason: str) -> None:
        """What comes before `sequence` cannot be had."""
        if sequence > self._next:
            self._lose(reason)
            self._next = sequence

    def cannot_follow(self, reason: str) -> None:
        """Nothing will come."""
        self._become(State.DEGRADED, reason)

    def fail(self, reason: str) -> None:
        """Following it has failed for a reason that is ours; what is known may be wrong."""
        self._empty()
        self._become(State.DEGRADED, reason)

    def drop(self) -> None:
        """The rank is gone, with its cache."""
        self._index.drop(self.cache)

    def _lose(self, reason: str) -> None:
        self.num_gaps += 1
        # A missed removal would show a block for ever; a missed store is learned when used again.
        self._empty()
        self._become(State.DEGRADED, reason)

    def _apply(self, sequence: int, payload: bytes) -> None:
        self._next = sequence + 1
        try:
            batch = decode(payload)
        except msgspec.DecodeError as error:
            self._lose(f"event {sequence} is not understood: {error}")
            return
        for event in batch.events:
            try:
                self._index.apply(self.cache, event)
            except (OverflowError, TypeError) as error:
                self._lose(f"event {sequence} is not understood: {error}")
                return
            if isinstance(event, AllBlocksCleared) and self.state is State.DEGRADED:
                self._become(State.LIVE, "its cache was reset")
        self.num_events += len(batch.events)

    def _empty(self) -> None:
        self._index.clear(self.cache)

    def _become(self, state: State, reason: str) -> None:
        if (self.state, self.reason) != (state, reason):
            level = logging.WARNING if state is State.DEGRADED else logging.INFO
            logger.log(level, "KV index of %s: %s (%s)", self._name, state, reason)
        self.state, self.reason = state, reason


class Subscriber:
    """The sockets of one rank.

    Args:
        source: where it publishes.
        follower: gets what comes.
        replay_timeout_s: of silence in a replay.
        context: owns the sockets.
    """

    def __init__(
        self,
        source: KvEventSource,
        follower: Follower,
        *,
        replay_timeout_s: float,
        context: zmq.asyncio.Context,
    ) -> None:
        self.source = source
        self.follower = follower
        self._replay_timeout_s = replay_timeout_s
        self._context = context

    async def run(self) -> None:
        """Follow until cancelled."""
        source = self.source
        with self._context.socket(zmq.SUB) as socket:
            socket.set_hwm(_QUEUE_BATCHES)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt_string(zmq.SUBSCRIBE, source.topic)
            try:
                socket.connect(source.endpoint)
            except zmq.ZMQError as error:  # an instance says its endpoint, so it may be anything
                self.follower.cannot_follow(f"{source.endpoint}: {error}")
                return
            if source.replay_endpoint and not await self._replay(source.replay_endpoint):
                logger.info("KV index: no replay from %s yet", source.replay_endpoint)
            # Without asyncio: a future a batch would cost more than the batch.
            direct: zmq.Socket[bytes] = zmq.Socket.shadow(socket)
            while True:
                await socket.poll()
                for _ in range(_SLICE_BATCHES):
                    try:
                        frames = direct.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    await self._receive(frames)
                await asyncio.sleep(0)

    async def _receive(self, frames: list[bytes]) -> None:
        if len(frames) != _FRAMES or len(frames[1]) != _SEQUENCE_BYTES:
            return  # another publisher's: vLLM's have three
        follower, source = self.follower, self.source
        sequence, payload = int.from_bytes(frames[1], "big"), frames[2]
        if follower.take(sequence, payload):
            return
        missing = f"events {follower.next_sequence} to {sequence - 1} were missed"
        if source.replay_endpoint is None:
            follower.lost(sequence, f"{missing}, and it has no replay endpoint")
        elif not await self._replay(source.replay_endpoint):
            follower.lost(sequence, f"{missing}, and its replay does not answer")
        else:
            follower.lost(sequence, f"{missing}, and are no longer kept")
        follower.take(sequence, payload)

    async def _replay(self, endpoint: str) -> bool:
        """Ask for everything from the batch that is due; whether the answer was whole."""
        follower = self.follower
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            try:
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                logger.warning("KV index: no replay from %s: %s", endpoint, error)
                return False
            await socket.send_multipart((b"", follower.next_sequence.to_bytes(8, "big")))
            while await socket.poll(int(self._replay_timeout_s * 1000)):
                frames = await socket.recv_multipart()
                if len(frames) != _FRAMES + 1:
                    continue
                if frames[2] == END_OF_REPLAY:
                    follower.replayed()
                    return True
                follower.take_replayed(int.from_bytes(frames[2], "big"), frames[3])
                await asyncio.sleep(0)
        return False
