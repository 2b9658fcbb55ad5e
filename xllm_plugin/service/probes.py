"""Asks instances how they are by `/health`, `/v1/models` and `/metrics`, as vLLM has them.

Who sends heartbeats is not asked for figures; who sends them elsewhere is, by `/xllm/load`.  A
server without this plugin is asked once a start whether it has vLLM's scale-out routes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from typing import Any

import aiohttp

from xllm_plugin.registration import Heartbeat, KvEventSource, Load
from xllm_plugin.service import lifecycle
from xllm_plugin.service.answers import authorization, read_at_most
from xllm_plugin.service.config import InstancesConfig
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.scale_out.server import GENERATE_PATH

__all__ = ["Prober", "read_metrics"]

logger = logging.getLogger(__name__)

_MODELS_EVERY = 10
_METRICS_EVERY = 3
_USAGE = "vllm:kv_cache_usage_perc"
_OURS = "xllm:engine_up"
"""Only servers with this plugin have it."""
_LOAD_EVERY = 2
_SCALE_OUT_PATHS = (GENERATE_PATH, "/v1/completions/derender")
"""Asked with an empty object, which is no request to either: no engine hears of it."""
_NO_REQUEST = (400, 422)
_NO_ROUTE = (403, 404, 405, 501)
_MAX_ANSWER_BYTES = 16 * 2**20
_METRIC = re.compile(
    r"^(vllm:num_requests_running|vllm:num_requests_waiting|vllm:kv_cache_usage_perc"
    r"|vllm:inter_token_latency_seconds_(?:sum|count)|process_start_time_seconds|xllm:engine_up)"
    r"(?:\{[^\n]*\})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)


def read_metrics(text: str) -> dict[str, float]:
    """The figures that we use out of an exposition, summed over engines; the KV usage is a mean.

    Raises:
        ValueError: one is no number, or not finite.
    """
    found: dict[str, float] = {}
    num_usages = 0
    for name, value in _METRIC.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
        if not math.isfinite(found[name]):
            raise ValueError(f"/metrics says {name} {value}")
        num_usages += name == _USAGE
    if num_usages:
        found[_USAGE] /= num_usages
    return found


def _mean_since(before: dict[str, float], now: dict[str, float], name: str) -> float | None:
    """Mean of a histogram's observations between two readings; None if there were none."""
    count, total = (
        now.get(f"{name}_{part}", 0.0) - before.get(f"{name}_{part}", 0.0)
        for part in ("count", "sum")
    )
    return total / count if before and count > 0 and total >= 0 else None


class Prober:
    """Probes every instance, each on its own beat, so that a slow one delays no other."""

    def __init__(
        self, fleet: Fleet, session: aiohttp.ClientSession, config: InstancesConfig
    ) -> None:
        self.config = config
        self._fleet = fleet
        self._session = session
        self._running: dict[Instance, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Follow the fleet until cancelled."""
        try:
            while True:
                known = set(self._fleet)
                for instance in known - self._running.keys():
                    self._running[instance] = asyncio.create_task(self._follow(instance))
                for instance in self._running.keys() - known:
                    self._running.pop(instance).cancel()
                for task in self._running.values():
                    if task.done():
                        task.result()  # it never ends but by a fault of ours: raise that here
                await asyncio.sleep(min(0.1, self.config.probe_interval_s))
        finally:
            for task in self._running.values():
                task.cancel()

    async def probe(self, instance: Instance, *, models: bool, metrics: bool) -> bool:
        """Ask once and report what came of it; returns whether the instance is well."""
        try:
            async with asyncio.timeout(self.config.probe_timeout_s):
                await self._get(instance, "/health")
                if metrics and not (_is_mirrored(instance) and await self._take_load(instance)):
                    found = await self._figures(instance)
                    # A heartbeat that came meanwhile is newer.
                    if instance.load is None or _is_mirrored(instance):
                        self._take_figures(instance, found)
                if models or not instance.models:
                    self._take_models(instance, await self._get(instance, "/v1/models"))
                    if not instance.entry.kv_events:
                        instance.kv_events = await self._kv_events(instance)
                    if not instance.resumes and instance.scales_out is None:
                        instance.scales_out = await self._scales_out(instance)
        # RecursionError is what `json` makes of thousands of brackets.
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            reason = str(error) or f"no answer within {self.config.probe_timeout_s:g} s"
            self._fleet.report(instance, lifecycle.Failed(f"probe: {reason}"))
            return False
        life = instance.life
        self._fleet.report(instance, lifecycle.Alive(life.incarnation, renews=not life.leased))
        return True

    async def _follow(self, instance: Instance) -> None:
        number = 0
        was_well = False
        while True:
            # Who comes back may be another: its metrics tell, and come before it gets requests.
            if _is_mirrored(instance):
                metrics = not was_well or number % _LOAD_EVERY == 0
            else:
                is_due = not was_well or number % _METRICS_EVERY == 0
                metrics = is_due and instance.load is None
            models = number % _MODELS_EVERY == 0
            was_well = await self.probe(instance, models=models, metrics=metrics)
            number += 1
            await asyncio.sleep(self.config.probe_interval_s)

    async def _kv_events(self, instance: Instance) -> tuple[KvEventSource, ...]:
        """Where a server publishes KV events, as vLLM since 0.32 says itself."""
        try:
            found = json.loads(await self._get(instance, "/kv_event_sources"))
            return tuple(
                KvEventSource.model_validate(
                    {
                        "dp_rank": rank,
                        "topic": config["topic"],
                        "endpoint": _reachable(config["endpoint"], instance),
                        "replay_endpoint": _reachable(config["replay_endpoint"], instance),
                    }
                )
                for rank, config in sorted(found.items())
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return ()  # an older server has no such route

    async def _scales_out(self, instance: Instance) -> bool | None:
        """Whether it has the routes of `--enable-scale-out`; None: it does not say."""
        found = [await self._status(instance, path) for path in _SCALE_OUT_PATHS]
        if all(status in _NO_REQUEST for status in found):
            return True
        return False if any(status in _NO_ROUTE for status in found) else None

    async def _status(self, instance: Instance, path: str) -> int:
        """Of an answer to an empty object; 0 if there is none."""
        url = instance.entry.url.rstrip("/") + path
        timeout = aiohttp.ClientTimeout(total=self.config.probe_timeout_s / 4)
        try:
            async with self._session.post(
                url,
                json={},
                headers=authorization(self.config),
                allow_redirects=False,
                timeout=timeout,
            ) as reply:
                return reply.status
        except (aiohttp.ClientError, OSError):
            return 0  # whether it is well is what the other probes find out

    async def _get(self, instance: Instance, path: str) -> bytes:
        url, headers = instance.entry.url.rstrip("/") + path, authorization(self.config)
        async with self._session.get(url, headers=headers, allow_redirects=False) as reply:
            if reply.status != 200:  # noqa: PLR2004
                raise ValueError(f"{path} answers {reply.status}")
            return await read_at_most(reply, _MAX_ANSWER_BYTES, path)

    async def _take_load(self, instance: Instance) -> bool:
        """Ask for the heartbeat that goes elsewhere; returns whether there is one."""
        try:
            beat = Heartbeat.model_validate_json(await self._get(instance, "/xllm/load"))
        except ValueError:
            return False  # no server of ours, or not the process that sends heartbeats
        if beat.load is None or beat.incarnation != instance.life.incarnation:
            return False
        # Beats are rarer than this is asked: one is learned from once.
        is_new = beat.load != instance.load
        instance.load = beat.load
        taken = beat.load if is_new else beat.load.model_copy(update={"tpot_s": None})
        self._fleet.set_load(instance, taken)
        return True

    def _take_models(self, instance: Instance, body: bytes) -> None:
        records = json.loads(body)
        if not isinstance(records, dict) or not isinstance(records.get("data"), list):
            raise ValueError("/v1/models is not a list of models")  # noqa: TRY004 - its value
        models: dict[str, dict[str, Any]] = {
            record["id"]: record
            for record in records["data"]
            if isinstance(record, dict) and isinstance(record.get("id"), str)
        }
        if not models:
            raise ValueError("/v1/models names no model")
        self._fleet.set_models(instance, models)

    async def _figures(self, instance: Instance) -> dict[str, float]:
        """What its /metrics says; nothing if it has none to read: it serves for all that."""
        fault = ""
        found: dict[str, float] = {}
        try:
            found = read_metrics((await self._get(instance, "/metrics")).decode("utf-8", "replace"))
        except ValueError as error:
            fault = str(error)
        if fault != instance.metrics_fault:
            says = f"routed by what passes here alone: {fault}" if fault else "has figures now"
            logger.warning("instance %s: %s", instance.name, says)
        instance.metrics_fault = fault
        return found

    def _take_figures(self, instance: Instance, found: dict[str, float]) -> None:
        started = found.get("process_start_time_seconds")
        if started is not None and not instance.has_incarnation:
            # A plain server says no incarnation; the start of its process is one.
            self._fleet.report(instance, lifecycle.Registered(f"{started:.2f}"))
        instance.resumes = instance.has_incarnation or _OURS in found
        before, instance.reported = instance.reported, found
        self._fleet.set_load(
            instance,
            Load(
                num_running=round(found.get("vllm:num_requests_running", 0)),
                num_waiting=round(found.get("vllm:num_requests_waiting", 0)),
                tpot_s=_mean_since(before, found, "vllm:inter_token_latency_seconds"),
            ),
        )


def _is_mirrored(instance: Instance) -> bool:
    """Whether it sends its heartbeats to somebody else (etcd, another service)."""
    return instance.has_incarnation and not instance.life.leased


def _reachable(endpoint: str | None, instance: Instance) -> str | None:
    """A publisher that listens on every address is reached on the server's."""
    return endpoint.replace("*", instance.entry.host) if endpoint else None
