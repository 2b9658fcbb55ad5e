"""The service of several processes: this one controls, its workers carry the traffic."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import aiohttp

from xllm_plugin.service import lifecycle
from xllm_plugin.service.app import Service
from xllm_plugin.service.carrier import Carrier, MakePool, opened
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.lifecycle import Timings
from xllm_plugin.service.processes import limits
from xllm_plugin.service.processes.limits import ControlKeyRing
from xllm_plugin.service.processes.messages import (
    CutOff,
    Drain,
    Failure,
    FleetNews,
    FromWorker,
    Owner,
    OwnerAnswer,
    OwnerQuestion,
    Ready,
    Report,
    Settings,
    Start,
    sections_of,
)
from xllm_plugin.service.processes.news import LOAD_WORDS, Audience, ControlFleet
from xllm_plugin.service.processes.shared import MAX_INSTANCES, MAX_KEYS, SharedMemory
from xllm_plugin.service.processes.slots import Ledger, Slots
from xllm_plugin.service.processes.summary import ControlProxy
from xllm_plugin.service.processes.supervisor import Link, Supervisor
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.router import Router

__all__ = ["ControlService"]

logger = logging.getLogger(__name__)

_NEWS_S = 0.25
_TICK_S = 1.0
_MAX_UNSENT_BYTES = 2**20
"""A worker that takes nothing in is told what it missed when it does again."""
_SETTLE_S = 0.002
"""What a worker has said before it answered its client is read by then."""


class ControlService(Service):
    """As `Service`, with `service.processes` workers.

    Args:
        config: in force at the start.
        load: reads the settings again, for `reload`; raises `ConfigError`.
    """

    fleet: ControlFleet
    proxy: ControlProxy

    def reload(self) -> None:
        """Take new settings, here and at all workers; wrong ones change nothing."""
        before = self.config
        super().reload()
        if self.config is not before:
            for link in self._supervisor.links:
                link.say(self._settings(link))

    # -- other than in one process --------------------------------------------------------------

    def _make_carrier(self) -> Carrier:
        num_workers = self.config.service.processes
        self._loop = asyncio.get_running_loop()
        self._memory = memory = SharedMemory(num_workers)
        self._stack.callback(memory.close)
        self._ledger = Ledger()
        self._slots = Slots(
            MAX_INSTANCES,
            lambda slot: memory.instances.is_idle(slot, LOAD_WORDS),
            "instances",
            self._ledger,
        )
        self._key_slots = Slots(
            MAX_KEYS,
            lambda slot: memory.keys.is_idle(slot, (limits.IN_FLIGHT,)),
            "API keys",
            self._ledger,
        )
        self._audiences: dict[int, Audience] = {}
        """Of workers that were told something."""
        self._publishing: asyncio.Handle | None = None
        self._has_new_keys = False
        self._supervisor = Supervisor(
            num_workers,
            memory.descriptor,
            greet=self._greet,
            received=self._take,
            lost=self._lose,
        )
        return Carrier(self.config, make_fleet=self._make_fleet, make_proxy=self._make_proxy)

    def _prepare(self, session: aiohttp.ClientSession) -> None:
        """Workers make what traffic needs."""

    async def _open_public(self) -> int:
        listen = self.config.listen
        for shares in (False, True):
            # First alone: another service whose workers share this port would share it with ours.
            opening = self._loop.create_server(
                asyncio.Protocol,
                listen.host,
                listen.port,
                reuse_port=shares,
                start_serving=False,
            )
            server = await opened(opening, "listen", listen.host, listen.port)
            if not shares:
                server.close()
                await server.wait_closed()
        self._stack.callback(server.close)  # held, so that the port is ours between two workers
        self.port = server.sockets[0].getsockname()[1]
        await self._supervisor.start()
        logger.info("%d workers carry the traffic", len(self._supervisor.links))
        if self.config.flow.enabled:
            logger.info("each has its part of what flow control lets wait, and lets in")
        return self.port

    async def _beside(self) -> None:
        next_tick_s = 0.0
        while True:
            if self._loop.time() >= next_tick_s:
                next_tick_s = self._loop.time() + _TICK_S
                self.fleet.tick()
                if self.proxy.keys is not None:
                    self.proxy.keys.refresh()
                self._say_trouble()
            self._publish()
            await asyncio.sleep(_NEWS_S)

    async def _drain(self, timeout_s: float) -> None:
        self.proxy.is_draining = True
        await self._supervisor.stop(Drain(), timeout_s)

    def _make_fleet(self, timings: Timings, make_pool: MakePool) -> Fleet:
        return ControlFleet(
            timings,
            make_pool,
            loads=self._memory.instances,
            slots=self._slots,
            changed=self._publish_soon,
        )

    def _make_proxy(self, config: ServiceConfig, fleet: Fleet, router: Router) -> Proxy:
        return ControlProxy(
            config,
            fleet,
            router,
            num_workers=config.service.processes,
            make_keys=self._make_keys,
            cut_off=lambda: self._supervisor.say(CutOff()),
        )

    def _make_keys(self, path: Path, num_replicas: int) -> ControlKeyRing:
        return ControlKeyRing(
            path,
            num_replicas,
            self._loop.time,
            table=self._memory.keys,
            slots=self._key_slots,
            changed=self._keys_changed,
        )

    # -- to the workers -------------------------------------------------------------------------

    def _greet(self, link: Link) -> None:
        self._audiences[link.index] = audience = Audience()
        news = audience.news(self.fleet) or FleetNews(0)
        settings = self._settings(link)
        news.number = self._ledger.sent(link.index)
        num_workers = len(self._supervisor.links)
        link.say(Start(link.index, num_workers, self.port, settings, news))

    def _settings(self, link: Link) -> Settings:
        ring = self.proxy.keys
        keys = None
        if isinstance(ring, ControlKeyRing):
            keys = ring.news(self._ledger.sent(link.index))
        return Settings(sections_of(self.config), keys)

    def _keys_changed(self) -> None:
        self._has_new_keys = True
        self._publish_soon()

    def _publish_soon(self) -> None:
        if self._publishing is None:
            self._publishing = self._loop.call_soon(self._publish)

    def _publish(self) -> None:
        """Tell every worker what it does not know yet."""
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        ring, has_new_keys = self.proxy.keys, self._has_new_keys
        self._has_new_keys = False
        is_told = True
        for link in self._supervisor.links:
            audience = self._audiences.get(link.index)
            if audience is None:
                continue
            if has_new_keys and isinstance(ring, ControlKeyRing):
                link.say(ring.news(self._ledger.sent(link.index)))
            if link.num_unsent_bytes > _MAX_UNSENT_BYTES:
                is_told = False
                continue
            news = audience.news(self.fleet)
            if news is not None:
                news.number = self._ledger.sent(link.index)
                link.say(news)
        if is_told:
            self.fleet.last_lives.clear()

    # -- from the workers -----------------------------------------------------------------------

    def _take(self, link: Link, message: FromWorker) -> None:
        match message:
            case Report():
                self._ledger.taken(link.index, message.fleet_number)
                self.proxy.take(link.index, message)
            case Ready():
                logger.info("worker %d (pid %d) is up", link.index, link.pid)
                self._show(link)
            case Failure():
                self._failed(link, message)
            case Owner():
                instance = Fleet.get(self.fleet, message.name)
                if instance is not None:
                    self.router.remember_owner(message.response_id, instance)
            case OwnerQuestion():
                is_known = bool(self.router.owner_of(message.response_id))
                delay_s = 0.0 if is_known else _SETTLE_S
                self._loop.call_later(delay_s, self._answer, link, message.response_id)

    def _answer(self, link: Link, response_id: str) -> None:
        link.say(OwnerAnswer(response_id, self.router.owner_of(response_id)))

    def _failed(self, link: Link, failure: Failure) -> None:
        instance = Fleet.get(self.fleet, failure.name)
        if instance is not None and instance.life.incarnation == failure.incarnation:
            self.fleet.report(instance, lifecycle.Failed(failure.reason, certain=failure.certain))
        # Whatever came of it replaces what the worker has taken it for.
        self._audiences[link.index].forget(failure.name)
        self._publish_soon()

    def _lose(self, link: Link) -> None:
        self._audiences.pop(link.index, None)
        self._ledger.gone(link.index)
        self._memory.instances.clear(link.index, LOAD_WORDS, self._slots.num_used)
        self._memory.keys.clear(link.index, (limits.IN_FLIGHT,), self._key_slots.num_used)
        self.proxy.lose(link.index)
        self._say_trouble()

    def _show(self, link: Link) -> None:
        figures = self.proxy.workers[link.index]
        figures.is_up, figures.num_restarts = True, link.num_restarts
        self._say_trouble()

    def _say_trouble(self) -> None:
        """Show what is wrong with workers among what the service goes on without."""
        now_s = self._loop.time()
        found = [link.trouble(now_s) for link in self._supervisor.links]
        if any(found) and not self.proxy.is_draining:
            self.fleet.troubles["worker"] = "; ".join(filter(None, found))
        else:
            self.fleet.troubles.pop("worker", None)
