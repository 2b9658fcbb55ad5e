"""Our additions to vLLM's own `/metrics`, read from the engines when Prometheus scrapes.

vLLM 0.32 serves `/metrics` in two ways (`vllm/v1/metrics/prometheus.py`):

* One API server: everything is in prometheus_client's global `REGISTRY`; `register` adds our
  collector to it.
* Several (`--api-server-count`, which sets PROMETHEUS_MULTIPROC_DIR): each scrape makes a fresh
  registry from the processes' shared files, where a collector has no place.  There
  `extend_metrics_route` puts our own `GET /metrics` in place of vLLM's, as an endpoint plugin may:
  it returns vLLM's text followed by ours.  Every API server reads the same sockets, so any of them
  may be the one that is scraped.

Labels are vLLM's: `model_name` and `engine`, the data-parallel rank.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakKeyDictionary

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xllm_plugin.channel.messages import Reading, Snapshot
from xllm_plugin.instance.engines import EngineReader
from xllm_plugin.instance.families import counters, gauges
from xllm_plugin.instance.memory import memory_families
from xllm_plugin.instance.slo_metrics import slo_families

__all__ = [
    "XllmCollector",
    "admission_counter",
    "extend_metrics_route",
    "is_multiprocess",
    "register",
]

logger = logging.getLogger(__name__)

_LABELS = ("model_name", "engine")
Value = Callable[[Snapshot], float]

_GAUGES: dict[str, tuple[str, Value]] = {
    "xllm:num_requests_running": (
        "Requests in the scheduler's running queue.",
        lambda snapshot: snapshot.load.num_running,
    ),
    "xllm:num_requests_waiting": (
        "Requests in the scheduler's waiting queues.",
        lambda snapshot: snapshot.load.num_waiting,
    ),
    "xllm:kv_blocks": (
        "KV-cache blocks that requests can use.",
        lambda snapshot: snapshot.load.num_blocks_total,
    ),
    "xllm:kv_blocks_free": (
        "KV-cache blocks that are free, cached but unused ones included.",
        lambda snapshot: snapshot.load.num_blocks_free,
    ),
    "xllm:kv_cache_usage_ratio": (
        "Share of KV-cache blocks in use, 0 to 1.",
        lambda snapshot: snapshot.load.kv_usage,
    ),
    "xllm:last_step_tokens": (
        "Tokens scheduled in the last step.",
        lambda snapshot: snapshot.load.num_scheduled_tokens,
    ),
    "xllm:last_step_seconds": (
        "Duration of the last step, measured in the worker.",
        lambda snapshot: snapshot.load.last_step_ms / 1000,
    ),
    "xllm:smoothed_step_seconds": (
        "Duration of a step, exponentially smoothed, measured in the worker.",
        lambda snapshot: snapshot.load.smoothed_step_ms / 1000,
    ),
}
_COUNTERS: dict[str, tuple[str, Value]] = {
    "xllm:steps": (
        "Steps the engine has taken.",
        lambda snapshot: snapshot.load.num_steps,
    ),
    "xllm:generated_tokens": (
        "Tokens the engine has generated.",
        lambda snapshot: snapshot.load.num_generated_tokens,
    ),
    "xllm:preemptions": (
        "Running requests that had to give up their KV blocks.",
        lambda snapshot: snapshot.load.num_preemptions,
    ),
}


class XllmCollector(Collector):
    """Turns one reading of all engines into metric families, at each scrape.

    An engine that does not answer in time keeps its last known figures; `xllm:engine_up` says 0
    and `xllm:snapshot_age_seconds` how old they are.  (The age also grows while an engine is idle,
    with `xllm:engine_up` at 1: there is nothing new to say.)  On an event loop (vLLM mounts a
    second, asynchronous `/metrics/`) nothing is asked, since asking may wait.
    """

    def __init__(self, reader: EngineReader, model_name: str) -> None:
        self._reader = reader
        self._model_name = model_name
        self._turn = threading.Lock()  # scrapes come from a thread pool

    def describe(self) -> Iterable[Metric]:
        """The names alone, for the registry's check for duplicates."""
        return _families(())

    def collect(self) -> Iterator[Metric]:
        """The families of now."""
        return _families(self._labelled(self._read()))

    def close(self) -> None:
        """Drop the connections to the engines."""
        with self._turn:
            self._reader.close()

    def _read(self) -> tuple[Reading, ...]:
        if _on_event_loop():
            return self._reader.recall()
        with self._turn:
            return self._reader.read()

    def _labelled(self, readings: Iterable[Reading]) -> tuple[tuple[list[str], Reading], ...]:
        return tuple(([self._model_name, str(reading.dp_rank)], reading) for reading in readings)


def _families(readings: tuple[tuple[list[str], Reading], ...]) -> Iterator[Metric]:
    up = GaugeMetricFamily("xllm:engine_up", "1 if the engine answered.", labels=_LABELS)
    age = GaugeMetricFamily(
        "xllm:snapshot_age_seconds", "Age of the figures shown for this engine.", labels=_LABELS
    )
    for labels, reading in readings:
        up.add_metric(labels, float(reading.error is None))
        if reading.age_s is not None:
            age.add_metric(labels, reading.age_s)
    yield up
    yield age
    known = [(labels, reading.snapshot) for labels, reading in readings if reading.snapshot]
    yield from gauges(_GAUGES, known, _LABELS)
    yield from counters(_COUNTERS, known, _LABELS)
    yield from slo_families(known, _LABELS)
    yield from memory_families(known, _LABELS)


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# The registries are prometheus_client's, process-wide, and do not tell what they hold.
_registered: WeakKeyDictionary[CollectorRegistry, XllmCollector] = WeakKeyDictionary()


def register(collector: XllmCollector, registry: CollectorRegistry) -> None:
    """Put `collector` into `registry`, in place of an earlier one of ours."""
    previous = _registered.pop(registry, None)
    if previous is not None:
        registry.unregister(previous)
        previous.close()
    registry.register(collector)
    _registered[registry] = collector


_admissions: WeakKeyDictionary[CollectorRegistry, Counter] = WeakKeyDictionary()


def admission_counter(registry: CollectorRegistry) -> Counter:
    """Decisions of this process, in `registry`; the same counter for the same registry.

    With several API servers prometheus_client keeps the values in the processes' shared files, from
    where vLLM's text has them all; another copy in ours would be counted twice.
    """
    if registry not in _admissions:
        _admissions[registry] = Counter(
            "xllm:admissions",
            "Requests that admission has decided on.",
            ("service_class", "outcome"),
            registry=None if is_multiprocess() else registry,
        )
    return _admissions[registry]


def is_multiprocess() -> bool:
    """Whether `/metrics` is made from several processes' files instead of a registry."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def extend_metrics_route(app: FastAPI, registry: CollectorRegistry) -> None:
    """Let `GET /metrics` of `app` answer with vLLM's text followed by that of `registry`.

    Without such a route in `app` (another vLLM version) it logs one line and changes nothing.
    """
    theirs = next((r for r in app.routes if isinstance(r, APIRoute) and r.path == "/metrics"), None)
    if theirs is None or inspect.iscoroutinefunction(theirs.endpoint):
        logger.warning(
            "/metrics of this vLLM is not the route that xllm-plugin knows: the xllm:* metrics are "
            "absent when several API servers run. GET /xllm/snapshot has the same figures."
        )
        return
    stock = theirs.endpoint

    async def metrics(request: Request) -> Response:
        """Prometheus metrics of vLLM and of xllm-plugin."""
        response: Response = await run_in_threadpool(stock, request)
        ours = await run_in_threadpool(generate_latest, registry)
        return Response(bytes(response.body) + ours, media_type=response.headers["content-type"])

    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=theirs.response_class)
