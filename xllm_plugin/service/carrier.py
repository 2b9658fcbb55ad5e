"""What carries traffic: the fleet, the router, the public port and all that requests need.

One in every process of the service.  In one that only controls others its port stays closed.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp

from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.plugins import manager_here, routing_policies
from xllm_plugin.service.config import InstanceEntry, ServiceConfig
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.kv_index.directory import KvDirectory
from xllm_plugin.service.kv_index.tokens import PromptReader
from xllm_plugin.service.lifecycle import Timings
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.router import Router
from xllm_plugin.service.scale_out.resumer import Resumer
from xllm_plugin.service.tls import PortTls
from xllm_plugin.service.tracing import Tracing, exporting_provider
from xllm_plugin.service.upstream import Pool
from xllm_plugin.tls import ClientFiles

__all__ = ["Carrier", "MakePool", "chosen_policy", "opened", "said"]

logger = logging.getLogger(__name__)

MakePool = Callable[[InstanceEntry], Pool]


def chosen_policy(name: str) -> RoutingPolicy:
    """The policy of that name.  Raises `ConfigError` with the names that there are."""
    policies = routing_policies(manager_here())
    if name not in policies:
        raise ConfigError(f"routing.policy={name!r}: known are {', '.join(policies)}.")
    return policies[name]


class Carrier:
    """Opened step by step: `prepare`, then `listen`; closed by `Proxy.drain` and the stack.

    Args:
        config: in force at the start.
        make_fleet: of timings and what makes pools.
        make_proxy: of settings, fleet and router.
    """

    def __init__(
        self,
        config: ServiceConfig,
        *,
        make_fleet: Callable[[Timings, MakePool], Fleet] = Fleet,
        make_proxy: Callable[[ServiceConfig, Fleet, Router], Proxy] = Proxy,
    ) -> None:
        self.config = config
        self._client_files = ClientFiles.of(config.instances, "instances.")
        self.tls = self._client_files.context()
        """Of connections to instances."""
        self.directory: KvDirectory | None = None
        self._prompts: PromptReader | None = None
        self._listen = config.listen
        self._listen_tls = PortTls(config.listen, "listen")
        self.fleet = make_fleet(config.instances.timings(), self._make_pool)
        self.router = Router(
            self.fleet,
            chosen_policy(config.routing.policy),
            num_decisions=config.admin.num_decisions,
            retry_after_s=config.routing.retry_after_s,
            clock=time.time,
        )
        self.proxy = make_proxy(config, self.fleet, self.router)

    def prepare(self, session: aiohttp.ClientSession, stack: contextlib.AsyncExitStack) -> None:
        """Make what requests need besides.

        Args:
            session: asks instances.
            stack: closes it all.
        """
        self.directory = KvDirectory(self.fleet, self.config.kv_index)
        self._prompts = PromptReader(session, self.config)
        stack.callback(self._prompts.close)
        if self.config.tracing.enabled:
            tracing = Tracing(exporting_provider())
            stack.callback(tracing.close)
            self.proxy.use_tracing(tracing)
        self.proxy.use_kv_index(self.directory, self._prompts)
        self.proxy.resumer = Resumer(session)

    async def listen(self, port: int | None = None) -> int:
        """Open the public port; returns it.

        Args:
            port: shared with other processes; None: that of the settings, alone.

        Raises:
            NotNowError: it is taken.
        """
        listen = self._listen
        opening = self.proxy.listen(tls=self._listen_tls.context, port=port)
        found: int = await opened(opening, "listen", listen.host, port or listen.port)
        return found

    async def follow_caches(self) -> None:
        """Follow the KV events of instances until cancelled."""
        assert self.directory is not None
        await self.directory.run()

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new, let what runs finish; then cut it off."""
        num_cut = await self.proxy.drain(timeout_s)
        if num_cut:
            logger.warning("%d clients were cut off after the drain's time", num_cut)

    def read_certificates(self) -> ssl.SSLContext | None:
        """Read what was renewed under the same names, for `use_certificates`.

        Raises:
            ConfigError: a file cannot be used; nothing has changed.
        """
        self._client_files.check()
        return self._listen_tls.read()

    def use_certificates(self, listen: ssl.SSLContext | None) -> None:
        """Put what was read in force.

        Raises:
            ConfigError: a file for instances has changed since, and cannot be used; those that were
                read before stay in force.
        """
        self._listen_tls.use(listen)
        self._client_files.renew(self.tls)

    def reconfigure(self, config: ServiceConfig) -> None:
        """Take new settings, which were checked; connections stay.

        Raises:
            ConfigError: as `Proxy.reconfigure`.
        """
        self.proxy.reconfigure(config)
        self.config = config
        logging.getLogger("xllm_plugin").setLevel(config.log.level.upper())
        self.fleet.timings = config.instances.timings()
        self.router.policy = chosen_policy(config.routing.policy)
        self.router.retry_after_s = config.routing.retry_after_s
        if self.directory is not None:
            self.directory.config = config.kv_index
        if self._prompts is not None:
            self._prompts.config = config
        for instance in self.fleet:
            instance.pool.connect_timeout_s = config.timeouts.connect_s

    def _make_pool(self, entry: InstanceEntry) -> Pool:
        return Pool(
            entry.host,
            entry.port,
            tls=self.tls if entry.is_tls else None,
            connect_timeout_s=self.config.timeouts.connect_s,
        )


async def opened(opening: Coroutine[Any, Any, Any], section: str, host: str, port: int) -> Any:
    """Await the opening of a port.  Raises `NotNowError` if it is taken."""
    try:
        return await opening
    except OSError as error:
        raise NotNowError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); free it, or set "
            f"{section}.host and {section}.port."
        ) from error


async def said(running: Coroutine[Any, Any, None], name: str) -> None:
    """Run a part that nobody awaits; if it fails, that is said at once."""
    try:
        await running
    except Exception:  # whatever it is, somebody has to say it; raised again
        logger.exception("%s has stopped; please report this", name)
        raise
