"""The service of several processes: this one controls, its workers carry the traffic."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import aiohttp

from xllm_plugin.service import key_file, lifecycle
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
    Keys,
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
                audience = self._audiences.get(link.index)
                if audience is not None:  # one that starts later is told then
                    link.say(self._settings(audience))

    # -- other than in one process --------------------------------------------------------------

    def _check(self, config: ServiceConfig) -> None:
        super()._check(config)
        path, ring = config.keys.file, self.proxy.keys
        if path is not None and (ring is None or ring.path != path):
            # Until workers know the new ones, both are counted.
            limits.require_room(self._key_slots, path, key_file.read(path))

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
            changed=self._publish_soon,
        )

    # -- to the workers -------------------------------------------------------------------------

    def _greet(self, link: Link) -> None:
        self._audiences[link.index] = audience = Audience()
        settings = self._settings(audience)
        news = audience.news(self.fleet) or FleetNews(0)
        news.number = self._ledger.sent(link.index)
        num_workers = len(self._supervisor.links)
        link.say(Start(link.index, num_workers, self.port, settings, news))

    def _settings(self, audience: Audience) -> Settings:
        audience.has_heard_else = True
        return Settings(sections_of(self.config), self._new_keys(audience, is_whole=True))

    def _new_keys(self, audience: Audience, *, is_whole: bool = False) -> Keys | None:
        """The keys in force, taken as told; None: there are none, or it knows them."""
        ring = self.proxy.keys
        if not isinstance(ring, ControlKeyRing):
            return None
        if audience.edition is ring.edition and not is_whole:
            return None
        audience.edition, audience.has_heard_else = ring.edition, True
        return ring.news()

    def _publish_soon(self) -> None:
        if self._publishing is None:
            self._publishing = self._loop.call_soon(self._publish)

    def _publish(self) -> None:
        """Tell every worker what it does not know yet."""
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        is_told = True
        for link in self._supervisor.links:
            audience = self._audiences.get(link.index)
            if audience is None:
                continue
            if not link.is_heard:  # it is told what it has missed when it takes something in again
                is_told = False
                continue
            new_keys = self._new_keys(audience)
            if new_keys is not None:
                link.say(new_keys)
            news = audience.news(self.fleet)  # after the keys: its number stands for both
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
                instance = self.fleet.get_without_load(message.name)
                if instance is not None:
                    self.router.remember_owner(message.response_id, instance)
            case OwnerQuestion():
                is_known = bool(self.router.owner_of(message.response_id))
                delay_s = 0.0 if is_known else _SETTLE_S
                self._loop.call_later(delay_s, self._answer, link, message.response_id)

    def _answer(self, link: Link, response_id: str) -> None:
        link.say(OwnerAnswer(response_id, self.router.owner_of(response_id)))

    def _failed(self, link: Link, failure: Failure) -> None:
        instance = self.fleet.get_without_load(failure.name)
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
        self.proxy.workers[link.index].is_up = True
        self._say_trouble()

    def _say_trouble(self) -> None:
        """Show what is wrong with workers among what the service goes on without."""
        now_s = self._loop.time()
        found = [link.trouble(now_s) for link in self._supervisor.links]
        for link, figures in zip(self._supervisor.links, self.proxy.workers, strict=True):
            figures.num_restarts = link.num_restarts  # also of one that never comes up
        if any(found) and not self.proxy.is_draining:
            self.fleet.troubles["worker"] = "; ".join(filter(None, found))
        else:
            self.fleet.troubles.pop("worker", None)
