"""Prometheus metrics, read from the fleet's counters when they are asked for.

The hot path adds to plain integers; nothing of prometheus_client runs in it.
The label of an instance's name is `server`: `instance` is Prometheus' own, for what it has scraped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import xllm_plugin
from xllm_plugin.service.dashboard.overview import degradations
from xllm_plugin.service.etcd_registry import EtcdRegistry
from xllm_plugin.service.flow import metrics as flow_metrics
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.process import is_compiled
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.registry import Registrations

__all__ = ["ServiceCollector", "WorkerFigures"]

_PREFIX = "xllm_service_"


@dataclass(slots=True)
class WorkerFigures:
    """One process that carries traffic, by its last report."""

    index: int
    is_up: bool = False
    num_restarts: int = 0
    num_clients: int = 0
    cpu_s: float = 0.0
    resident_bytes: int = 0


class ServiceCollector(Collector):
    """Collects from one proxy, and from the registry if it is shared with other services."""

    def __init__(self, proxy: Proxy, registrations: Registrations | None = None) -> None:
        self._proxy = proxy
        self._registrations = registrations

    def collect(self) -> Iterator[Metric]:
        """Every metric of the service."""
        yield from self._counters()
        yield from self._decisions()
        yield from self._gauges()
        yield from self._instances()
        yield from self._kv_index()
        yield from self._etcd()
        yield from self._latencies()
        yield from self._workers()
        yield from flow_metrics.collect(self._proxy)

    def _counters(self) -> Iterator[Metric]:
        requests = _counter("requests", "Answers of instances.", "server", "status")
        errors = _counter("attempt_errors", "Attempts without a whole answer.", "server", "reason")
        retries = _counter("retries", "Requests that went on to another instance.", "server")
        resumes = _counter("resumes", "Streams that broke and were continued.", "server")
        hedges = _counter("hedges", "Requests asked there too.", "server", "outcome")
        carried = _counter("bytes", "Bytes relayed.", "server", "direction")
        tokens = _counter("output_tokens", "Of answers whose tokens are known.", "server")
        for instance in self._proxy.fleet:
            name, stats = instance.name, instance.stats
            for status, count in stats.answered.items():
                requests.add_metric([name, str(status)], count)
            for reason, count in stats.errors.items():
                errors.add_metric([name, reason], count)
            retries.add_metric([name], stats.retries)
            resumes.add_metric([name], stats.resumes)
            for outcome, count in stats.hedges.items():
                hedges.add_metric([name, outcome], count)
            carried.add_metric([name, "to_instance"], stats.bytes_to)
            carried.add_metric([name, "from_instance"], stats.bytes_from)
            tokens.add_metric([name], stats.output_tokens)
        yield from (requests, errors, retries, resumes, hedges, carried, tokens)

    def _decisions(self) -> Iterator[Metric]:
        refusals = _counter("refusals", "Errors that the service answered with itself.", "status")
        for status, count in self._proxy.refusals.items():
            refusals.add_metric([str(status)], count)
        decisions = _counter("decisions", "Instances chosen, and why.", "policy", "cause")
        for (policy, cause), count in self._proxy.router.causes.items():
            decisions.add_metric([policy, cause], count)
        slo = _counter("slo_requests", "Streams by what became of their targets.", "outcome")
        for outcome, count in self._proxy.telemetry.outcomes.items():
            slo.add_metric([outcome.value], count)
        yield from (refusals, decisions, slo)

    def _gauges(self) -> Iterator[Metric]:
        about = InfoMetricFamily(_PREFIX.rstrip("_"), "Version, build, and policy in force.")
        said = {
            "version": xllm_plugin.__version__,
            "compiled": "yes" if is_compiled() else "no",
            "policy": self._proxy.router.policy.name,
        }
        about.add_metric([], said)
        clients = _gauge("client_connections", "Open connections of clients.")
        clients.add_metric([], self._proxy.num_clients)
        degraded = _gauge("degraded", "1 for each part that the service goes on without.", "part")
        for part in {found["part"] for found in degradations(self._proxy)}:
            degraded.add_metric([part], 1)
        unread = _counter("prompts_unread", "Prompts routed without their tokens, on an error.")
        unread.add_metric([], self._proxy.num_prompts_unread)
        misread = _counter("chats_misread", "Chats not rendered as their instance does (samples).")
        misread.add_metric([], self._proxy.num_chats_misread)
        yield from (about, clients, degraded, unread, misread)

    def _instances(self) -> Iterator[Metric]:
        in_flight = _gauge("in_flight", "Requests dispatched and not finished.", "server")
        tokens = _gauge("outstanding_tokens", "Estimated tokens of these.", "server")
        state = _gauge("instance_state", "1 for the state it is in.", "server", "state")
        running = _gauge("instance_running", "Requests that run, as it said last.", "server")
        waiting = _gauge("instance_waiting", "Requests in its queue, as it said last.", "server")
        kv_usage = _gauge(
            "instance_kv_usage_ratio", "KV cache in use, as it said last, 0 to 1.", "server"
        )
        for instance in self._proxy.fleet:
            name, queue = instance.name, instance.queue
            in_flight.add_metric([name], instance.in_flight)
            tokens.add_metric([name], instance.outstanding_tokens)
            for one in State:
                state.add_metric([name, one.value], instance.life.state is one)
            if queue is not None:
                running.add_metric([name], queue.num_running)
                waiting.add_metric([name], queue.num_waiting)
                kv_usage.add_metric([name], queue.kv_usage)
        yield from (in_flight, tokens, state, running, waiting, kv_usage)

    def _kv_index(self) -> Iterator[Metric]:
        blocks = _gauge("kv_index_blocks", "KV blocks known to be there, in any tier.", "server")
        exact = _gauge("kv_index_exact", "1 if that is all it holds.", "server")
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

    def _latencies(self) -> Iterator[Metric]:
        ttft = _histogram("ttft_seconds", "Of streams: whole request to first bytes of the body.")
        tpot = _histogram("tpot_seconds", "Of streams with known tokens: mean after the first.")
        duration = _histogram("duration_seconds", "Of complete answers: whole request to end.")
        for instance in self._proxy.fleet:
            stats = instance.stats
            pairs = ((ttft, stats.ttft), (tpot, stats.tpot), (duration, stats.duration))
            for family, kept in pairs:
                family.add_metric([instance.name], kept.exposed(), sum_value=kept.sum_s)
        yield from (ttft, tpot, duration)

    def _workers(self) -> Iterator[Metric]:
        up = _gauge("worker_up", "1 while it takes connections.", "worker")
        restarts = _counter("worker_restarts", "Ended, and started again.", "worker")
        clients = _gauge("worker_client_connections", "Open connections of clients.", "worker")
        cpu = _counter("worker_cpu_seconds", "Of the process that runs now.", "worker")
        resident = _gauge("worker_resident_memory_bytes", "Of the same.", "worker")
        for one in self._proxy.workers:
            name = str(one.index)
            up.add_metric([name], one.is_up)
            restarts.add_metric([name], one.num_restarts)
            clients.add_metric([name], one.num_clients)
            cpu.add_metric([name], one.cpu_s)
            resident.add_metric([name], one.resident_bytes)
        yield from (up, restarts, clients, cpu, resident)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(_PREFIX + name, text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, text, labels=labels)


def _histogram(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(_PREFIX + name, text, labels=["server"])
