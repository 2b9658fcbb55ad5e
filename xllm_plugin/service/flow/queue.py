"""Who is next: bands in strict order; in a band each tenant gets its share; in a tenant, the first.

Between tenants this is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) with the virtual
time of WF2Q+ (Bennett, Zhang, SIGCOMM 1996): it moves with every request served, so that tenants
who come later, however many, start behind one that has waited.

Rule 1: a ticket is in the queue from `push` until exactly one of `pop`, `remove` or a `push` that
returns it.
Rule 2: only the first ticket of a tenant has a tag: who leaves unserved costs its tenant nothing.
Rule 3: if the queue is too full, the newest ticket of the tenant with most in the last band leaves,
most by its weight.  A tenant that fills the queue pushes out its own, not the others'.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from xllm_plugin.errors import InternalError

__all__ = ["Band", "FairQueue", "Ticket"]

T = TypeVar("T")
_MANY = 64


class Band(NamedTuple):
    """Served before every later band; online comes before offline."""

    is_offline: bool
    priority: int
    """In vLLM's sense: lower is earlier."""


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """A place in the queue.

    Attributes:
        item: what waits.
        band: its band.
        tenant: whose it is.
        pool: what it waits for; `pop` is told which pools have room.
        cost: what serving it counts for its tenant, over 0.
        num_bytes: what it holds in memory.
        sequence: of its arrival; set by the queue.
    """

    item: T
    band: Band
    tenant: str
    pool: str | None
    cost: float
    num_bytes: int
    sequence: int = -1


@dataclass(slots=True, eq=False)
class _Tenant(Generic[T]):
    """A tenant with something waiting in one band."""

    weight: float
    start: float
    """Virtual time at which its first ticket begins to be served."""
    pools: dict[str | None, OrderedDict[int, Ticket[T]]] = field(default_factory=dict)
    num_tickets: int = 0
    num_bytes: int = 0

    def first(self, open_pools: Container[str | None]) -> Ticket[T] | None:
        """The oldest ticket whose pool has room."""
        heads = [
            next(iter(waiting.values()))
            for pool, waiting in self.pools.items()
            if pool in open_pools
        ]
        return min(heads, key=_sequence, default=None)

    def newest(self) -> Ticket[T]:
        """The ticket that came last."""
        tails = [next(reversed(waiting.values())) for waiting in self.pools.values()]
        return max(tails, key=_sequence)


@dataclass(slots=True, eq=False)
class _BandState(Generic[T]):
    virtual: float = 0.0
    tenants: dict[str, _Tenant[T]] = field(default_factory=dict)
    total_weight: float = 0.0
    """Of these tenants."""
    turns: list[tuple[float, int, str, _Tenant[T]]] = field(default_factory=list)
    """A heap of (start, when it was put here, name, tenant): each tenant once, and stale ones."""
    finished: dict[str, float] = field(default_factory=dict)
    """Tenants with nothing waiting that have had more than their share -> where they go on."""
    _num_turns: int = 0
    _prune_at: int = _MANY

    def line_up(self, name: str, tenant: _Tenant[T]) -> None:
        """Put a tenant where its start says."""
        self._num_turns += 1
        heappush(self.turns, (tenant.start, self._num_turns, name, tenant))
        if len(self.turns) > _MANY + 2 * len(self.tenants):
            self.turns = [turn for turn in self.turns if self.tenants.get(turn[2]) is turn[3]]
            heapify(self.turns)

    def next_turn(self, open_pools: Container[str | None]) -> Ticket[T] | None:
        """The first ticket of the first tenant that can be served; its turn is taken away."""
        blocked = []
        found = None
        while self.turns and found is None:
            turn = heappop(self.turns)
            if self.tenants.get(turn[2]) is not turn[3]:
                continue
            found = turn[3].first(open_pools)
            if found is None:
                blocked.append(turn)
        for turn in blocked:
            heappush(self.turns, turn)
        return found

    def remember(self, name: str, start: float) -> None:
        """A tenant has nothing more to wait for; forget those whose lead is used up."""
        self.finished[name] = start
        if len(self.finished) > self._prune_at:
            kept = {one: other for one, other in self.finished.items() if other > self.virtual}
            self.finished = kept
            self._prune_at = _MANY + 2 * len(kept)


class FairQueue(Generic[T]):
    """A bounded queue of tickets.  Knows no time.

    Args:
        max_tickets: the most that wait.
        max_bytes: the most that they hold together.
        weight_of: a tenant's weight, over 0.
    """

    def __init__(self, max_tickets: int, max_bytes: int, weight_of: Callable[[str], float]) -> None:
        self.max_tickets = max_tickets
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.pools: dict[str | None, int] = {}
        """What is waited for -> by how many tickets."""
        self._weight_of = weight_of
        self._bands: dict[Band, _BandState[T]] = {}
        self._order: list[Band] = []
        self._num_tickets = 0
        self._sequence = 0

    def __len__(self) -> int:
        return self._num_tickets

    def __iter__(self) -> Iterator[Ticket[T]]:
        """Every ticket, in no order that means anything."""
        for state in self._bands.values():
            for tenant in state.tenants.values():
                for waiting in tenant.pools.values():
                    yield from waiting.values()

    def push(self, ticket: Ticket[T]) -> list[Ticket[T]]:
        """Add a ticket; returns those that left for it, or only itself if there is no place.

        A ticket may be pushed once.
        """
        if ticket.num_bytes > self.max_bytes:
            return [ticket]
        ticket.sequence = self._sequence
        self._sequence += 1
        self._add(ticket)
        left: list[Ticket[T]] = []
        while self._num_tickets > self.max_tickets or self.num_bytes > self.max_bytes:
            victim = self._victim(ticket)
            self._take(victim)
            if victim is ticket:
                for other in reversed(left):  # they would have left for nothing
                    self._add(other)
                return [ticket]
            left.append(victim)
        return left

    def pop(self, open_pools: Container[str | None]) -> Ticket[T] | None:
        """The next ticket that waits for one of `open_pools`, or None."""
        for band in self._order:
            state = self._bands[band]
            ticket = state.next_turn(open_pools)
            if ticket is not None:
                self._serve(state, ticket)
                return ticket
        return None

    def remove(self, ticket: Ticket[T]) -> bool:
        """Take a ticket out unserved; False if it was not waiting."""
        state = self._bands.get(ticket.band)
        tenant = state.tenants.get(ticket.tenant) if state is not None else None
        waiting = tenant.pools.get(ticket.pool) if tenant is not None else None
        if waiting is None or waiting.get(ticket.sequence) is not ticket:
            return False
        self._take(ticket)
        return True

    def statistics(self) -> list[tuple[Band, str, int, int]]:
        """(Band, tenant, tickets, bytes) of all that waits, in the order of bands."""
        return [
            (band, name, tenant.num_tickets, tenant.num_bytes)
            for band in self._order
            for name, tenant in sorted(self._bands[band].tenants.items())
        ]

    def check_integrity(self) -> None:
        """Raise `InternalError` unless the counters are those of the tickets."""
        tickets = list(self)
        pools: dict[str | None, int] = {}
        for ticket in tickets:
            pools[ticket.pool] = pools.get(ticket.pool, 0) + 1
        counted = (self._num_tickets, self.num_bytes, self.pools)
        found = (len(tickets), sum(ticket.num_bytes for ticket in tickets), pools)
        if counted != found:
            raise InternalError(f"the queue counts {counted} and holds {found}")
        if sorted(self._bands) != self._order:
            raise InternalError(f"bands {sorted(self._bands)} are listed as {self._order}")
        if self._num_tickets > self.max_tickets or self.num_bytes > self.max_bytes:
            raise InternalError(f"the queue holds {found[:2]}, more than it may")

    # -- parts ----------------------------------------------------------------------------------

    def _serve(self, state: _BandState[T], ticket: Ticket[T]) -> None:
        tenant = state.tenants[ticket.tenant]
        state.virtual = max(state.virtual + ticket.cost / state.total_weight, tenant.start)
        tenant.start += ticket.cost / tenant.weight
        self._take(ticket)
        if tenant.num_tickets:
            state.line_up(ticket.tenant, tenant)

    def _add(self, ticket: Ticket[T]) -> None:
        state = self._bands.get(ticket.band)
        if state is None:
            state = self._bands[ticket.band] = _BandState()
            insort(self._order, ticket.band)
        tenant = state.tenants.get(ticket.tenant)
        if tenant is None:
            start = max(state.virtual, state.finished.pop(ticket.tenant, 0.0))
            tenant = _Tenant(self._weight_of(ticket.tenant), start)
            state.tenants[ticket.tenant] = tenant
            state.total_weight += tenant.weight
            state.line_up(ticket.tenant, tenant)
        tenant.pools.setdefault(ticket.pool, OrderedDict())[ticket.sequence] = ticket
        self._count(tenant, ticket, 1)

    def _take(self, ticket: Ticket[T]) -> None:
        state = self._bands[ticket.band]
        tenant = state.tenants[ticket.tenant]
        waiting = tenant.pools[ticket.pool]
        del waiting[ticket.sequence]
        if not waiting:
            del tenant.pools[ticket.pool]
        self._count(tenant, ticket, -1)
        if tenant.num_tickets:
            return
        del state.tenants[ticket.tenant]
        state.total_weight -= tenant.weight
        if not state.tenants:
            del self._bands[ticket.band]
            self._order.remove(ticket.band)
        elif tenant.start > state.virtual:
            state.remember(ticket.tenant, tenant.start)

    def _count(self, tenant: _Tenant[T], ticket: Ticket[T], sign: int) -> None:
        tenant.num_tickets += sign
        tenant.num_bytes += sign * ticket.num_bytes
        self._num_tickets += sign
        self.num_bytes += sign * ticket.num_bytes
        num_waiting = self.pools.get(ticket.pool, 0) + sign
        if num_waiting:
            self.pools[ticket.pool] = num_waiting
        else:
            del self.pools[ticket.pool]

    def _victim(self, new: Ticket[T]) -> Ticket[T]:
        """The newest of who has most of the queue in the last band; of equals, `new` itself."""
        band = self._order[-1]
        tenants = self._bands[band].tenants
        heaviest = max(tenants.values(), key=self._part)
        if band == new.band and self._part(tenants[new.tenant]) >= self._part(heaviest):
            return new
        return heaviest.newest()

    def _part(self, tenant: _Tenant[T]) -> float:
        part = max(tenant.num_tickets / self.max_tickets, tenant.num_bytes / self.max_bytes)
        return part / tenant.weight


def _sequence(ticket: Ticket[T]) -> int:
    return ticket.sequence
