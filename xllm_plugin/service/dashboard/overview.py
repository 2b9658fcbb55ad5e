"""What the page shows, as one JSON object; also for other programs that watch the service."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any, Final

import xllm_plugin
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.kv_index.subscriber import State as KvState
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.telemetry import Sample, quantile_ms

__all__ = ["degradations", "overview"]

_NUM_DECISIONS: Final = 50


def overview(proxy: Proxy, since: int) -> dict[str, Any]:
    """The state of now, and the history from its sample number `since` on.

    Numbers count from the start of the service; `next` is the one to ask for the next time.
    """
    telemetry, router = proxy.telemetry, proxy.router
    now_s = proxy.fleet.clock()
    decisions = islice(reversed(router.decisions), _NUM_DECISIONS)
    return {
        "version": xllm_plugin.__version__,
        "started_unix_s": round(telemetry.started_unix_s, 1),
        "unix_s": round(time.time(), 1),
        "policy": router.policy.name,
        "slo": telemetry.slo.model_dump(),
        "is_draining": proxy.is_draining,
        "clients": proxy.num_clients,
        "degraded": degradations(proxy),
        "instances": [_described(proxy, one, now_s) for one in proxy.fleet],
        "history": _history(proxy, since),
        "outcomes": {outcome.value: count for outcome, count in telemetry.outcomes.items()},
        "causes": [
            {"policy": policy, "cause": cause, "count": count}
            for (policy, cause), count in router.causes.items()
        ],
        "decisions": [decision.described() for decision in decisions],
    }


def degradations(proxy: Proxy) -> list[dict[str, str]]:
    """What the service goes on without: which part, of whom, and why."""
    fleet, directory = proxy.fleet, proxy.directory
    found = [_trouble(part, "", why) for part, why in fleet.troubles.items()]
    if not any(one.life.state is State.READY for one in fleet):
        known = sum(1 for _ in fleet)
        found.append(_trouble("instances", "", f"none of {known} is ready"))
    for instance in fleet:
        life = instance.life
        if life.state is State.SUSPECT:
            found.append(_trouble("instance", instance.name, f"suspect: {life.reason}"))
        for rank in directory.describe(instance) if directory else ():
            if rank["state"] == KvState.DEGRADED:
                why = f"rank {rank['dp_rank']}: {rank['reason']}"
                found.append(_trouble("kv_index", instance.name, why))
    if proxy.is_draining:
        found.append(_trouble("service", "", "draining: it takes no new connection"))
    return found


def _trouble(part: str, instance: str, why: str) -> dict[str, str]:
    return {"part": part, "instance": instance, "why": why}


def _history(proxy: Proxy, since: int) -> dict[str, Any]:
    telemetry = proxy.telemetry
    if not 0 <= since <= telemetry.num_taken:  # of the service before a restart
        since = 0
    num_new = telemetry.num_taken - since
    skipped = max(0, len(telemetry.samples) - num_new)
    return {
        "max_samples": telemetry.samples.maxlen,
        "next": telemetry.num_taken,
        "columns": Sample._fields,
        "samples": list(islice(telemetry.samples, skipped, None)),
    }


def _described(proxy: Proxy, instance: Instance, now_s: float) -> dict[str, Any]:
    life, queue, stats = instance.life, instance.queue, instance.stats
    ranks = proxy.directory.describe(instance) if proxy.directory else []
    return {
        "name": instance.name,
        "role": instance.entry.role.value,
        "state": life.state.value,
        "reason": life.reason,
        "state_age_s": round(now_s - life.since_s, 1),
        "models": sorted(instance.models),
        "in_flight": instance.in_flight,
        "running": queue.num_running if queue else None,
        "waiting": queue.num_waiting if queue else None,
        "kv_usage": round(queue.kv_usage, 4) if queue else None,
        "kv_index": [rank["state"] for rank in ranks],
        "ttft_p50_ms": quantile_ms(stats.ttft, 0.5),
        "ttft_p90_ms": quantile_ms(stats.ttft, 0.9),
        "tpot_p50_ms": quantile_ms(stats.tpot, 0.5),
        "tpot_p90_ms": quantile_ms(stats.tpot, 0.9),
        "errors": sum(stats.errors.values()),
        "retries": stats.retries,
        "resumes": stats.resumes,
        "hedges": sum(stats.hedges.values()),
        "hedges_won": stats.hedges.get("won", 0),
    }
