"""Prometheus metrics, read from the fleet's counters when they are asked for.

The hot path adds to plain integers; nothing of prometheus_client runs in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from xllm_plugin.service.etcd_registry import EtcdRegistry
from xllm_plugin.service.fleet import TTFT_BOUNDS_S, Stats
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.registry import Registrations

__all__ = ["ServiceCollector"]

_PREFIX = "xllm_service_"


class ServiceCollector(Collector):
    """Collects from one proxy, and from the registry if it is shared with other services."""

    def __init__(self, proxy: Proxy, registrations: Registrations | None = None) -> None:
        self._proxy = proxy
        self._registrations = registrations

    def collect(self) -> Iterator[Metric]:
        """Every metric of the service."""
        yield from self._counters()
        yield from self._gauges()
        yield from self._kv_index()
        yield from self._etcd()
        yield self._ttft()

    def _counters(self) -> Iterator[Metric]:
        requests = _counter("requests", "Answers of instances.", "instance", "status")
        errors = _counter(
            "attempt_errors", "Attempts without a whole answer.", "instance", "reason"
        )
        retries = _counter("retries", "Requests that went on to another instance.", "instance")
        resumes = _counter("resumes", "Streams that broke and were continued.", "instance")
        carried = _counter("bytes", "Bytes relayed.", "instance", "direction")
        for instance in self._proxy.fleet:
            name, stats = instance.name, instance.stats
            for status, count in stats.answered.items():
                requests.add_metric([name, str(status)], count)
            for reason, count in stats.errors.items():
                errors.add_metric([name, reason], count)
            retries.add_metric([name], stats.retries)
            resumes.add_metric([name], stats.resumes)
            carried.add_metric([name, "to_instance"], stats.bytes_to)
            carried.add_metric([name, "from_instance"], stats.bytes_from)
        refusals = _counter("refusals", "Errors that the service answered with itself.", "status")
        for status, count in self._proxy.refusals.items():
            refusals.add_metric([str(status)], count)
        yield from (requests, errors, retries, resumes, carried, refusals)

    def _gauges(self) -> Iterator[Metric]:
        in_flight = _gauge("in_flight", "Requests dispatched and not finished.", "instance")
        tokens = _gauge("outstanding_tokens", "Estimated tokens of these.", "instance")
        state = _gauge("instance_state", "1 for the state it is in.", "instance", "state")
        for instance in self._proxy.fleet:
            in_flight.add_metric([instance.name], instance.in_flight)
            tokens.add_metric([instance.name], instance.outstanding_tokens)
            for one in State:
                state.add_metric([instance.name, one.value], instance.life.state is one)
        clients = _gauge("client_connections", "Open connections of clients.")
        clients.add_metric([], len(self._proxy.clients))
        yield from (in_flight, tokens, state, clients)

    def _kv_index(self) -> Iterator[Metric]:
        blocks = _gauge("kv_index_blocks", "KV blocks known to be there, in any tier.", "instance")
        exact = _gauge("kv_index_exact", "1 if that is all it holds.", "instance")
        directory = self._proxy.directory
        for instance in self._proxy.fleet:
            ranks = directory.describe(instance) if directory else []
            if directory and ranks:
                blocks.add_metric([instance.name], sum(rank["num_blocks"] for rank in ranks))
                exact.add_metric([instance.name], directory.is_exact(instance))
        yield from (blocks, exact)

    def _etcd(self) -> Iterator[Metric]:
        connected = _gauge("etcd_connected", "1 if etcd answers, 0 if its last known state serves.")
        age = _gauge("etcd_age_seconds", "Since etcd last answered.")
        failures = _counter("etcd_failures", "Reads of etcd that failed.")
        unused = _gauge("etcd_unused_keys", "Keys whose value is no instance or has a taken name.")
        registry = self._registrations
        if isinstance(registry, EtcdRegistry):
            connected.add_metric([], registry.is_connected)
            if registry.age_s is not None:
                age.add_metric([], registry.age_s)
            failures.add_metric([], registry.num_failures)
            unused.add_metric([], registry.num_problems)
        yield from (connected, age, failures, unused)

    def _ttft(self) -> Metric:
        ttft = HistogramMetricFamily(
            f"{_PREFIX}ttft_seconds",
            "From a whole request to the first byte of its answer's body.",
            labels=["instance"],
        )
        for instance in self._proxy.fleet:
            ttft.add_metric(
                [instance.name], _buckets(instance.stats), sum_value=instance.stats.ttft_sum_s
            )
        return ttft


def _buckets(stats: Stats) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in TTFT_BOUNDS_S), "+Inf"]
    return list(zip(bounds, map(float, accumulate(stats.ttft_counts)), strict=True))


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(_PREFIX + name, text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, text, labels=labels)
