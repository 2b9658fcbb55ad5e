"""Registers this server at an `xllm service`, keeps its lease, and leaves when it is stopped.

It runs on a thread of its own: a busy event loop delays no heartbeat, and a service that is away
delays no request.  One exchange is `Registrar.step`, which says when the next is due.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from pydantic import ValidationError

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

__all__ = [
    "Registrar",
    "advertised_url",
    "kv_event_sources",
    "leaves_first",
    "load_of",
    "make_client",
]

logger = logging.getLogger("vllm.xllm_plugin")

_BEATS_A_LEASE = 3
_TIMEOUT_S = 2.0
_FIRST_RETRY_S = 0.25
_LAST_RETRY_S = 8.0
_DRAIN_POLL_S = 0.2
_WILDCARDS = ("", "0.0.0.0", "::", "[::]")  # noqa: S104 - compared, not bound


class Registrar:
    """One server's registration at one service.

    ::

        away --registered--> held --heartbeats--> held
          ^                   |  refused (409: forgotten, or the service is another) or unreachable
          +-------------------+

    Args:
        config: says where, and with which token.
        registration: what to register.
        measure: the load of now; None if the engine cannot be asked.
        num_unfinished: requests that this server has not answered to the end.
        client: talks to the service, with its address and token.
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
        client: httpx.Client,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registration = registration
        self._config = config
        self._measure = measure
        self._num_unfinished = num_unfinished
        self._client = client
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
                logger.info("xllm-plugin: %s no longer knows us, registering again", self._where)
                self._lease = None
                return 0.0
            if self._lease is None:
                logger.info("xllm-plugin: registered at %s as %s", self._where, lease.name)
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

    @property
    def _where(self) -> str:
        return self._config.url

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
                self._where,
                problem,
            )
            self._problem = problem
        wait_s = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0**self._num_failures)
        self._num_failures = min(self._num_failures + 1, 16)
        # All instances lose a service at the same moment: they must not come back in step.
        return wait_s * (0.5 + self._draw())

    def _register(self) -> Lease:
        lease = self._ask("POST", "/v1/registrations", self.registration)
        assert lease is not None
        return lease

    def _beat(self, *, is_draining: bool = False) -> Lease | None:
        assert self._lease is not None
        beat = Heartbeat(
            incarnation=self.registration.incarnation,
            load=self._measure(),
            is_draining=is_draining,
        )
        return self._ask("POST", f"{self._path(self._lease)}/heartbeat", beat)

    def _drain(self) -> None:
        """Wait until the service has nothing under way here, and nobody else either."""
        deadline_s = self._clock() + self._config.drain_s
        logger.info("xllm-plugin: draining for at most %g s", self._config.drain_s)
        while self._clock() < deadline_s:
            try:
                lease = self._beat(is_draining=True)
            except NotNowError:
                lease = None  # it is away: what counts is what runs here
            if not self._num_unfinished() and (lease is None or not lease.in_flight):
                return
            time.sleep(_DRAIN_POLL_S)
        logger.warning(
            "xllm-plugin: %d requests are cut off, after %g s of draining (registration.drain_s).",
            self._num_unfinished(),
            self._config.drain_s,
        )

    def _deregister(self) -> None:
        assert self._lease is not None
        path = f"{self._path(self._lease)}?incarnation={quote(self.registration.incarnation)}"
        try:
            self._ask("DELETE", path, None)
        except NotNowError as error:
            logger.info("xllm-plugin: not deregistered: %s Its lease lapses by itself.", error)
        self._lease = None

    @staticmethod
    def _path(lease: Lease) -> str:
        return f"/v1/registrations/{quote(lease.name, safe='')}"

    def _ask(self, method: str, path: str, body: Registration | Heartbeat | None) -> Lease | None:
        """One exchange; None for a lease that is not there (any more).

        Raises:
            NotNowError: no answer, or an error.
        """
        content = None if body is None else body.model_dump_json()
        try:
            reply = self._client.request(method, path, content=content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotNowError(f"{type(error).__name__}: {error}.") from error
        if reply.status_code == httpx.codes.CONFLICT and not isinstance(body, Registration):
            return None
        if reply.status_code != httpx.codes.OK:
            raise NotNowError(_explained(reply))
        if method == "DELETE":
            return None
        try:
            return Lease.model_validate_json(reply.content)
        except ValidationError as error:
            raise NotNowError("its answer is no lease; is this the admin port?") from error


def make_client(config: RegistrationConfig) -> httpx.Client:
    """A client of the service's admin port."""
    headers = {}
    if config.token is not None:
        headers["Authorization"] = f"Bearer {config.token.get_secret_value()}"
    return httpx.Client(
        base_url=config.url.rstrip("/"),
        headers=headers,
        timeout=_TIMEOUT_S,
        verify=ssl.create_default_context(),
        trust_env=False,  # proxies of the environment lead out of the cluster
    )


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
        host = _address_towards(config.url)
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


def _explained(reply: httpx.Response) -> str:
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        return (
            "it refuses the token (401): registration.token here has to be "
            "instances.registration_token there."
        )
    try:
        detail = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        detail = "is this the admin port of a service?"
    return f"it answers {reply.status_code}: {detail}"
