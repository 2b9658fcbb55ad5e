"""Whether a request is let in: a pure function of its promise, the queue, a forecast, the settings.

Checks in this order; the first that fails is the verdict:

1. the class's bounds, in requests and tokens (`QueueBounds`);
2. the tenant's share of these bounds.  A request larger than its tenant's whole share passes while
   that tenant has nothing else waiting;
3. for online requests, the time to first token that is forecast against the one promised;
4. and the tenant's share of the time that the promise leaves, where what is at risk is refused.

A bound on the queue does not make the engine idle, so dividing it costs no throughput; it decides
whose requests wait in it.  Requests leave the queue about in the order they came, so shares of the
queue become shares of the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from xllm_plugin.instance.config import AdmissionConfig, QueueBounds
from xllm_plugin.instance.forecast import Forecast
from xllm_plugin.instance.waiting import QueueView
from xllm_plugin.scheduler.promise import Promise

__all__ = ["Outcome", "Verdict", "decide"]

# Clients of OpenAI's take no longer waits than a minute from a Retry-After.
MAX_RETRY_AFTER_S = 60


class Outcome(StrEnum):
    """What admission said; the values are those of the metric's label."""

    ADMITTED = "admitted"
    AT_RISK = "at_risk"
    """Admitted, and not expected to keep its TTFT."""
    QUEUE_FULL = "queue_full"
    TENANT_SHARE = "tenant_share"
    TTFT = "ttft"
    """Refused: too much is ahead of it."""
    TTFT_ALONE = "ttft_alone"
    """Refused: even an idle engine would be late."""

    @property
    def is_admitted(self) -> bool:
        """Whether the request goes on to the engine."""
        return self in {Outcome.ADMITTED, Outcome.AT_RISK}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What admission said about one request.

    Attributes:
        outcome: admitted or why not.
        message: for the client; empty when simply admitted.
        ttft_ms: the forecast; None if there was none.
        retry_after_s: when refused, whole seconds after which another try has a chance.
    """

    outcome: Outcome
    message: str = ""
    ttft_ms: float | None = None
    retry_after_s: int = 0


def decide(
    promise: Promise,
    num_tokens: int,
    queue: QueueView,
    forecast: Forecast | None,
    config: AdmissionConfig,
) -> Verdict:
    """Admit or refuse one request.

    Args:
        promise: of the request.
        num_tokens: of its prompt.
        queue: what it finds.
        forecast: of the engines; None if unknown, which refuses nobody.
        config: the settings.
    """
    bounds = config.online if promise.is_online else config.offline
    full = _over_bounds(promise, num_tokens, queue, bounds)
    if full is not None:
        outcome, message = full
        drain_ms = forecast.ttft_ms(0, queue.num_tokens) if forecast else 0.0
        return Verdict(outcome, message, retry_after_s=_retry_after_s(drain_ms))
    if not promise.is_online or forecast is None:
        return Verdict(Outcome.ADMITTED)
    return _by_forecast(promise, num_tokens, queue, forecast, config)


def _over_bounds(
    promise: Promise, num_tokens: int, queue: QueueView, bounds: QueueBounds
) -> tuple[Outcome, str] | None:
    kind = promise.service_class
    for unit, most, waiting, mine, more in (
        ("requests", bounds.max_requests, queue.num_requests, queue.tenant_requests, 1),
        ("tokens", bounds.max_tokens, queue.num_tokens, queue.tenant_tokens, num_tokens),
    ):
        if most is None:
            continue
        if waiting and waiting + more > most:
            return Outcome.QUEUE_FULL, (
                f"The queue is full: {waiting} {unit} of class {kind} wait, this request adds "
                f"{more}, and {most} may (admission.{kind}.max_{unit}). Try again later."
            )
        room = most * queue.tenant_share
        if mine and mine + more > room:
            return Outcome.TENANT_SHARE, (
                f"Tenant {promise.tenant!r} has its share of the queue: {mine} {unit} of class "
                f"{kind} wait, this request adds {more}, and its share is {room:.0f} of {most}. "
                "Try again later."
            )
    return None


def _by_forecast(
    promise: Promise,
    num_tokens: int,
    queue: QueueView,
    forecast: Forecast,
    config: AdmissionConfig,
) -> Verdict:
    ttft_ms = forecast.ttft_ms(num_tokens, queue.ahead_tokens)
    refuses = config.at_risk == "refuse"
    if ttft_ms > promise.ttft_ms:
        if not refuses:
            return Verdict(Outcome.AT_RISK, ttft_ms=ttft_ms)
        return _refused_as_late(promise, num_tokens, ttft_ms, forecast)
    if refuses and queue.tenant_tokens and queue.tenant_share < 1.0:
        alone_ms = forecast.ttft_ms(num_tokens)
        tenant_ms = forecast.ttft_ms(num_tokens, queue.tenant_tokens) - alone_ms
        room_ms = queue.tenant_share * (promise.ttft_ms - alone_ms)
        if tenant_ms > room_ms:
            message = (
                f"Tenant {promise.tenant!r} has its share: what it has waiting takes "
                f"{tenant_ms:.0f} ms, and its share of the time promised is {room_ms:.0f} ms. "
                "Try again later."
            )
            retry_after_s = _retry_after_s(tenant_ms - room_ms)
            return Verdict(Outcome.TENANT_SHARE, message, ttft_ms, retry_after_s)
    return Verdict(Outcome.ADMITTED, ttft_ms=ttft_ms)


def _refused_as_late(
    promise: Promise, num_tokens: int, ttft_ms: float, forecast: Forecast
) -> Verdict:
    promised = f"the first token was promised within {promise.ttft_ms:.0f} ms"
    alone_ms = forecast.alone_ms(num_tokens)
    if alone_ms > promise.ttft_ms:
        message = (
            f"This request cannot keep its promise: {promised}, and a prompt of {num_tokens} "
            f"tokens takes about {alone_ms:.0f} ms here even alone. Ask for a longer TTFT, or send "
            "a shorter prompt."
        )
        return Verdict(Outcome.TTFT_ALONE, message, ttft_ms, MAX_RETRY_AFTER_S)
    message = (
        f"This request would not keep its promise now: {promised}, and {ttft_ms:.0f} ms are "
        "expected. Try again later, or ask for a longer TTFT."
    )
    return Verdict(Outcome.TTFT, message, ttft_ms, _retry_after_s(ttft_ms - promise.ttft_ms))


def _retry_after_s(wait_ms: float) -> int:
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_ms / 1000)))
