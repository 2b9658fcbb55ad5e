"""The public port of one worker (`worker.py`), and its part of what all may hold and send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_plugin.service.config import FlowConfig, ServiceConfig
from xllm_plugin.service.exchange import Exchange
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.flow.control import FlowControl
from xllm_plugin.service.keys import KeyRing
from xllm_plugin.service.processes.limits import WorkerKeyRing
from xllm_plugin.service.processes.news import IN_FLIGHT
from xllm_plugin.service.processes.shared import CounterTable
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.router import Router

if TYPE_CHECKING:
    from xllm_plugin.service.processes.worker import Worker

__all__ = ["WorkerFlow", "WorkerProxy", "part_of"]


def part_of(config: FlowConfig, num_workers: int) -> FlowConfig:
    """What one of `num_workers` may hold, and send to an instance at a time."""
    return config.model_copy(
        update={
            "num_replicas": config.num_replicas * num_workers,
            "max_queued_requests": max(1, config.max_queued_requests // num_workers),
            "max_queued_bytes": max(1, config.max_queued_bytes // num_workers),
        }
    )


class WorkerFlow(FlowControl):
    """Holds requests back while this worker's part of the instances' room is used up.

    Parts, not one room for all: who gets a place that becomes free is then decided where the
    requests wait, and no worker can starve another.
    """

    def __init__(
        self,
        config: FlowConfig,
        fleet: Fleet,
        send: Callable[[Exchange], None],
        retry_after_s: float,
        *,
        loads: CounterTable,
    ) -> None:
        super().__init__(config, fleet, send, retry_after_s)
        self._loads = loads

    def _num_sent(self, instance: Instance) -> int:
        return self._loads.own(instance.slot, IN_FLIGHT)


class WorkerProxy(Proxy):
    """The public port of one worker.

    Args:
        config: in force.
        fleet: its copy.
        router: chooses among it.
        worker: whose it is.
    """

    def __init__(self, config: ServiceConfig, fleet: Fleet, router: Router, worker: Worker) -> None:
        self._worker = worker
        super().__init__(config, fleet, router)

    def dispatch(self, exchange: Exchange) -> None:
        """Send a request on its way; who has made its response may have to be asked first."""
        if exchange.response_id and not self.router.owner_of(exchange.response_id):
            task = self.loop.create_task(self._ask_and_dispatch(exchange))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
            return
        super().dispatch(exchange)

    async def _ask_and_dispatch(self, exchange: Exchange) -> None:
        name = await self._worker.owner_of(exchange.response_id)
        owner = self.fleet.get(name)
        if owner is not None:
            self.router.remember_owner(exchange.response_id, owner)
        if not exchange.is_done:
            super().dispatch(exchange)

    def reconfigure(self, config: ServiceConfig) -> None:
        """Take new settings, and this worker's part of what all of them may hold."""
        super().reconfigure(config)
        limits = config.limits
        part = limits.max_total_body_bytes // self._worker.num_workers
        self.bodies.max_bytes = max(limits.max_body_bytes, part)

    def _reconfigure_flow(self, config: ServiceConfig) -> None:
        flow = part_of(config.flow, self._worker.num_workers)
        super()._reconfigure_flow(config.model_copy(update={"flow": flow}))

    def _make_flow(self, config: FlowConfig, retry_after_s: float) -> FlowControl:
        loads = self._worker.memory.instances
        return WorkerFlow(config, self.fleet, self._send, retry_after_s, loads=loads)

    def _make_keys(self, path: Path, num_replicas: int) -> KeyRing:
        del num_replicas  # in the message
        keys, memory = self._worker.keys, self._worker.memory
        assert keys is not None
        return WorkerKeyRing(path, self.loop.time, memory.keys, keys)
