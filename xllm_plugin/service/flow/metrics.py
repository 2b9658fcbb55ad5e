"""Metrics of the queue and of keys, read from plain counters when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from xllm_plugin.service.flow.control import FlowControl

if TYPE_CHECKING:
    from xllm_plugin.service.proxy import Proxy

__all__ = ["collect", "describe_keys", "describe_queue"]

_PREFIX = "xllm_service_"
_CLASSES = {False: "online", True: "offline"}


def collect(proxy: Proxy) -> Iterator[Metric]:
    """Every metric of flow control; without samples where it is off."""
    yield from _queue_metrics(proxy.flow)
    yield from _key_metrics(proxy)


def describe_queue(flow: FlowControl | None) -> list[dict[str, Any]]:
    """What waits, by band and tenant, the first band first."""
    if flow is None:
        return []
    return [
        {
            "class": _CLASSES[band.is_offline],
            "priority": band.priority,
            "tenant": tenant,
            "num_requests": num_requests,
            "num_bytes": num_bytes,
        }
        for band, tenant, num_requests, num_bytes in flow.statistics()
    ]


def describe_keys(proxy: Proxy) -> list[dict[str, Any]]:
    """Every key's limits and what is left of them; nothing that a key could be made from."""
    now_s = proxy.loop.time()
    return [
        {
            **account.record.model_dump(mode="json", exclude={"sha256"}),
            "in_flight": account.in_flight,
            "num_requests": account.num_requests,
            "num_tokens": account.num_tokens,
            "refused": account.refused,
            "remaining_requests": account.requests and account.requests.level(now_s),
            "remaining_tokens": account.tokens and account.tokens.level(now_s),
        }
        for account in proxy.keys or ()
    ]


def _queue_metrics(flow: FlowControl | None) -> Iterator[Metric]:
    queued = GaugeMetricFamily(
        f"{_PREFIX}queued_requests", "Requests that wait for an instance.", labels=["class"]
    )
    held = GaugeMetricFamily(f"{_PREFIX}queued_bytes", "Bytes that these hold.")
    outcomes = CounterMetricFamily(
        f"{_PREFIX}queue_outcomes",
        "Requests that have waited, by what followed.",
        labels=["outcome"],
    )
    waits = HistogramMetricFamily(
        f"{_PREFIX}queue_seconds", "How long those waited that were sent."
    )
    if flow is not None:
        counts = dict.fromkeys(_CLASSES.values(), 0)
        num_bytes = 0
        for band, _, num_requests, num_held in flow.statistics():
            counts[_CLASSES[band.is_offline]] += num_requests
            num_bytes += num_held
        for name, count in counts.items():
            queued.add_metric([name], count)
        held.add_metric([], num_bytes)
        for outcome, count in flow.stats.outcomes.items():
            outcomes.add_metric([outcome], count)
        waits.add_metric([], flow.stats.waits.exposed(), sum_value=flow.stats.waits.sum_s)
    yield from (queued, held, outcomes, waits)


def _key_metrics(proxy: Proxy) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        f"{_PREFIX}key_requests", "Requests that a key's limits let in.", labels=["key"]
    )
    tokens = CounterMetricFamily(
        f"{_PREFIX}key_tokens", "Tokens of prompts and outputs, as far as known.", labels=["key"]
    )
    refusals = CounterMetricFamily(
        f"{_PREFIX}key_refusals", "Requests over a limit.", labels=["key", "limit"]
    )
    in_flight = GaugeMetricFamily(
        f"{_PREFIX}key_in_flight", "Requests that wait or run.", labels=["key"]
    )
    for account in proxy.keys or ():
        name = account.record.name
        requests.add_metric([name], account.num_requests)
        tokens.add_metric([name], account.num_tokens)
        in_flight.add_metric([name], account.in_flight)
        for limit, count in account.refused.items():
            refusals.add_metric([name, limit], count)
    yield from (requests, tokens, refusals, in_flight)
