"""What a worker says of its traffic.

It gives its counters away with each report and begins anew, so what the control process has is the
sum over all workers since the start of the service, those that died included.  What a worker had
counted since its last report is lost with it: a quarter of a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xllm_plugin.service.flow.stats import FlowStats
from xllm_plugin.service.keys import KeyRing
from xllm_plugin.service.processes.messages import KeyUse, QueuePart, Report
from xllm_plugin.service.processes.mirror import MirrorFleet
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.stats import Stats

__all__ = ["Reporter"]

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Reporter:
    """Makes the reports of one worker.

    Args:
        proxy: carries its traffic.
        fleet: its copy.
    """

    def __init__(self, proxy: Proxy, fleet: MirrorFleet) -> None:
        self._proxy = proxy
        self._fleet = fleet
        self._num_unread = 0
        self._num_misread = 0

    def report(self) -> Report:
        """All since the last one."""
        proxy, router, fleet = self._proxy, self._proxy.router, self._fleet
        decisions = [decision.settled() for decision in router.decisions]
        router.decisions.clear()
        causes, router.causes = router.causes, {}
        refusals, proxy.refusals = proxy.refusals, {}
        ttfts, fleet.ttfts = fleet.ttfts, []
        flow, queue = proxy.flow, []
        flow_stats = None
        if flow is not None:
            flow_stats, flow.stats = flow.stats, FlowStats()
            queue = [
                QueuePart(*band, tenant, num_requests, num_bytes)
                for band, tenant, num_requests, num_bytes in flow.statistics()
            ]
        unread, self._num_unread = self._num_unread, proxy.num_prompts_unread
        misread, self._num_misread = self._num_misread, proxy.num_chats_misread
        directory = proxy.directory
        return Report(
            instances=dict(self._stats()),
            measured=proxy.telemetry.take(),
            refusals=refusals,
            decisions=decisions,
            causes=[(policy, cause, count) for (policy, cause), count in causes.items()],
            flow=flow_stats,
            keys=dict(_key_uses(proxy.keys)),
            num_prompts_unread=self._num_unread - unread,
            num_chats_misread=self._num_misread - misread,
            ttfts=ttfts,
            fleet_number=fleet.number,
            num_clients=proxy.num_clients,
            queue=queue,
            kv_index={
                one.name: ranks for one in fleet if directory and (ranks := directory.describe(one))
            },
            idle_connections={one.name: len(one.pool) for one in fleet if len(one.pool)},
            cpu_s=time.process_time(),
            resident_bytes=_resident_bytes(),
        )

    def _stats(self) -> Iterator[tuple[str, Stats]]:
        for instance in self._fleet:
            if not instance.stats.is_empty:
                # In place: streams at an instance that this one replaced count there too.
                yield instance.name, instance.stats.take()


def _key_uses(keys: KeyRing | None) -> Iterator[tuple[str, KeyUse]]:
    for account in keys or ():
        if account.num_requests or account.num_tokens or account.refused:
            use = KeyUse(account.num_requests, account.num_tokens, account.refused)
            account.num_requests, account.num_tokens, account.refused = 0, 0, {}
            yield account.record.name, use


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
