"""Starts, reloads and drains the service: one process, one event loop.

SIGHUP reads the settings again; connections stay.  SIGTERM and SIGINT drain; a second one cuts off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import ssl
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from xllm_plugin.channel.paths import channel_directory, require_private_directory
from xllm_plugin.errors import ConfigError, NotNowError, PlatformError
from xllm_plugin.etcd.config import tls_context
from xllm_plugin.plugins import manager_here, routing_policies
from xllm_plugin.service import access_log, keys
from xllm_plugin.service.admin import AdminApi
from xllm_plugin.service.config import InstanceEntry, ServiceConfig
from xllm_plugin.service.etcd_registry import EtcdRegistry
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.kv_index.directory import KvDirectory
from xllm_plugin.service.kv_index.tokens import PromptReader
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.probes import Prober
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.registry import Embedded, Registry, StaticList, WatchedFile, read_entries
from xllm_plugin.service.router import Router
from xllm_plugin.service.tls import load_certificate, server_context
from xllm_plugin.service.tracing import Tracing, exporting_provider
from xllm_plugin.service.upstream import Pool

__all__ = ["Service", "check", "chosen_policy", "run", "token_path"]

logger = logging.getLogger(__name__)


def chosen_policy(name: str) -> RoutingPolicy:
    """The policy of that name.  Raises `ConfigError` with the names that there are."""
    policies = routing_policies(manager_here())
    if name not in policies:
        raise ConfigError(f"routing.policy={name!r}: known are {', '.join(policies)}.")
    return policies[name]


def check(config: ServiceConfig) -> None:
    """What can be found wrong without starting.  Raises `ConfigError`."""
    chosen_policy(config.routing.policy)
    if config.instances.file is not None:
        read_entries(config.instances.file)
    if config.keys.file is not None:
        keys.read(config.keys.file)
    server_context(config.listen, "listen")
    server_context(config.admin, "admin")
    if config.etcd.url:
        tls_context(config.etcd)


def token_path(port: int) -> Path:
    """Where a token that was made at start is left for this user's `xllm service` commands."""
    return channel_directory() / f"service-{port}.token"


class Service:
    """Everything that runs.  `start`, then `stop`.

    Args:
        config: in force at the start.
        load: reads the settings again, for `reload`; raises `ConfigError`.
    """

    def __init__(
        self, config: ServiceConfig, load: Callable[[], ServiceConfig] | None = None
    ) -> None:
        check(config)
        self.config = config
        self._load = load or (lambda: config)
        self._tls = ssl.create_default_context()
        self._listen_tls = server_context(config.listen, "listen")
        self._admin_tls = server_context(config.admin, "admin")
        self._certificates = [
            (context, section, name)
            for context, section, name in (
                (self._listen_tls, config.listen, "listen"),
                (self._admin_tls, config.admin, "admin"),
            )
            if context is not None
        ]
        self.fleet = Fleet(config.instances.timings(), self._make_pool)
        self.router = Router(
            self.fleet,
            chosen_policy(config.routing.policy),
            num_decisions=config.admin.num_decisions,
            retry_after_s=config.routing.retry_after_s,
            clock=time.time,
        )
        self.proxy = Proxy(config, self.fleet, self.router)
        self.registrations = (
            EtcdRegistry(self.fleet, config.etcd) if config.etcd.url else Embedded(self.fleet)
        )
        self.port = self.admin_port = 0
        self._stack = contextlib.AsyncExitStack()
        self._registries: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open both ports and begin to follow the instances.

        Raises:
            NotNowError: a port is taken.
            ConfigError: an address is not one of this machine, or the token cannot be kept.
        """
        session = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls, limit=0))
        )
        self._prober = Prober(self.fleet, session, self.config.instances)
        self._directory = KvDirectory(self.fleet, self.config.kv_index)
        self._prompts = PromptReader(session, self.config)
        self._stack.callback(self._prompts.close)
        if self.config.tracing.enabled:
            tracing = Tracing(exporting_provider())
            self._stack.callback(tracing.close)
            self.proxy.use_tracing(tracing)
        self.proxy.use_kv_index(self._directory, self._prompts)
        self.admin_port = await self._open_admin(session)
        listen = self.config.listen
        self.port = await _opened(
            self.proxy.listen(tls=self._listen_tls), "listen", listen.host, listen.port
        )
        self._follow_registries()
        measuring = self.proxy.telemetry.run(self.config.admin.sample_interval_s)
        self._running = [
            asyncio.create_task(_said(self._prober.run(), "probing")),
            asyncio.create_task(_said(self._directory.run(), "following KV events")),
            asyncio.create_task(_said(measuring, "measuring")),
            asyncio.create_task(_said(self.registrations.run(self.fleet), "following instances")),
        ]
        logger.info("serving on %s:%d", listen.host, self.port)

    def reload(self) -> None:
        """Take new settings; wrong ones change nothing."""
        try:
            config = self._load()
            check(config)
            for context, port, name in self._certificates:
                load_certificate(context, port, name)  # renewed under the same name
        except ConfigError as error:
            logger.error("not reloaded, the settings stay as they were: %s", error)  # noqa: TRY400
            return
        for section in ("listen", "admin", "etcd", "tracing"):
            if getattr(config, section) != getattr(self.config, section):
                logger.warning("%s settings have changed and need a restart", section)
        self.config = config
        logging.getLogger("xllm_plugin").setLevel(config.log.level.upper())
        self.fleet.timings = config.instances.timings()
        self.router.policy = chosen_policy(config.routing.policy)
        self.router.retry_after_s = config.routing.retry_after_s
        self.proxy.reconfigure(config)
        self._prober.config = config.instances
        self._directory.config = config.kv_index
        self._prompts.config = config
        for instance in self.fleet:
            instance.pool.connect_timeout_s = config.timeouts.connect_s
        self._follow_registries()
        logger.info("reloaded: %d instances configured", len(config.instances.static))

    async def abandon(self) -> None:
        """Close what `start` had opened when it failed."""
        await self.proxy.drain(0.0)
        await self._stack.aclose()

    async def stop(self) -> None:
        """Drain within the configured time, then close everything."""
        num_cut = await self.proxy.drain(self.config.timeouts.drain_s)
        if num_cut:
            logger.warning("%d clients were cut off after the drain's time", num_cut)
        tasks = (*self._registries, *self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    def _make_pool(self, entry: InstanceEntry) -> Pool:
        return Pool(
            entry.host,
            entry.port,
            tls=self._tls if entry.is_tls else None,
            connect_timeout_s=self.config.timeouts.connect_s,
        )

    def _follow_registries(self) -> None:
        for task in self._registries:
            task.cancel()
        instances = self.config.instances
        registries: list[Registry] = [StaticList(instances.static)]
        if instances.file is not None:
            registries.append(WatchedFile(instances.file))
        else:
            WatchedFile.forget(self.fleet)
        self._registries = [
            asyncio.create_task(_said(registry.run(self.fleet), type(registry).__name__))
            for registry in registries
        ]

    async def _open_admin(self, session: aiohttp.ClientSession) -> int:
        admin = self.config.admin
        token = admin.token.get_secret_value() if admin.token else secrets.token_urlsafe(32)
        api = AdminApi(self.proxy, self.registrations, session, token)
        runner = web.AppRunner(api.application(), access_log=None, handle_signals=False)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, admin.host, admin.port, ssl_context=self._admin_tls)
        await _opened(site.start(), "admin", admin.host, admin.port)
        port = int(runner.addresses[0][1])
        if admin.token is None:
            self._keep_token(port, token)
        return port

    def _keep_token(self, port: int, token: str) -> None:
        path = token_path(port)
        require_private_directory(path.parent)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
        self._stack.callback(path.unlink, missing_ok=True)


async def _opened(opening: Coroutine[Any, Any, Any], section: str, host: str, port: int) -> Any:
    try:
        return await opening
    except OSError as error:
        raise NotNowError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); free it, or set "
            f"{section}.host and {section}.port."
        ) from error


async def _said(running: Coroutine[Any, Any, None], name: str) -> None:
    """Run a part that nobody awaits; if it fails, that is said at once."""
    try:
        await running
    except Exception:  # whatever it is, somebody has to say it; raised again
        logger.exception("%s has stopped; please report this", name)
        raise


async def _serve(config: ServiceConfig, load: Callable[[], ServiceConfig]) -> None:
    service = Service(config, load)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            service.proxy.cut_off()
        stopping.set()

    try:
        await service.start()
    except BaseException:  # raised again; what has started is ended first
        await service.abandon()
        raise
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await stopping.wait()
    await service.stop()


def run(config: ServiceConfig, load: Callable[[], ServiceConfig]) -> None:
    """Serve until a signal says stop.

    Raises:
        PlatformError: uvloop should be here and is not.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    access_log.open_log(config.log.access_file)
    logging.getLogger("xllm_plugin").setLevel(config.log.level.upper())
    _raise_file_limit()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, load))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":  # uvloop is not made for it
        return None
    try:
        import uvloop
    except ImportError as error:
        raise PlatformError(
            f"uvloop is not installed ({error}): pip install 'xllm-plugin[service]'."
        ) from error
    return uvloop.new_event_loop


def _raise_file_limit() -> None:
    """A stream takes two descriptors; shells give 1,024, and allow more if asked."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
