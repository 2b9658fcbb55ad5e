"""All workers' traffic as if it were one process's, for the admin port, metrics and dashboard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from xllm_plugin.service.config import FlowConfig, KvIndexConfig, ServiceConfig
from xllm_plugin.service.exchange import Exchange
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.flow.control import FlowControl
from xllm_plugin.service.flow.queue import Band
from xllm_plugin.service.keys import KeyRing
from xllm_plugin.service.kv_index.directory import KvDirectory
from xllm_plugin.service.kv_index.subscriber import State
from xllm_plugin.service.metrics import WorkerFigures
from xllm_plugin.service.processes.limits import ControlKeyRing
from xllm_plugin.service.processes.messages import KeyUse, Report
from xllm_plugin.service.processes.news import ControlFleet
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.router import Router
from xllm_plugin.service.stats import add_counts

__all__ = ["ControlProxy"]

_WORST_FIRST: Final = (State.DEGRADED, State.JOINING, State.LIVE)


class ControlProxy(Proxy):
    """Has no port: what workers report is shown as if its clients had been here.

    Args:
        config: in force.
        fleet: the instances.
        router: has made no choice itself.
        num_workers: that report.
        make_keys: of a path and the number of replicas.
        cut_off: ends the connections of all workers.
    """

    def __init__(
        self,
        config: ServiceConfig,
        fleet: Fleet,
        router: Router,
        *,
        num_workers: int,
        make_keys: Callable[[Path, int], ControlKeyRing],
        cut_off: Callable[[], None],
    ) -> None:
        self.reports: dict[int, Report] = {}
        """Worker -> its last one."""
        self._num_unread = 0
        self._num_misread = 0
        self._make_ring = make_keys
        self._cut_off = cut_off
        assert isinstance(fleet, ControlFleet)
        self._control_fleet = fleet
        super().__init__(config, fleet, router)
        self.workers = [WorkerFigures(index) for index in range(num_workers)]
        self.directory = _ReportedDirectory(fleet, config.kv_index, self.reports)

    @property
    def num_clients(self) -> int:
        """Open connections of clients, of all workers."""
        return sum(report.num_clients for report in self.reports.values())

    @property
    def num_prompts_unread(self) -> int:
        """Prompts routed without their tokens, on an error."""
        return self._num_unread

    @property
    def num_chats_misread(self) -> int:
        """Chats that were rendered otherwise than their instance does."""
        return self._num_misread

    def cut_off(self) -> int:
        """End every connection at once; returns how many there were."""
        self._cut_off()
        return self.num_clients

    def take(self, worker: int, report: Report) -> None:
        """Add up what a worker has counted."""
        for name, stats in report.instances.items():
            instance = self._control_fleet.get_without_load(name)
            if instance is not None:
                instance.stats.add(stats)
        for name, num_tokens, seconds in report.ttfts:
            instance = self._control_fleet.get_without_load(name)
            if instance is not None:
                self._control_fleet.observe_ttft(instance, num_tokens, seconds)
        self.telemetry.add(report.measured)
        add_counts(self.refusals, report.refusals)
        self.router.decisions.extend(report.decisions)
        for policy, cause, count in report.causes:
            self.router.count_cause(policy, cause, count)
        if report.flow is not None and self.flow is not None:
            self.flow.stats.add(report.flow)
        self._take_keys(report.keys)
        self._num_unread += report.num_prompts_unread
        self._num_misread += report.num_chats_misread
        figures = self.workers[worker]
        figures.num_clients = report.num_clients
        figures.cpu_s = report.cpu_s
        figures.resident_bytes = report.resident_bytes
        self.reports[worker] = report
        for instance in self._control_fleet.all_without_load():
            instance.num_idle_elsewhere = sum(
                one.idle_connections.get(instance.name, 0) for one in self.reports.values()
            )

    def lose(self, worker: int) -> None:
        """A worker has ended; what it had open is gone."""
        self.reports.pop(worker, None)
        self.workers[worker].num_clients = 0
        self.workers[worker].is_up = False

    def _take_keys(self, uses: dict[str, KeyUse]) -> None:
        if not uses or not isinstance(self.keys, ControlKeyRing):
            return
        accounts = self.keys.by_name()
        for name, use in uses.items():
            account = accounts.get(name)
            if account is not None:
                account.num_requests += use.num_requests
                account.num_tokens += use.num_tokens
                add_counts(account.refused, use.refused)

    def _make_flow(self, config: FlowConfig, retry_after_s: float) -> FlowControl:
        return _ReportedFlow(config, self.fleet, self._send, retry_after_s, reports=self.reports)

    def _reconfigure_keys(self, config: ServiceConfig) -> None:
        before = self.keys
        super()._reconfigure_keys(config)
        if isinstance(before, ControlKeyRing) and before is not self.keys:
            before.make_room(self.keys)

    def _make_keys(self, path: Path, num_replicas: int) -> KeyRing:
        return self._make_ring(path, num_replicas)


class _ReportedFlow(FlowControl):
    """Holds nothing itself."""

    def __init__(
        self,
        config: FlowConfig,
        fleet: Fleet,
        send: Callable[[Exchange], None],
        retry_after_s: float,
        *,
        reports: dict[int, Report],
    ) -> None:
        super().__init__(config, fleet, send, retry_after_s)
        self._reports = reports

    def statistics(self) -> list[tuple[Band, str, int, int]]:
        """(Band, tenant, requests, bytes) of all that waits anywhere, the first band first."""
        found: dict[tuple[Band, str], list[int]] = {}
        for part in (one for report in self._reports.values() for one in report.queue):
            key = Band(part.is_offline, part.priority), part.tenant
            sums = found.setdefault(key, [0, 0])
            sums[0] += part.num_requests
            sums[1] += part.num_bytes
        return [
            (band, tenant, num_requests, num_bytes)
            for (band, tenant), (num_requests, num_bytes) in sorted(found.items())
        ]


class _ReportedDirectory(KvDirectory):
    """Follows nobody itself.

    Each worker follows all ranks; of one that they do not all know equally well the worst is shown.
    """

    def __init__(self, fleet: Fleet, config: KvIndexConfig, reports: dict[int, Report]) -> None:
        super().__init__(fleet, config)
        self._reports = reports

    def describe(self, instance: Instance) -> list[dict[str, Any]]:
        """What is known of an instance's ranks, for people."""
        worst: dict[int, dict[str, Any]] = {}
        for rank in self._ranks(instance):
            known = worst.setdefault(rank["dp_rank"], rank)
            if _badness(rank) < _badness(known):
                worst[rank["dp_rank"]] = rank
        return [worst[number] for number in sorted(worst)]

    def is_exact(self, instance: Instance) -> bool:
        """Whether all that it holds is known, at every worker."""
        ranks = list(self._ranks(instance))
        return bool(ranks) and all(rank["state"] == State.LIVE for rank in ranks)

    def _ranks(self, instance: Instance) -> Iterable[dict[str, Any]]:
        for report in self._reports.values():
            yield from report.kv_index.get(instance.name, ())


def _badness(rank: dict[str, Any]) -> int:
    return _WORST_FIRST.index(State(rank["state"]))
