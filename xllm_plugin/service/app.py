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
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
from aiohttp import web

from xllm_plugin.channel.paths import channel_directory, require_private_directory
from xllm_plugin.errors import ConfigError
from xllm_plugin.etcd.config import tls_context
from xllm_plugin.service import key_file
from xllm_plugin.service.admin import AdminApi
from xllm_plugin.service.carrier import Carrier, chosen_policy, opened, said
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.etcd_registry import EtcdRegistry
from xllm_plugin.service.probes import Prober
from xllm_plugin.service.process import is_compiled, loop_factory, prepare_process
from xllm_plugin.service.registry import Embedded, Registry, StaticList, WatchedFile, read_entries
from xllm_plugin.service.tls import PortTls, server_context
from xllm_plugin.tls import ClientFiles

__all__ = ["Service", "check", "run", "token_path"]

logger = logging.getLogger(__name__)


def check(config: ServiceConfig) -> None:
    """What can be found wrong without starting.  Raises `ConfigError`."""
    chosen_policy(config.routing.policy)
    if config.instances.file is not None:
        read_entries(config.instances.file)
    num_keys = len(key_file.read(config.keys.file)) if config.keys.file is not None else 0
    if config.service.processes > 1:
        _check_processes(config, num_keys)
    server_context(config.listen, "listen")
    server_context(config.admin, "admin")
    _client_files(config).context()
    if config.etcd.url:
        tls_context(config.etcd)


def _client_files(config: ServiceConfig) -> ClientFiles:
    return ClientFiles.of(config.instances, "instances.")


def _fixed_that_differ(started: ServiceConfig, config: ServiceConfig) -> list[str]:
    """Names of settings that are others than at the start, and that a reload leaves as they are."""
    sections = ("listen", "admin", "etcd", "tracing", "service")
    found = [name for name in sections if getattr(config, name) != getattr(started, name)]
    if config.log.access_file != started.log.access_file:
        found.append("log.access_file")
    if _client_files(config) != _client_files(started):
        found.append("instances.ssl_*")
    return found


def _check_processes(config: ServiceConfig, num_keys: int) -> None:
    from xllm_plugin.service.processes.shared import MAX_KEYS

    given = f"service.processes={config.service.processes}"
    if sys.platform != "linux":
        raise ConfigError(f"{given}: they share a port and memory as Linux has them; use 1 here.")
    if num_keys > MAX_KEYS:
        raise ConfigError(
            f"{given}: they share the limits of {MAX_KEYS} API keys, and keys.file has {num_keys}; "
            "remove some, or use 1."
        )


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
        self._started = config
        """What cannot change while it runs is as here."""
        self._load = load or (lambda: config)
        self._admin_tls = PortTls(config.admin, "admin")
        self._stack = contextlib.AsyncExitStack()
        self.carrier = self._make_carrier()
        self.fleet = self.carrier.fleet
        self.router = self.carrier.router
        self.proxy = self.carrier.proxy
        self.registrations = (
            EtcdRegistry(self.fleet, config.etcd)
            if config.etcd.url
            else Embedded(self.fleet, has_workers=config.service.processes > 1)
        )
        self.port = self.admin_port = 0
        self._registries: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open both ports and begin to follow the instances.

        Raises:
            NotNowError: a port is taken.
            ConfigError: an address is not one of this machine, or the token cannot be kept.
        """
        session = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.carrier.tls, limit=0))
        )
        self._prober = Prober(self.fleet, session, self.config.instances)
        self._prepare(session)
        self.admin_port = await self._open_admin(session)
        self.port = await self._open_public()
        self._follow_registries()
        measuring = self.proxy.telemetry.run(self.config.admin.sample_interval_s)
        self._running = [
            asyncio.create_task(said(self._prober.run(), "probing")),
            asyncio.create_task(said(measuring, "measuring")),
            asyncio.create_task(said(self.registrations.run(self.fleet), "following instances")),
            asyncio.create_task(said(self._beside(), "what runs beside traffic")),
        ]
        kind = "compiled" if is_compiled() else "not compiled"
        logger.info("serving on %s:%d (%s)", self.config.listen.host, self.port, kind)

    def reload(self) -> None:
        """Take new settings; wrong ones change nothing."""
        try:
            config = self._load()
            self._check(config)
            admin_tls = self._admin_tls.read()
            listen_tls = self.carrier.read_certificates()
            self.carrier.reconfigure(config)
        except ConfigError as error:
            logger.error("not reloaded, the settings stay as they were: %s", error)  # noqa: TRY400
            return
        self._admin_tls.use(admin_tls)
        try:
            self.carrier.use_certificates(listen_tls)
        except ConfigError as error:  # they were written anew since they were read above
            logger.error("certificates for instances stay as they were: %s", error)  # noqa: TRY400
        for name in _fixed_that_differ(self._started, config):
            logger.warning("%s settings have changed and need a restart", name)
        self.config = config
        self._prober.config = config.instances
        self._follow_registries()
        logger.info("reloaded: %d instances configured", len(config.instances.static))

    async def abandon(self) -> None:
        """Close what `start` had opened when it failed."""
        await self._drain(0.0)
        await self._stack.aclose()

    async def stop(self) -> None:
        """Drain within the configured time, then close everything."""
        await self._drain(self.config.timeouts.drain_s)
        tasks = (*self._registries, *self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    # -- what is otherwise where others carry the traffic ---------------------------------------

    def _check(self, config: ServiceConfig) -> None:
        """Raise `ConfigError` for what `reload` could not put in force."""
        check(config)

    def _make_carrier(self) -> Carrier:
        return Carrier(self.config)

    def _prepare(self, session: aiohttp.ClientSession) -> None:
        self.carrier.prepare(session, self._stack)

    async def _beside(self) -> None:
        """What has to run beside traffic."""
        await self.carrier.follow_caches()

    async def _open_public(self) -> int:
        return await self.carrier.listen()

    async def _drain(self, timeout_s: float) -> None:
        await self.carrier.drain(timeout_s)

    # -- parts ----------------------------------------------------------------------------------

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
            asyncio.create_task(said(registry.run(self.fleet), type(registry).__name__))
            for registry in registries
        ]

    async def _open_admin(self, session: aiohttp.ClientSession) -> int:
        admin = self.config.admin
        token = admin.token.get_secret_value() if admin.token else secrets.token_urlsafe(32)
        api = AdminApi(self.proxy, self.registrations, session, token)
        runner = web.AppRunner(api.application(), access_log=None, handle_signals=False)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, admin.host, admin.port, ssl_context=self._admin_tls.context)
        await opened(site.start(), "admin", admin.host, admin.port)
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


def _made(config: ServiceConfig, load: Callable[[], ServiceConfig]) -> Service:
    if config.service.processes == 1:
        return Service(config, load)
    from xllm_plugin.service.processes.control import ControlService

    return ControlService(config, load)


async def _serve(config: ServiceConfig, load: Callable[[], ServiceConfig]) -> None:
    service = _made(config, load)
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
    prepare_process(config.log)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(config, load))
