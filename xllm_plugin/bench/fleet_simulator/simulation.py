"""Discrete events: requests come, the service chooses, instances compute, news travels with delay.

What decides is the code that runs in production, unchanged: `service.router.Router` with the
policy under test, `service.fleet.Fleet` with its counters, fitted speeds and states, and
`service.kv_index.PrefixIndex`.  They learn of an instance only what would have reached them by
then: first bytes and ends of answers, heartbeats and KV events, each after its delay.  Only the
engines know their own state.  Time stands still while the service decides.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from xllm_plugin.bench.fleet_simulator.engine import Engine, Job, Outcome
from xllm_plugin.bench.fleet_simulator.profile import StepProfile
from xllm_plugin.bench.fleet_simulator.summary import Served
from xllm_plugin.bench.fleet_simulator.workload import Arrival
from xllm_plugin.errors import ConfigError, InternalError
from xllm_plugin.registration import Load
from xllm_plugin.service.body import Peek
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.decision import Decision, Sent
from xllm_plugin.service.exchange import Exchange, cost_tokens_of
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.flow.wishes import NO_WISHES
from xllm_plugin.service.kv_index.index import Cache, PrefixIndex, packed
from xllm_plugin.service.kv_index.places import Places
from xllm_plugin.service.kv_index.wire import BlockRemoved, BlockStored, Event
from xllm_plugin.service.lifecycle import Alive, Timings
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.router import Router
from xllm_plugin.service.upstream import Pool

__all__ = ["Delays", "InstanceSpec", "Run", "simulate"]

_MODEL = "simulated"
_BYTES_PER_TOKEN = 4
_SWEEP_S = 1.0  # as service.proxy has it


@dataclass(frozen=True, slots=True)
class Delays:
    """How late the service learns, in seconds."""

    network_s: float = 1e-3
    """One way, of requests, answers and heartbeats."""
    kv_event_s: float = 10e-3
    """From the end of the step that an event is about."""
    heartbeat_s: float = 2.0
    """Between two of one instance: a third of the default lease."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """What sets one instance apart."""

    slowness: float = 1.0
    capacity: float = 1.0
    """That its entry claims."""
    reports: Callable[[Load], Load] = lambda load: load
    """What it makes of its load before it sends it."""


@dataclass(slots=True)
class Run:
    """What came out."""

    served: list[Served]
    busy_s: list[float]
    """Of each instance, until the last arrival."""
    decision_s: list[float] = field(default_factory=list)
    """Processor time of each decision, lookup of the prompt included."""
    end_s: float = 0.0
    num_steps: int = 0


def simulate(
    policy: RoutingPolicy,
    arrivals: Sequence[Arrival],
    profile: StepProfile,
    instances: Sequence[InstanceSpec],
    *,
    block_tokens: int,
    delays: Delays = Delays(),
    seed: int = 0,
    watch: Callable[[Engine], None] | None = None,
) -> Run:
    """Serve all arrivals, however late, and return what became of them.

    Args:
        policy: as registered with the service, or a peer's.
        arrivals: in order of time.
        profile: of every instance.
        instances: the fleet.
        block_tokens: tokens that a block hash stands for.
        delays: of news.
        seed: of the policy's random numbers and of the heartbeats' beats.
        watch: called with the engine after each of its steps, for tests.

    Raises:
        ConfigError: there is no instance, or a request that no instance can hold.
    """
    if not instances:
        raise ConfigError("0 instances: give one at least")
    for one in arrivals:
        if one.prompt_tokens + one.output_tokens > profile.kv_tokens:
            raise ConfigError(
                f"a request of {one.prompt_tokens} + {one.output_tokens} tokens does not fit into "
                f"the {profile.kv_tokens} KV tokens of {profile.name}; shorten the trace"
            )
    simulation = _Simulation(policy, arrivals, profile, instances, block_tokens, delays, seed)
    simulation.watch = watch
    simulation.run()
    return simulation.result()


class _Loop:
    """Time, and what happens when.  Offers what the router asks of asyncio's loop."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._number = 0

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._number, call, args))

    def call_at(self, at_s: float, call: Callable[..., object], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, call, args))

    def run(self, is_over: Callable[[], bool]) -> None:
        events = self._events
        while events and not is_over():
            self.now_s, _, call, args = heapq.heappop(events)
            call(*args)


class _Proxy:
    """What the router asks of the proxy."""

    def __init__(self, loop: _Loop) -> None:
        self.loop = loop


class _Ticket:
    """What the router sees of a request: the fields of an `Exchange` that it reads."""

    __slots__ = (
        *("body", "cost_tokens", "decision", "draw", "instance", "model", "proxy", "response_id"),
        *("sent", "sent_s", "sequence", "session_key", "started_s", "tried", "ttft_s"),
        *("served", "arrival", "wants_stream", "wishes"),
    )

    def __init__(self, arrival: Arrival, served: Served, proxy: _Proxy, draw: int) -> None:
        self.arrival = arrival
        self.served = served
        self.proxy = proxy
        self.draw = draw
        self.model = _MODEL
        self.body = b""
        self.wants_stream = True
        self.cost_tokens = cost_tokens_of(arrival.prompt_tokens * _BYTES_PER_TOKEN, Peek())
        self.response_id = self.session_key = ""
        self.sequence = 0
        self.started_s = proxy.loop.now_s
        self.sent_s = 0.0
        self.ttft_s = -1.0
        self.wishes = NO_WISHES if arrival.slo is None else NO_WISHES._replace(slo=arrival.slo)
        self.tried: tuple[Instance, ...] = ()
        self.sent: Sent | None = None
        self.decision: Decision | None = None
        self.instance: Instance | None = None


class _Directory:
    """The service's prefix index, fed by events; a trace's block is one token of it."""

    def __init__(self, block_tokens: int) -> None:
        self.index = PrefixIndex()
        self._block_tokens = block_tokens
        self._caches: dict[str, Cache] = {}
        self._places = Places(())

    def add(self, names: Sequence[str]) -> None:
        self._caches = {name: self.index.add() for name in names}
        self._places = Places([(name, [cache]) for name, cache in self._caches.items()])

    def apply(self, name: str, events: Sequence[Event]) -> None:
        cache = self._caches[name]
        for event in events:
            self.index.apply(cache, event)

    def lookup(self, blocks: Sequence[int]) -> Mapping[str, float]:
        size = self._block_tokens
        return self._places.cached(
            self.index.holders(packed(blocks)), lambda held, _: float(held.device * size)
        )


class _Simulation:
    def __init__(  # noqa: PLR0917 - those of `simulate`
        self,
        policy: RoutingPolicy,
        arrivals: Sequence[Arrival],
        profile: StepProfile,
        instances: Sequence[InstanceSpec],
        block_tokens: int,
        delays: Delays,
        seed: int,
    ) -> None:
        self.watch: Callable[[Engine], None] | None = None
        self._loop = _Loop()
        self._proxy = _Proxy(self._loop)
        self._looks_up = policy.uses_prefixes and len(instances) > 1
        self._arrivals = arrivals
        self._delays = delays
        self._rng = random.Random(seed)  # noqa: S311 - a simulation
        self._specs = instances
        self._directory = _Directory(block_tokens)
        self._fleet = Fleet(Timings(), _pool, self._loop.time)
        self._router = Router(
            self._fleet, policy, num_decisions=1, retry_after_s=1.0, clock=self._loop.time
        )
        longest = max((one.prompt_tokens for one in arrivals), default=0)
        self._body = b" " * (longest * _BYTES_PER_TOKEN)
        self._engines = [Engine(profile, block_tokens, spec.slowness) for spec in instances]
        self._in_step = [False] * len(instances)
        self._tickets: dict[Job, _Ticket] = {}
        self._number_of: dict[str, int] = {}
        self._served: list[Served] = []
        self._decision_s: list[float] = []
        self._busy_s = [0.0] * len(instances)
        self._num_left = len(arrivals)
        self._join(instances)

    def run(self) -> None:
        """Until every request has ended."""
        loop = self._loop
        if self._arrivals:
            loop.call_at(self._arrivals[0].at_s, self._arrive, 0)
        loop.call_later(_SWEEP_S, self._sweep)
        for number in range(len(self._engines)):
            beat_s = self._rng.uniform(0, self._delays.heartbeat_s)
            loop.call_later(beat_s, self._beat, number)
        loop.run(lambda: not self._num_left)
        self._fleet.check_integrity()

    def result(self) -> Run:
        """What came out."""
        steps = sum(engine.num_steps for engine in self._engines)
        return Run(self._served, self._busy_s, self._decision_s, self._loop.now_s, steps)

    # -- the service ----------------------------------------------------------------------------

    def _join(self, instances: Sequence[InstanceSpec]) -> None:
        width = len(str(len(instances) - 1))
        for number, spec in enumerate(instances):
            name = f"i{number:0{width}}"
            entry = InstanceEntry(url=f"http://{name}:80", name=name, capacity=spec.capacity)
            instance = self._fleet.register(entry, source="simulator", incarnation="1", leased=True)
            self._fleet.set_models(instance, {_MODEL: {"id": _MODEL}})
            self._fleet.report(instance, Alive("1"))
            self._number_of[name] = number
        self._directory.add(tuple(self._number_of))

    def _arrive(self, number: int) -> None:
        arrival = self._arrivals[number]
        if number + 1 < len(self._arrivals):
            self._loop.call_at(self._arrivals[number + 1].at_s, self._arrive, number + 1)
        else:
            self._busy_s = [engine.busy_s for engine in self._engines]
        prompt, output = arrival.prompt_tokens, arrival.output_tokens
        served = Served(number, arrival.at_s, prompt, output)
        self._served.append(served)
        ticket = _Ticket(arrival, served, self._proxy, self._rng.getrandbits(64))
        ticket.body = self._body[: prompt * _BYTES_PER_TOKEN]
        instance = self._choose(ticket)
        ticket.instance = instance
        is_offline = ticket.wishes.is_offline
        self._fleet.book(instance, ticket.cost_tokens, is_offline=is_offline)
        ticket.sent_s = self._loop.now_s
        served.instance = self._number_of[instance.name]
        self._loop.call_later(self._delays.network_s, self._reach, ticket)

    def _choose(self, ticket: _Ticket) -> Instance:
        began = time.thread_time()
        if self._looks_up and len(self._directory.index):
            cached = self._directory.lookup(ticket.arrival.blocks)
            ticket.sent = Sent(ticket.arrival.prompt_tokens, cached)
        instance = self._router.choose(cast("Exchange", ticket))
        self._decision_s.append(time.thread_time() - began)
        return instance

    def _first_bytes(self, ticket: _Ticket) -> None:
        ticket.served.ttft_s = self._loop.now_s - ticket.served.at_s
        self._router.first_byte(cast("Exchange", ticket), is_measure=True)

    def _ended(self, ticket: _Ticket) -> None:
        if ticket.served.done_s >= 0:
            raise InternalError(f"request {ticket.served.number} ends twice")
        assert ticket.instance is not None
        ticket.served.done_s = self._loop.now_s
        is_offline = ticket.wishes.is_offline
        self._fleet.release(ticket.instance, ticket.cost_tokens, is_offline=is_offline)
        self._router.left(cast("Exchange", ticket))
        self._num_left -= 1

    def _sweep(self) -> None:
        self._loop.call_later(_SWEEP_S, self._sweep)
        self._fleet.tick()

    def _heard(self, name: str, load: Load) -> None:
        instance = self._fleet.get(name)
        assert instance is not None
        self._fleet.report(instance, Alive("1"))
        self._fleet.set_load(instance, load)

    # -- the instances --------------------------------------------------------------------------

    def _beat(self, number: int) -> None:
        self._loop.call_later(self._delays.heartbeat_s, self._beat, number)
        load = self._specs[number].reports(self._engines[number].load())
        self._loop.call_later(self._delays.network_s, self._heard, self._name(number), load)

    def _reach(self, ticket: _Ticket) -> None:
        number, arrival = ticket.served.instance, ticket.arrival
        job = Job(
            ticket.served.number, arrival.blocks, arrival.prompt_tokens, arrival.output_tokens
        )
        self._tickets[job] = ticket
        self._engines[number].add(job)
        if not self._in_step[number]:
            self._begin(number)

    def _begin(self, number: int) -> None:
        self._in_step[number] = True
        self._loop.call_later(self._engines[number].begin(), self._end, number)

    def _end(self, number: int) -> None:
        engine = self._engines[number]
        outcome = engine.end()
        self._in_step[number] = False
        if self.watch is not None:
            self.watch(engine)
        if engine.is_busy:
            self._begin(number)
        loop, delays = self._loop, self._delays
        for job in outcome.first:
            loop.call_later(delays.network_s, self._first_bytes, self._tickets[job])
        for job in outcome.done:
            ticket = self._tickets.pop(job)
            ticket.served.cached_tokens = job.cached_tokens
            ticket.served.num_preemptions = job.num_preemptions
            loop.call_later(delays.network_s, self._ended, ticket)
        if self._looks_up and (outcome.stored or outcome.removed):
            name, events = self._name(number), _events(outcome)
            loop.call_later(delays.kv_event_s, self._directory.apply, name, events)

    def _name(self, number: int) -> str:
        width = len(str(len(self._engines) - 1))
        return f"i{number:0{width}}"


def _events(outcome: Outcome) -> list[Event]:
    """As an instance publishes them, with a block for a token."""
    events: list[Event] = []
    if outcome.removed:
        events.append(BlockRemoved(block_hashes=list(outcome.removed)))
    events += [
        BlockStored(
            block_hashes=list(stored.blocks),
            parent_block_hash=stored.parent,
            token_ids=list(stored.blocks),
            block_size=1,
        )
        for stored in outcome.stored
    ]
    return events


def _pool(entry: InstanceEntry) -> Pool:
    """No connection is ever opened."""
    return Pool(entry.host, entry.port, tls=None, connect_timeout_s=1.0)
