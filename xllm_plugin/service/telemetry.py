"""What requests have shown: latencies, promises kept, and a bounded history of both.

A request costs a few additions here.  None is kept: every interval becomes one `Sample`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from xllm_plugin.service.config import SloConfig
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.histogram import Histogram
from xllm_plugin.service.measured import Measured, Outcome
from xllm_plugin.service.policy import Slo
from xllm_plugin.service.routes import Kind

if TYPE_CHECKING:
    from xllm_plugin.service.exchange import Exchange

__all__ = ["Ending", "Sample", "Telemetry"]

_TURN_S: Final = 30.0
"""An instance's latencies are shown of the last 30 to 60 s."""
_OK: Final = 200
_SWITCHED: Final = 101
_TOO_MANY: Final = 429
_SERVER_ERROR: Final = 500
_INFINITE: Final = float("inf")
_NOTHING_PROMISED: Final = Slo()
# Tuples: members are compared by identity, which costs less than their hash.
_INFERENCE: Final = (Kind.INFERENCE, Kind.RESPONSES)
_NOT_WORK: Final = (Kind.HEALTH, Kind.MODELS, Kind.CONTROL)


class Ending(StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    """The client has a whole answer, of whatever status."""
    REFUSED = "refused"
    """The service has answered with an error of its own."""
    BROKEN = "broken"
    """An answer that had begun could not be finished."""
    CLIENT_GONE = "client gone"


class Sample(NamedTuple):
    """One interval.  None where nothing was measured in it."""

    unix_s: float
    """Its end."""
    requests_per_s: float
    failed_per_s: float
    """Of these: broken, or answered with 429 or 5xx."""
    output_tokens_per_s: float
    """Of answers whose tokens are known, counted when they end."""
    ttft_p50_ms: float | None
    ttft_p90_ms: float | None
    tpot_p50_ms: float | None
    tpot_p90_ms: float | None
    slo_kept: int
    slo_judged: int
    in_flight: int
    waiting: int
    """Requests in the instances' queues, as they said last."""


class Telemetry:
    """Owns the service's own measurements.

    Args:
        fleet: the instances.
        slo: targets of requests that promise nothing else.
        num_samples: how many intervals to remember.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        fleet: Fleet,
        slo: SloConfig,
        *,
        num_samples: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.slo = slo
        self.samples: deque[Sample] = deque(maxlen=num_samples)
        self.num_taken = 0
        """Samples since the start, also those that are forgotten."""
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.started_unix_s = wall_clock()
        self._fleet = fleet
        self._clock = clock
        self._wall_clock = wall_clock
        self._ttft = Histogram()
        self._tpot = Histogram()
        self._num_requests = self._num_failed = self._num_tokens = 0
        self._kept_before = self._judged_before = 0
        self._sampled_s = self._turned_s = clock()

    # -- a request ------------------------------------------------------------------------------

    def first_token(self, instance: Instance, seconds: float) -> None:
        """A stream begins, `seconds` after its request was whole."""
        instance.stats.ttft.observe(seconds)
        self._ttft.observe(seconds)

    def finished(self, exchange: Exchange, ending: Ending) -> None:
        """A request is over."""
        kind = exchange.route.kind
        if kind in _NOT_WORK:
            return
        self._num_requests += 1
        is_failed = _is_failed(exchange.status, ending)
        self._num_failed += is_failed
        duration_s = exchange.proxy.loop.time() - exchange.started_s
        instance = exchange.visited[-1] if exchange.visited else None
        is_answer = exchange.status != _SWITCHED  # a WebSocket may last for hours
        if instance is not None and ending is Ending.COMPLETE and is_answer:
            instance.stats.duration.observe(duration_s)
        tpot_s = self._output(exchange, instance, duration_s)
        if not exchange.wants_stream or kind not in _INFERENCE or exchange.wishes.is_offline:
            return
        outcome = None
        if is_failed:
            outcome = Outcome.FAILED
        elif exchange.status == _OK or ending is Ending.CLIENT_GONE:
            outcome = self._judged(exchange, duration_s, tpot_s)
        if outcome is not None:
            self.outcomes[outcome] += 1

    def _output(
        self, exchange: Exchange, instance: Instance | None, duration_s: float
    ) -> float | None:
        """Count tokens; returns the mean time of a stream's after its first, if known."""
        num_tokens = exchange.num_output_tokens
        if instance is None or not num_tokens:
            return None
        self._num_tokens += num_tokens
        instance.stats.output_tokens += num_tokens
        if num_tokens == 1 or not exchange.wants_stream or exchange.ttft_s < 0:
            return None
        tpot_s = (duration_s - exchange.ttft_s) / (num_tokens - 1)
        self._tpot.observe(tpot_s)
        if exchange.stream is None or not exchange.stream.num_resumes:  # else it is nobody's own
            instance.stats.tpot.observe(tpot_s)
        return tpot_s

    def _judged(
        self, exchange: Exchange, duration_s: float, tpot_s: float | None
    ) -> Outcome | None:
        """By what the client has got; None if it left before anything was due."""
        promised = exchange.wishes.slo or _NOTHING_PROMISED
        has_begun = exchange.ttft_s >= 0
        waited_s = exchange.ttft_s if has_begun else duration_s
        if waited_s > _target_s(promised.ttft_s, self.slo.ttft_ms):
            return Outcome.TTFT_MISSED
        if not has_begun:
            return None
        if tpot_s is not None and tpot_s > _target_s(promised.tpot_s, self.slo.tpot_ms):
            return Outcome.TPOT_MISSED
        return Outcome.KEPT

    # -- requests of other processes --------------------------------------------------------------

    def take(self) -> Measured:
        """All that was measured since the last time, for `add` in another process."""
        taken = Measured(
            self._num_requests,
            self._num_failed,
            self._num_tokens,
            {outcome: count for outcome, count in self.outcomes.items() if count},
            self._ttft,
            self._tpot,
        )
        self._num_requests = self._num_failed = self._num_tokens = 0
        self.outcomes = dict.fromkeys(Outcome, 0)
        self._ttft, self._tpot = Histogram(), Histogram()
        return taken

    def add(self, measured: Measured) -> None:
        """Count what another process has measured."""
        self._num_requests += measured.num_requests
        self._num_failed += measured.num_failed
        self._num_tokens += measured.num_tokens
        for outcome, count in measured.outcomes.items():
            self.outcomes[outcome] += count
        self._ttft.add(measured.ttft)
        self._tpot.add(measured.tpot)

    # -- history --------------------------------------------------------------------------------

    async def run(self, interval_s: float) -> None:
        """Take a sample every `interval_s`, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            self.take_sample()

    def take_sample(self) -> None:
        """End an interval."""
        now_s = self._clock()
        elapsed_s = max(now_s - self._sampled_s, 1e-3)
        kept, judged = self.outcomes[Outcome.KEPT], sum(self.outcomes.values())
        instances = tuple(self._fleet)
        self.samples.append(
            Sample(
                unix_s=round(self._wall_clock(), 1),
                requests_per_s=round(self._num_requests / elapsed_s, 3),
                failed_per_s=round(self._num_failed / elapsed_s, 3),
                output_tokens_per_s=round(self._num_tokens / elapsed_s, 1),
                ttft_p50_ms=quantile_ms(self._ttft, 0.5),
                ttft_p90_ms=quantile_ms(self._ttft, 0.9),
                tpot_p50_ms=quantile_ms(self._tpot, 0.5),
                tpot_p90_ms=quantile_ms(self._tpot, 0.9),
                slo_kept=kept - self._kept_before,
                slo_judged=judged - self._judged_before,
                in_flight=sum(one.in_flight for one in instances),
                waiting=sum(one.queue.num_waiting if one.queue else 0 for one in instances),
            )
        )
        self.num_taken += 1
        self._num_requests = self._num_failed = self._num_tokens = 0
        self._kept_before, self._judged_before = kept, judged
        self._sampled_s = now_s
        self._ttft.turn()
        self._tpot.turn()
        if now_s - self._turned_s >= _TURN_S:
            self._turned_s = now_s
            for one in instances:
                one.stats.ttft.turn()
                one.stats.tpot.turn()


def quantile_ms(histogram: Histogram, part: float) -> float | None:
    """For people: milliseconds with a decimal."""
    found_s = histogram.quantile_s(part)
    return None if found_s is None else round(found_s * 1e3, 1)


def _is_failed(status: int, ending: Ending) -> bool:
    if ending is Ending.CLIENT_GONE:
        return False
    return ending is Ending.BROKEN or status >= _SERVER_ERROR or status == _TOO_MANY


def _target_s(promised_s: float, default_ms: float) -> float:
    """What the request names itself; a promise with a wrong part is none."""
    return promised_s if promised_s < _INFINITE else default_ms / 1e3
