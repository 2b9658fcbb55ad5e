"""Every order in which two sendings of a request can go: one answer, every counter back at 0.

The service's own objects, with connections, event loop and time that a test drives.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import json
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, NamedTuple

import h11
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from xllm_plugin.service import lifecycle
from xllm_plugin.service.client import ClientConnection
from xllm_plugin.service.config import InstanceEntry, ServiceConfig
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.policies import least_loaded
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.router import Router
from xllm_plugin.service.upstream import Pool, UpstreamConnection
from xllm_plugin.testing.instance_faults import STREAM_HEAD
from xllm_plugin.testing.service_harness import request

pytestmark = pytest.mark.looks_inside

HEDGE_AFTER_S = 1.0
FIRST_BYTE_S = 20.0
DRAIN_S = 5.0
NAMES = ("a", "b", "c", "d")
BODIES = {
    "plain": b'{"model":"fake"}',
    "armed": b'{"model":"fake","stream":true,"prompt":"x"}',
    "unarmed": b'{"model":"fake","stream":true,"n":2}',
}

_ERROR = b'data: {"error":{"message":"no","type":"InternalServerError","code":500}}\n\n'
ERROR_CHUNK = b"%x\r\n%b\r\n" % (len(_ERROR), _ERROR)


class Handle:
    """A timer."""

    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Task:
    """A coroutine that goes on when it is told to."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.coroutine = coroutine
        self.is_over = False
        self.go_on()

    def go_on(self) -> None:
        try:
            self.coroutine.send(None)
        except StopIteration:
            self.is_over = True

    def cancel(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self.coroutine.throw(asyncio.CancelledError())
        self.is_over = True


class ManualLoop:
    """An event loop in which nothing happens by itself."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.tasks: list[Task] = []
        self._timers: list[tuple[float, int, Handle, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[..., None], *args: Any) -> Handle:
        handle, due_s = Handle(), self.now_s + max(0.0, delay_s)
        heapq.heappush(self._timers, (due_s, next(self._numbers), handle, lambda: call(*args)))
        return handle

    def create_task(self, coroutine: Coroutine[Any, Any, None]) -> Task:
        self.tasks.append(task := Task(coroutine))
        return task

    def pass_time(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self._timers and self._timers[0][0] <= until_s:
            self.now_s, _, handle, call = heapq.heappop(self._timers)
            if not handle.is_cancelled:
                call()
        self.now_s = until_s


class Wire:
    """One end of a connection."""

    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written += data

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, _: str) -> Any:
        return ("127.0.0.1", 1)

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def get_write_buffer_size(self) -> int:
        return 0


class Gate:
    """A connection that is being opened."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def __await__(self) -> Generator[None, None, None]:
        yield
        if self.error is not None:
            raise self.error


class ManualPool(Pool):
    """Connections to an instance that are opened, and fail, when a test says so."""

    def __init__(self, name: str) -> None:
        super().__init__("127.0.0.1", 1, tls=None, connect_timeout_s=1.0)
        self.name = name
        self.has_idle = False
        """Whether there is one that was used before."""
        self.gate: Gate | None = None
        self.connection: UpstreamConnection | None = None

    def take(self) -> UpstreamConnection | None:
        if not self.has_idle:
            return None
        connection = self._open()
        connection.num_uses = 1
        return connection

    async def connect(self) -> UpstreamConnection:
        gate = self.gate = Gate()
        try:
            await gate
        finally:
            self.gate = None
        return self._open()

    def give(self, connection: UpstreamConnection) -> None:
        pass

    def _open(self) -> UpstreamConnection:
        self.connection = UpstreamConnection(self)
        self.connection.connection_made(Wire())  # type: ignore[arg-type]
        return self.connection


class End(NamedTuple):
    """An instance that has the request, or is being connected to."""

    instance: Instance
    pool: ManualPool

    @property
    def is_connected(self) -> bool:
        return self.pool.gate is None

    @property
    def connection(self) -> UpstreamConnection:
        assert self.pool.connection is not None
        return self.pool.connection


class World:
    """A proxy over four instances."""

    def __init__(self, share: float, num_retries: int) -> None:
        config = ServiceConfig.model_validate(
            {
                "routing": {
                    "hedge_after_s": HEDGE_AFTER_S,
                    "retry_share": share,
                    "num_retries": num_retries,
                },
                "instances": {"drain_s": DRAIN_S},
            }
        )
        self.loop = ManualLoop()
        self.fleet = Fleet(
            config.instances.timings(), lambda entry: ManualPool(entry.name), clock=self.loop.time
        )
        policy = RoutingPolicy("tested", "", least_loaded)
        self.router = Router(
            self.fleet, policy, num_decisions=4, retry_after_s=1.0, clock=time.time
        )

        async def make() -> Proxy:
            return Proxy(config, self.fleet, self.router)

        self.proxy = asyncio.run(make())
        self.proxy.loop = self.loop  # type: ignore[assignment]
        for name in NAMES:
            entry = InstanceEntry(url=f"http://{name}:1", name=name)
            instance = self.fleet.register(entry, source="test")
            self.fleet.set_models(instance, {"fake": {}})
            self.fleet.report(instance, lifecycle.Alive(""))
            instance.resumes = True

    def ends(self) -> list[End]:
        """Who has the request."""
        found = []
        for instance in self.fleet:
            pool = instance.pool
            is_asked = pool.connection is not None and pool.connection.exchange is not None
            if pool.gate is not None or is_asked:
                found.append(End(instance, pool))
        return found


class Hedges(RuleBasedStateMachine):
    """One client asks one thing after the other."""

    @initialize(
        share=st.sampled_from([1.0, 1.0, 0.002, 0.0]),
        num_retries=st.sampled_from([2, 2, 1, 3, 0]),
        is_idle=st.booleans(),
    )
    def begin(self, share: float, num_retries: int, is_idle: bool) -> None:
        self.share, self.num_retries = share, num_retries
        self.world = World(share, num_retries)
        for instance in self.world.fleet:
            instance.pool.has_idle = is_idle
        self.connect()
        self.num_hedges = 0
        self.kind = ""
        """Of what is asked; empty between two requests."""
        self.answered_by = ""
        self.is_offline = False

    def connect(self) -> None:
        self.wire = Wire()
        self.client = ClientConnection(self.world.proxy)
        self.client.connection_made(self.wire)  # type: ignore[arg-type]

    # -- the client -----------------------------------------------------------------------------

    @precondition(lambda self: not self.kind)
    @rule(kind=st.sampled_from(sorted(BODIES)), offline=st.sampled_from([False] * 5 + [True]))
    def ask(self, kind: str, offline: bool) -> None:
        if self.wire.is_closed:
            self.connect()
        self.wire.written = b""
        self.kind, self.is_offline, self.answered_by = kind, offline, ""
        headers = b"x-xllm-class: offline\r\n" if offline else b""
        self.client.data_received(request(BODIES[kind], headers=headers))
        self.look()

    @precondition(lambda self: self.kind)
    @rule()
    def leave(self) -> None:
        self.wire.is_closed = True
        self.client.connection_lost(None)
        assert not self.world.ends()
        self.kind = ""

    # -- instances ------------------------------------------------------------------------------

    @precondition(lambda self: any(not one.is_connected for one in self.world.ends()))
    @rule(data=st.data(), succeeds=st.booleans())
    def accept(self, data: st.DataObject, succeeds: bool) -> None:
        waiting = [one for one in self.world.ends() if not one.is_connected]
        end = data.draw(st.sampled_from(waiting))
        before = self.others(end)
        gate = end.pool.gate
        assert gate is not None
        if not succeeds:
            gate.error = ConnectionRefusedError("refused")
        task = next(
            one for one in self.world.loop.tasks if not one.is_over and one_of(one, end.instance)
        )
        task.go_on()
        if not succeeds:
            self.goes_on(before)
        self.look()

    @precondition(lambda self: any(one.is_connected for one in self.world.ends()))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        end = self.connected(data)
        name = end.instance.name.encode()
        connection = end.connection
        if self.kind == "plain":
            connection.data_received(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(name), name)
            )
        else:
            sent = events(end.instance.name)
            head = b"" if connection.holds_head else STREAM_HEAD
            connection.data_received(head + sent)
        assert not self.world.ends()
        self.answered_by = end.instance.name
        self.look()

    @precondition(lambda self: self.kind != "plain" and any(self.headless(self.world)))
    @rule(data=st.data())
    def begin_stream(self, data: st.DataObject) -> None:
        """Its head comes, and no event."""
        end = data.draw(st.sampled_from(self.headless(self.world)))
        before = self.world.ends()
        end.connection.data_received(STREAM_HEAD)
        if end.connection.holds_head:
            assert self.world.ends() == before
            assert not self.wire.written
            return
        # Nobody else may be asked any more: it is passed on, and the answer follows.
        assert self.world.ends() == [end]
        end.connection.data_received(events(end.instance.name))
        self.answered_by = end.instance.name
        self.look()

    @precondition(lambda self: self.kind == "armed")
    @precondition(lambda self: any(one.is_connected for one in self.world.ends()))
    @rule(data=st.data())
    def begin_with_an_error(self, data: st.DataObject) -> None:
        end = self.connected(data)
        before = self.others(end)
        head = b"" if end.connection.holds_head else STREAM_HEAD
        end.connection.data_received(head + ERROR_CHUNK)
        self.goes_on(before)
        self.look()

    @precondition(lambda self: any(one.is_connected for one in self.world.ends()))
    @rule(data=st.data(), status=st.sampled_from([429, 500, 503]))
    def refuse(self, data: st.DataObject, status: int) -> None:
        end = self.connected(data)
        if end.connection.holds_head:
            return
        before = self.others(end)
        end.connection.data_received(b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % status)
        if before:
            self.goes_on(before)
        elif not self.world.ends():
            self.answered_by = "no"
        self.look()

    @precondition(lambda self: any(one.is_connected for one in self.world.ends()))
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        end = self.connected(data)
        before = self.others(end)
        connection = end.connection
        is_stale = connection.num_uses > 1 and not connection.num_reads
        connection.transport.abort()
        connection.connection_lost(None)
        if is_stale:
            assert end.pool.gate is not None  # connected to anew
            assert set(before) < set(self.world.ends())
        else:
            self.goes_on(before)
        self.look()

    @rule(name=st.sampled_from(NAMES), is_idle=st.booleans())
    def keep_a_connection(self, name: str, is_idle: bool) -> None:
        instance = self.world.fleet.get(name)
        if instance is not None:
            instance.pool.has_idle = is_idle

    @rule(name=st.sampled_from(NAMES))
    def drain(self, name: str) -> None:
        self.world.fleet.report(self.world.fleet.get(name), lifecycle.Drain())

    @rule()
    def all_are_well_again(self) -> None:
        for instance in self.world.fleet:
            self.world.fleet.report(instance, lifecycle.Undrain())
            self.world.fleet.report(instance, lifecycle.Alive(""))

    # -- time -----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1.0, 1.0, 1.0, 0.4, 3.0, 30.0]))
    def wait(self, seconds: float) -> None:
        before = self.world.ends()
        self.world.loop.pass_time(seconds)
        after = self.world.ends()
        assert set(before) <= set(after)
        if len(after) > len(before):
            assert len(before) == 1
            assert len(after) == 2
            assert not self.is_offline
            assert self.kind != "plain"
            assert self.share
            (added,) = set(after) - set(before)
            assert added.instance.life.state is State.READY
            self.num_hedges += 1

    @precondition(lambda self: self.kind)
    @rule()
    def sweep(self) -> None:
        exchange = self.client.exchange
        assert exchange is not None
        exchange.check_timeouts(self.world.loop.now_s, FIRST_BYTE_S, None)
        self.look()

    # -- what has to hold -----------------------------------------------------------------------

    @staticmethod
    def headless(world: World) -> list[End]:
        return [one for one in world.ends() if one.is_connected and not one.connection.holds_head]

    def connected(self, data: st.DataObject) -> End:
        ends = [one for one in self.world.ends() if one.is_connected]
        return data.draw(st.sampled_from(ends))

    def others(self, end: End) -> list[End]:
        return [one for one in self.world.ends() if one != end]

    def goes_on(self, others: list[End]) -> None:
        """One has failed: who was asked besides is asked still, and nobody else."""
        if others:
            assert self.world.ends() == others
            assert not self.wire.written

    def look(self) -> None:
        """If the request has ended, the client has one whole answer, of who gave it."""
        if self.client.exchange is not None:
            assert self.world.ends()
            return
        status, body = one_answer(self.wire.written, is_closed=self.wire.is_closed)
        if self.answered_by == "no":
            assert (status, body) in [(one, b"no") for one in (429, 500, 503)]
        elif self.answered_by:
            assert status == 200
            assert self.answered_by.encode() in body
            assert body.count(b"[DONE]") == (self.kind != "plain")
        else:
            assert json.loads(body)["error"]["code"] == status
            assert status in (502, 503, 504)
        self.kind = ""

    @invariant()
    def each_is_counted_where_it_is(self) -> None:
        if not hasattr(self, "world"):
            return
        ends = self.world.ends()
        assert len(ends) <= 2
        by_name = {end.instance.name for end in ends}
        for instance in self.world.fleet:
            assert instance.in_flight == (instance.name in by_name)
            assert (instance.outstanding_tokens > 0) == (instance.name in by_name)
        if not ends:
            self.world.fleet.check_integrity()

    @invariant()
    def hedges_end_once_and_are_a_share_of_requests(self) -> None:
        if not hasattr(self, "world"):
            return
        counted = sum(count for one in self.world.fleet for count in one.stats.hedges.values())
        assert counted <= self.num_hedges
        if not self.kind:
            assert counted == self.num_hedges
        # What so many requests have earned, and the burst that a new service has.
        burst = max(1.0, 500 * self.share) if self.share else 0.0
        assert self.num_hedges <= burst + self.share * self.world.router.num_routed
        if not self.num_retries:
            assert not self.num_hedges


def one_of(task: Task, instance: Instance) -> bool:
    """Whether a task connects to this instance."""
    frame = task.coroutine.cr_frame  # type: ignore[attr-defined]
    return frame is not None and frame.f_locals.get("instance") is instance


def events(name: str) -> bytes:
    """A stream of one token, in chunks."""
    choice = {"index": 0, "text": name, "finish_reason": "stop", "token_ids": [1]}
    event = {"id": "x", "created": 1, "choices": [choice]}
    parts = (b"data: %b\n\n" % json.dumps(event).encode(), b"data: [DONE]\n\n")
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def one_answer(raw: bytes, *, is_closed: bool) -> tuple[int, bytes]:
    """Status and body of the only answer in `raw`, as h11 reads it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(raw)
    if is_closed:
        connection.receive_data(b"")
    status, body = 0, b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            assert not status
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        else:
            assert isinstance(event, h11.EndOfMessage), event
            break
    assert connection.trailing_data[0] == b""
    return status, body


TestHedges: Any = Hedges.TestCase
TestHedges.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_a_head_that_waits_for_its_event_has_stalled_only_since_it_came() -> None:
    world = World(share=0.0, num_retries=2)
    wire, client = Wire(), ClientConnection(world.proxy)
    client.connection_made(wire)  # type: ignore[arg-type]
    client.data_received(request(BODIES["armed"]))
    world.loop.tasks[0].go_on()
    world.loop.pass_time(8.0)
    (end,) = world.ends()
    end.connection.data_received(STREAM_HEAD)
    assert end.connection.holds_head
    exchange = client.exchange
    assert exchange is not None
    world.loop.pass_time(4.0)
    exchange.check_timeouts(world.loop.now_s, None, 5.0)
    assert not wire.written
    world.loop.pass_time(2.0)
    exchange.check_timeouts(world.loop.now_s, None, 5.0)
    assert wire.written.startswith(b"HTTP/1.1 504 ")
