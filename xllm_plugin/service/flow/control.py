"""Requests wait here while no instance has room for them.

::

    enter --room, and nobody waits for the same--> sent
    enter --none--> waiting --an instance has room again--> sent
                       |--its time is over--> 503
                       |--pushed out, or there was no place--> 429
                       |--the client goes--> forgotten

What was sent once is not held again: retries and continued streams go on at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from xllm_plugin.service.config import FlowConfig
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.flow.queue import Band, FairQueue, Ticket
from xllm_plugin.service.flow.stats import FlowStats
from xllm_plugin.service.flow.wishes import with_ttft_left
from xllm_plugin.service.replies import Refusal

if TYPE_CHECKING:
    from xllm_plugin.service.exchange import Exchange

__all__ = ["FlowControl", "Waiting"]

logger = logging.getLogger(__name__)

_INFINITE: Final = float("inf")


class Waiting:
    """The time of a request in the queue."""

    __slots__ = ("since_s", "ticket", "timer", "waited_s")

    def __init__(
        self, ticket: Ticket[Exchange], since_s: float, timer: asyncio.TimerHandle
    ) -> None:
        self.ticket = ticket
        self.since_s = since_s
        self.timer = timer
        self.waited_s = -1.0
        """Below 0 while it waits."""


class FlowControl:
    """Holds requests back while instances have no room.  One for each `Proxy`.

    Args:
        config: in force; replaced by `reconfigure`.
        fleet: the instances.
        send: sends a request on its way at once.
        retry_after_s: told to those who are turned away.
    """

    def __init__(
        self,
        config: FlowConfig,
        fleet: Fleet,
        send: Callable[[Exchange], None],
        retry_after_s: float,
    ) -> None:
        self.fleet = fleet
        self.stats = FlowStats()
        self.queue: FairQueue[Exchange] = FairQueue(
            config.max_queued_requests, config.max_queued_bytes, self._weight_of
        )
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._roomy: dict[str | None, tuple[Sequence[Instance], Instance]] = {}
        """Model -> its candidates, and the one of them that was the last with room."""
        self._freed: set[Instance] = set()
        self._woken: asyncio.Handle | None = None
        self.reconfigure(config, retry_after_s)

    def reconfigure(self, config: FlowConfig, retry_after_s: float) -> None:
        """Take new settings; a queue that is too long now is cut when the next request comes."""
        self.config = config
        self.retry_after_s = retry_after_s
        # Looked at for each request and instance; reading a setting takes longer than a number.
        self._num_replicas = config.num_replicas
        self._max_in_flight = _INFINITE if config.max_in_flight is None else config.max_in_flight
        self._max_waiting = _INFINITE if config.max_waiting is None else config.max_waiting
        self.queue.max_tickets = config.max_queued_requests
        self.queue.max_bytes = config.max_queued_bytes

    def has_room(self, instance: Instance) -> bool:
        """Whether another request may be sent to `instance`."""
        if instance.num_waiting > self._max_waiting:
            return False
        num_sent = self._num_sent(instance)
        if num_sent < 1:
            return True
        limit = instance.max_in_flight
        if limit is None:
            limit = self._max_in_flight * instance.capacity
        return num_sent + 1 <= limit / self._num_replicas

    def statistics(self) -> list[tuple[Band, str, int, int]]:
        """(Band, tenant, requests, bytes) of all that waits, the first band first."""
        return self.queue.statistics()

    def enter(self, exchange: Exchange) -> None:
        """Send a request now, or when it is its turn."""
        model, is_work = exchange.model, exchange.method == b"POST" and not exchange.upgrades
        if is_work and (model in self.queue.pools or not self._has_room_for(model)):
            self._wait(exchange)
        else:
            self._send(exchange)

    def leave(self, exchange: Exchange) -> None:
        """Its client has gone; nothing happens if it does not wait any more."""
        if self._forget(exchange) is not None:
            self.stats.outcomes["gone"] += 1

    def freed(self, instance: Instance) -> None:
        """A request has left `instance`."""
        if not self.queue:
            return
        self._freed.add(instance)
        if self._woken is None:
            # Not here: whoever calls is in the middle of another request.
            self._woken = self._loop.call_soon(self._wake)

    def sweep(self) -> None:
        """Look at every instance: some have come, others have reported another load."""
        if self.queue:
            open_pools = {pool for pool in self.queue.pools if self._has_room_for(pool)}
            while open_pools:
                self._send_next(open_pools)
                open_pools = {
                    pool
                    for pool in open_pools
                    if pool in self.queue.pools and self._has_room_for(pool)
                }

    def release_all(self) -> None:
        """Send all that waits: flow control is switched off."""
        while self.queue:
            self._send_next(tuple(self.queue.pools))

    # -- parts ----------------------------------------------------------------------------------

    def _num_sent(self, instance: Instance) -> int:
        """Of the requests there, those that `max_in_flight` is about."""
        return instance.in_flight

    def _has_room_for(self, model: str | None) -> bool:
        candidates = self.fleet.candidates(model)
        if not candidates:
            return True  # the router says so
        known, roomy = self._roomy.get(model, ((), None))
        if known is candidates and roomy is not None and self.has_room(roomy):
            return True  # no look at a thousand that are full
        found = next(filter(self.has_room, candidates), None)
        if found is None:
            return False
        self._roomy[model] = (candidates, found)
        return True

    def _wake(self) -> None:
        self._woken = None
        freed, self._freed = self._freed, set()
        while self.queue:
            freed = {one for one in freed if self.has_room(one)}
            open_pools = {
                pool
                for pool in self.queue.pools
                if not freed.isdisjoint(self.fleet.candidates(pool))
            }
            if not open_pools:
                return
            self._send_next(open_pools)

    def _send_next(self, open_pools: set[str | None] | tuple[str | None, ...]) -> None:
        ticket = self.queue.pop(open_pools)
        assert ticket is not None
        exchange = ticket.item
        waiting = self._forget(exchange)
        assert waiting is not None
        self.stats.outcomes["sent"] += 1
        self.stats.waits.observe(waiting.waited_s)
        wishes = exchange.wishes
        if wishes.has_ttft:
            left_ms = wishes.promise.ttft_ms - (self._loop.time() - exchange.started_s) * 1e3
            exchange.head = with_ttft_left(exchange.head, left_ms)
        self._send(exchange)

    def _wait(self, exchange: Exchange) -> None:
        promise = exchange.wishes.promise
        ticket = Ticket(
            exchange,
            Band(not promise.is_online, promise.priority),
            promise.tenant,
            exchange.model,
            cost=float(max(1, exchange.cost_tokens)),
            num_bytes=len(exchange.head) + len(exchange.body),
        )
        now_s = self._loop.time()
        until_s = min(
            now_s + self._max_wait_s(exchange), exchange.started_s + exchange.wishes.max_wait_s
        )
        timer = self._loop.call_at(until_s, self._expired, exchange)
        exchange.waiting = Waiting(ticket, now_s, timer)
        for left in self.queue.push(ticket):
            self._turn_away(left.item)

    def _turn_away(self, exchange: Exchange) -> None:
        self._forget(exchange)
        self.stats.outcomes["full"] += 1
        exchange.refuse(
            Refusal(
                429,
                "Too many requests wait for an instance; this one had to go, by its band and by "
                f"how many tenant {exchange.wishes.promise.tenant!r} has there.",
                retry_after_s=self.retry_after_s,
            )
        )

    def _expired(self, exchange: Exchange) -> None:
        waiting = self._forget(exchange)
        if waiting is None:
            return
        self.stats.outcomes["expired"] += 1
        promised, allowed = exchange.wishes.max_wait_s, self._max_wait_s(exchange)
        why = (
            f"its first token was wanted within {promised * 1e3:g} ms"
            if promised < allowed
            else f"requests like it wait at most {allowed:g} s"
        )
        exchange.refuse(
            Refusal(
                503,
                f"No instance had room for this request for {waiting.waited_s:.1f} s; {why}.",
                retry_after_s=self.retry_after_s,
            )
        )

    def _forget(self, exchange: Exchange) -> Waiting | None:
        """End its wait; None if it does not wait any more."""
        waiting = exchange.waiting
        if waiting is None or waiting.waited_s >= 0:
            return None
        waiting.waited_s = self._loop.time() - waiting.since_s
        waiting.timer.cancel()
        self.queue.remove(waiting.ticket)
        return waiting

    def _max_wait_s(self, exchange: Exchange) -> float:
        is_online = exchange.wishes.promise.is_online
        return self.config.max_wait_s if is_online else self.config.max_offline_wait_s

    def _weight_of(self, tenant: str) -> float:
        return self.config.tenant_weights.get(tenant, 1.0)
