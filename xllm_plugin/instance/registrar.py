"""Registers this server, keeps its lease, and leaves when it is stopped.

It runs on a thread of its own: a busy event loop delays no heartbeat, and a registry that is away
delays no request.  One exchange is `Registrar.step`, which says when the next is due.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from xllm_plugin.channel.messages import Reading
from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.instance.latency import LatencyMeter
from xllm_plugin.registration import (
    Heartbeat,
    KvEventSource,
    Lease,
    Load,
    Registration,
    RegistrationConfig,
)

if TYPE_CHECKING:
    from xllm_plugin.instance.registry_clients import RegistryClient

__all__ = [
    "Registrar",
    "advertised_url",
    "kv_event_sources",
    "leaves_first",
    "load_of",
]

logger = logging.getLogger("vllm.xllm_plugin")

_BEATS_A_LEASE = 3
_FIRST_RETRY_S = 0.25
_LAST_RETRY_S = 8.0
_DRAIN_POLL_S = 0.2
_WILDCARDS = ("", "0.0.0.0", "::", "[::]")  # noqa: S104 - compared, not bound


class Registrar:
    """One server's registration.

    ::

        away --registered--> held --heartbeats--> held
          ^                   |  forgotten: by a service that was restarted, by silence
          +-------------------+

    Args:
        config: for how long to drain.
        registration: what to register.
        measure: the load of now; None if the engine cannot be asked.
        num_unfinished: requests that this server has not answered to the end.
        registry: holds the lease.
        draw: random numbers in [0, 1), for jitter.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: RegistrationConfig,
        registration: Registration,
        measure: Callable[[], Load | None],
        num_unfinished: Callable[[], int],
        *,
        registry: RegistryClient,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registration = registration
        self.last_beat: Heartbeat | None = None
        """What was said last: `GET /xllm/load` tells it to whom no heartbeat goes."""
        self._config = config
        self._measure = measure
        self._num_unfinished = num_unfinished
        self._registry = registry
        self._draw = draw
        self._clock = clock
        self._lease: Lease | None = None
        self._num_failures = 0
        self._problem = ""
        self._turn = threading.Lock()  # the thread's step, and the one that leaves
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xllm-registrar", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def step(self) -> float:
        """Register, or send a heartbeat; returns after how many seconds the next is due."""
        with self._turn:
            if self._stopping.is_set():
                return 0.0  # it has left while this waited for its turn
            try:
                lease = self._register() if self._lease is None else self._beat()
            except NotNowError as error:
                return self._failed(str(error))
            if lease is None:  # forgotten: a service that was restarted, or silence for too long
                where = self._registry.where
                logger.info("xllm-plugin: %s no longer knows us, registering again", where)
                self._lease = None
                return 0.0
            if self._lease is None:
                where = self._registry.where
                logger.info("xllm-plugin: registered at %s as %s", where, lease.name)
            self._lease, self._num_failures, self._problem = lease, 0, ""
            return lease.lease_s / _BEATS_A_LEASE

    def leave(self, *, drain: bool) -> None:
        """Take nothing new, wait for what runs if `drain`, and deregister.  Safe to repeat."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self._turn:
            if self._lease is None:
                return
            if drain:
                self._drain()
            self._deregister()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            try:
                wait_s = self.step()
            except Exception:  # a fault of ours must not end the heartbeats; tried again
                logger.exception("xllm-plugin: registering has failed; please report this")
                wait_s = _LAST_RETRY_S

    def _failed(self, problem: str) -> float:
        if problem != self._problem:
            logger.warning(
                "xllm-plugin: not registered at %s: %s Serving goes on; it is tried again.",
                self._registry.where,
                problem,
            )
            self._problem = problem
        # A lease that is held is tried to be kept.
        longest_s = self._lease.lease_s / _BEATS_A_LEASE if self._lease else _LAST_RETRY_S
        wait_s = min(longest_s, _FIRST_RETRY_S * 2.0**self._num_failures)
        self._num_failures = min(self._num_failures + 1, 16)
        # All instances lose a service at the same moment: they must not come back in step.
        return wait_s * (0.5 + self._draw())

    def _register(self) -> Lease:
        return self._registry.register(self.registration)

    def _beat(self, *, is_draining: bool = False) -> Lease | None:
        assert self._lease is not None
        self.last_beat = Heartbeat(
            incarnation=self.registration.incarnation,
            load=self._measure(),
            is_draining=is_draining,
        )
        return self._registry.beat(self._lease, self.last_beat)

    def _drain(self) -> None:
        """Wait until the service has nothing under way here, and nobody else either."""
        deadline_s = self._clock() + self._config.drain_s
        logger.info("xllm-plugin: draining for at most %g s", self._config.drain_s)
        num_idle_looks = 0
        while self._clock() < deadline_s:
            try:
                lease = self._beat(is_draining=True)
            except NotNowError:
                lease = None  # it is away: what counts is what runs here
            is_idle = not self._num_unfinished() and (lease is None or not lease.in_flight)
            num_idle_looks = num_idle_looks + 1 if is_idle else 0
            # Nobody may know what was sent here just now (etcd, several processes): look once more.
            if num_idle_looks > (lease is not None and lease.in_flight is None):
                return
            time.sleep(_DRAIN_POLL_S)
        logger.warning(
            "xllm-plugin: %d requests are cut off, after %g s of draining (registration.drain_s).",
            self._num_unfinished(),
            self._config.drain_s,
        )

    def _deregister(self) -> None:
        assert self._lease is not None
        try:
            self._registry.deregister(self._lease, self.registration.incarnation)
        except NotNowError as error:
            logger.info("xllm-plugin: not deregistered: %s Its lease lapses by itself.", error)
        self._lease = None


def advertised_url(config: RegistrationConfig, args: Namespace) -> str:
    """Where the service reaches this server.

    Args:
        config: its `advertise_url` wins.
        args: of `vllm serve`.

    Raises:
        ConfigError: the server listens on a Unix socket only, or the service's name is unknown.
    """
    if config.advertise_url:
        return config.advertise_url.rstrip("/")
    if args.uds:
        raise ConfigError(
            f"--register with --uds {args.uds}: the service needs an address; set "
            "registration.advertise_url to a proxy before this server, or leave --uds out."
        )
    host = args.host or ""
    if host in _WILDCARDS:
        host = _address_towards(config.urls[0])
    scheme = "https" if args.ssl_keyfile and args.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"


def _address_towards(url: str) -> str:
    """This machine's address on the way to `url`.  Sends nothing."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            parts.hostname, port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"--register {url}: no way there ({error}). Correct it, or set "
            "registration.advertise_url to the address of this server."
        ) from error


def kv_event_sources(found: dict[int, Any], url: str) -> tuple[KvEventSource, ...]:
    """vLLM's event publishers by rank, under addresses that other machines reach.

    Args:
        found: rank -> `vllm.config.kv_events.KVEventsConfig`, of `get_kv_event_sources`.
        url: where this server is reached.
    """
    host = urlsplit(url).hostname or ""
    host = f"[{host}]" if ":" in host else host

    def reachable(endpoint: str | None) -> str | None:
        return endpoint.replace("*", host).replace("[::]", host) if endpoint else None

    return tuple(
        KvEventSource(
            dp_rank=rank,
            endpoint=reachable(config.endpoint) or "",
            replay_endpoint=reachable(config.replay_endpoint),
            topic=config.topic,
        )
        for rank, config in sorted(found.items())
    )


def load_of(readings: Iterable[Reading], meter: LatencyMeter) -> Load | None:
    """The load of all engines of this server together; None if none of them answers."""
    loads = [reading.snapshot.load for reading in readings if reading.snapshot]
    if not loads:
        return None
    total = sum(load.num_blocks_total for load in loads)
    free = sum(load.num_blocks_free for load in loads)
    ttft_s, tpot_s = meter.read()
    return Load(
        num_running=sum(load.num_running for load in loads),
        num_waiting=sum(load.num_waiting for load in loads),
        kv_usage=min(1.0, max(0.0, 1.0 - free / total)) if total else 0.0,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


def leaves_first(shutdown: Callable[..., None], registrar: Registrar) -> Callable[..., None]:
    """An engine client's `shutdown` that lets the server leave the service before (seam).

    vLLM calls it on a thread as soon as SIGTERM comes, while the server still answers; there it
    waits for what runs.  On the event loop (an engine that has died, an error at the start) nobody
    could be answered meanwhile, and it does not.
    """

    def shutdown_after_leaving(timeout: float | None = None) -> None:
        try:
            asyncio.get_running_loop()
            is_answering = False
        except RuntimeError:
            is_answering = True
        registrar.leave(drain=is_answering)
        shutdown(timeout=timeout)

    return shutdown_after_leaving
