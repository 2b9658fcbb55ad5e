"""Requests that are asked twice on purpose, as the first instance has not begun to answer in time.

::

    one leg --silent for `hedge_after_s`--> two legs --one begins to answer--> that one
       ^                                       |
       +--one fails, or cannot now: the other goes on

A leg is one sending of the request.  The one that an event is about is in the fields of the
`Exchange`, so that all else there knows of one leg only; the other one waits here.  Legs are told
apart by their instances' pools, of which no two are the same.  Each leg ends in `Exchange.give_up`
or with the exchange, and what it has booked is released there, once.

A stream begins with its first event: servers send its head long before they have a token.  So the
head of a stream that may still be hedged is held back until then (`upstream.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xllm_plugin.service.replies import Refusal
from xllm_plugin.service.routes import Kind

if TYPE_CHECKING:
    import asyncio

    from xllm_plugin.service.decision import Decision, Sent
    from xllm_plugin.service.exchange import Exchange
    from xllm_plugin.service.fleet import Instance
    from xllm_plugin.service.upstream import Pool, UpstreamConnection

__all__ = ["Hedging", "Leg", "hedge_wait_s"]

_NOT_NOW_S: Final = 1.0
"""Until it is tried again, where nobody had room or no hedge was left."""
_LEAST_PART: Final = 1 / 4
"""Of the settings' wait: clients that promise themselves no time get no hedge for each request."""
_TOO_MANY: Final = 429
_UNAVAILABLE: Final = 503
_SERVER_ERROR: Final = 500


def hedge_wait_s(exchange: Exchange, after_s: float) -> float | None:
    """Seconds from now, as a request is sent, to its hedge; None if it must not have one.

    Only inference: of what else is asked nobody knows what it does twice, and of two responses
    (`/v1/responses`) the one that nobody wants could go on in the background.  Only streams: any
    other answer begins when it is complete, so that being long would look like being silent.

    Args:
        exchange: not answered yet.
        after_s: by the settings.
    """
    wishes = exchange.wishes
    if (
        exchange.route.kind is not Kind.INFERENCE
        or not exchange.wants_stream
        or exchange.upgrades
        or exchange.response_id
        or not wishes.promise.is_online
    ):
        return None
    spent_s = exchange.proxy.loop.time() - exchange.started_s
    return max(after_s * _LEAST_PART, min(after_s, wishes.max_wait_s / 2 - spent_s))


class Leg:
    """One sending, as in the fields of its `Exchange`."""

    __slots__ = (
        "booked_tokens",
        "connecting",
        "connection",
        "decision",
        "instance",
        "is_hedge",
        "sent",
        "sent_s",
    )

    def __init__(
        self,
        *,
        instance: Instance,
        booked_tokens: int,
        sent: Sent | None,
        sent_s: float,
        decision: Decision | None,
        connection: UpstreamConnection | None,
        connecting: asyncio.Task[None] | None,
    ) -> None:
        self.instance = instance
        self.booked_tokens = booked_tokens
        self.sent = sent
        self.sent_s = sent_s
        self.decision = decision
        self.connection = connection
        self.connecting = connecting
        self.is_hedge = False


class Hedging:
    """The hedges of one request.

    Args:
        exchange: whose.
        wait_s: from a sending to its hedge.
    """

    __slots__ = ("_exchange", "_is_hedge", "_rival", "_timer", "_wait_s", "has_hedged", "is_open")

    def __init__(self, exchange: Exchange, wait_s: float) -> None:
        self.has_hedged = False
        """Whether a second instance was asked."""
        self.is_open = False
        """Whether one may be: no answer has begun."""
        self._exchange = exchange
        self._wait_s = wait_s
        self._timer: asyncio.TimerHandle | None = None
        """Runs while there is one leg and no answer."""
        self._rival: Leg | None = None
        self._is_hedge = False
        """Whether the leg in the exchange's fields was sent as the other one was silent."""

    @property
    def visited(self) -> tuple[Instance, ...]:
        """All that were asked, at the end the one in the exchange's fields."""
        last = self._exchange.instance
        assert last is not None
        return (*(one for one in self._exchange.visited if one is not last), last)

    @property
    def rival(self) -> Leg | None:
        """The leg that is not in the exchange's fields."""
        return self._rival

    def wait(self) -> None:
        """There is one leg, and no answer: a second one may be sent later."""
        exchange = self._exchange
        self.is_open = len(exchange.tried) < exchange.proxy.config.routing.num_retries
        if self.is_open:
            self._timer = exchange.proxy.loop.call_later(self._wait_s, self._late)

    def turn_to(self, pool: Pool) -> None:
        """Have the exchange's fields be about the leg with a connection of this pool."""
        instance = self._exchange.instance
        assert instance is not None
        if self._rival is not None and instance.pool is not pool:
            self.swap()

    def swap(self) -> None:
        """Have the exchange's fields be about the other leg."""
        assert self._rival is not None
        before = self._exchange.leg()
        before.is_hedge = self._is_hedge
        self._put(self._rival)
        self._rival = before

    def is_overruled(self, connection: UpstreamConnection, status: int) -> bool:
        """An answer begins; return whether it is left, as the other one may be better.

        Args:
            connection: where it comes from; the exchange's fields are about its leg afterwards.
            status: of the answer.
        """
        if self._rival is None:
            return False
        self.turn_to(connection.pool)
        if status != _TOO_MANY and status < _SERVER_ERROR:
            return False
        exchange = self._exchange
        assert exchange.instance is not None
        exchange.instance.stats.count_error("unavailable")
        if status == _UNAVAILABLE:
            exchange.blame_if_idle(exchange.instance)
        return self.go_on()

    def go_on(self) -> bool:
        """The leg in the exchange's fields has failed; return whether there is another one."""
        rival, exchange = self._rival, self._exchange
        if rival is None:
            return False
        assert exchange.instance is not None
        exchange.instance.stats.retries += 1
        exchange.tried = (*exchange.tried, exchange.instance)
        exchange.give_up()
        exchange.is_answering = False
        if exchange.stream is not None:
            exchange.stream.restart()  # both collect there
        self._rival = None
        self._put(rival)
        self.wait()
        return True

    def won(self) -> None:
        """The answer of the leg in the exchange's fields is relayed: the other one is cancelled."""
        self.drop_rival()
        self.is_open = False
        self._stop_timer()
        instance = self._exchange.instance
        assert instance is not None
        if self.has_hedged:
            self._exchange.visited = self.visited
        if self._is_hedge:
            self._is_hedge = False
            instance.stats.count_hedge("won")

    def drop_rival(self) -> None:
        """Cancel the leg that is not in the exchange's fields."""
        if self._rival is None:
            return
        self.swap()
        kept, self._rival = self._rival, None
        self._exchange.give_up()
        self._put(kept)

    def left(self, instance: Instance) -> None:
        """The leg in the exchange's fields has ended."""
        self._stop_timer()
        if self._is_hedge:
            self._is_hedge = False
            instance.stats.count_hedge("lost")

    # -- parts ----------------------------------------------------------------------------------

    def _late(self) -> None:
        """No answer has begun in time: ask a second instance, if one has time for it."""
        exchange = self._exchange
        proxy = exchange.proxy
        is_possible = not exchange.client.is_write_paused and self._has_room_elsewhere()
        if not is_possible or not proxy.hedge_budget.take(proxy.router.num_routed):
            self._timer = proxy.loop.call_later(max(_NOT_NOW_S, self._wait_s), self._late)
            return
        self._timer = None
        first, tried = exchange.leg(), exchange.tried
        first.is_hedge = self._is_hedge
        exchange.tried = (*tried, first.instance)
        try:
            instance = proxy.router.choose(exchange)
        except Refusal:  # of a policy that has failed, which is logged
            return
        finally:
            exchange.tried = tried
        self._rival = first
        self.has_hedged = self._is_hedge = True
        exchange.send_too(instance)

    def _has_room_elsewhere(self) -> bool:
        exchange = self._exchange
        flow, has_room = exchange.proxy.flow, exchange.proxy.router.has_room
        if flow is not None and exchange.model in flow.queue.pools:
            return False  # those who wait come first
        return any(
            one not in exchange.tried and (has_room is None or has_room(one))
            for one in exchange.ready_others()
        )

    def _put(self, leg: Leg) -> None:
        self._exchange.put(leg)
        self._is_hedge = leg.is_hedge

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
