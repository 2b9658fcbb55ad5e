"""The public port: accepts clients, and watches over the time that each leg takes."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from xllm_plugin.service import access_log
from xllm_plugin.service.client import ClientConnection, headers_of_note
from xllm_plugin.service.config import FlowConfig, ServiceConfig
from xllm_plugin.service.decision import Sent
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.flow.control import FlowControl
from xllm_plugin.service.held_bodies import BodyMemory
from xllm_plugin.service.keys import KeyRing
from xllm_plugin.service.kv_index.tokens import Unread
from xllm_plugin.service.replies import Refusal
from xllm_plugin.service.retry_budget import RetryBudget
from xllm_plugin.service.router import Router
from xllm_plugin.service.routes import Kind
from xllm_plugin.service.telemetry import Ending, Telemetry

if TYPE_CHECKING:
    from xllm_plugin.service.exchange import Exchange
    from xllm_plugin.service.kv_index.directory import KvDirectory
    from xllm_plugin.service.kv_index.tokens import PromptReader
    from xllm_plugin.service.metrics import WorkerFigures
    from xllm_plugin.service.scale_out.resumer import Resumer
    from xllm_plugin.service.tracing import Tracing

__all__ = ["Proxy"]

logger = logging.getLogger(__name__)

_SWEEP_S: Final = 1.0


class Proxy:
    """All client connections of one process.

    Args:
        config: in force; replaced as a whole by `reconfigure`.
        fleet: the instances.
        router: chooses among them.
    """

    def __init__(self, config: ServiceConfig, fleet: Fleet, router: Router) -> None:
        self.loop = asyncio.get_running_loop()
        self.fleet = fleet
        self.router = router
        self.clients: set[ClientConnection] = set()
        self.is_draining = False
        self.refusals: dict[int, int] = {}
        """Errors of our own, by status."""
        self.telemetry = Telemetry(fleet, config.slo, num_samples=config.admin.num_samples)
        self.tracing: Tracing | None = None
        self.resumer: Resumer | None = None
        """Continues streams at servers without this plugin; None: nobody does."""
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_s = _SWEEP_S
        self.flow: FlowControl | None = None
        """Holds requests back while no instance has room; None: nobody waits here."""
        self.keys: KeyRing | None = None
        """Who may ask; None: everybody."""
        self.directory: KvDirectory | None = None
        self.prompts: PromptReader | None = None
        self.workers: list[WorkerFigures] = []
        """Processes that carry this one's traffic; none where it carries it itself."""
        self._reading: set[asyncio.Task[None]] = set()
        self.bodies = BodyMemory(config.limits.max_total_body_bytes)
        self.retry_budget = RetryBudget(config.routing.retry_share)
        self.hedge_budget = RetryBudget(config.routing.retry_share)
        """Its own: what hedges take must not be missing where an instance answers 503."""
        self.reconfigure(config)

    def use_tracing(self, tracing: Tracing) -> None:
        """Give every request a span."""
        self.tracing = tracing
        self.headers_of_note = headers_of_note(self.config, traces=True)

    def use_kv_index(self, directory: KvDirectory, prompts: PromptReader) -> None:
        """Route by what the instances' caches hold."""
        self.directory, self.prompts = directory, prompts

    def dispatch(self, exchange: Exchange) -> None:
        """Send a request on its way, after its tokens are known if that can matter."""
        if self.tracing is not None:
            self.tracing.begin(exchange)
        if exchange.grant is not None:
            try:
                exchange.grant.admit(exchange, self.loop.time())
            except Refusal as refusal:
                exchange.refuse(refusal)
                return
        directory, model = self.directory, exchange.model
        seen, exchange.seen = exchange.seen, None
        if (
            directory is None
            or model is None
            or seen is None
            or not directory.is_useful
            or not self.router.policy.uses_prefixes
            or exchange.route.kind is not Kind.INFERENCE
            or len(candidates := self.fleet.candidates(model)) < 2  # noqa: PLR2004 - no choice
        ):
            self._enter(exchange)
            return
        assert self.prompts is not None
        try:
            found = self.prompts.look(exchange.route.path, seen, model, candidates)
        except Exception:  # what it would have told helps to choose; no request is lost for it
            logger.exception("a prompt could not be read; please report this")
            found = None
        if isinstance(found, Unread):
            task = self.loop.create_task(self._read_and_dispatch(exchange, found, model))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
            return
        exchange.prompt = found
        self._enter(exchange)

    async def _read_and_dispatch(self, exchange: Exchange, unread: Unread, model: str) -> None:
        assert self.prompts is not None
        try:
            candidates = self.fleet.candidates(model)
            exchange.prompt = await self.prompts.read(unread, model, candidates)
        except Exception:  # as above
            logger.exception("a prompt could not be read; please report this")
        if not exchange.is_done:
            self._enter(exchange)

    def _enter(self, exchange: Exchange) -> None:
        if self.flow is None:
            self._send(exchange)
        else:
            self.flow.enter(exchange)

    def _send(self, exchange: Exchange) -> None:
        """Its turn has come: look up who holds its prompt now, and choose."""
        if exchange.prompt is not None and self.directory is not None:
            try:
                candidates = self.fleet.candidates(exchange.model)
                cached = self.directory.lookup(exchange.prompt, exchange.model, candidates)
                exchange.sent = Sent(exchange.prompt.num_tokens, cached, is_exact=True)
            except Exception:  # as above: it is then routed without
                logger.exception("a prompt could not be looked up; please report this")
        exchange.dispatch()

    def reconfigure(self, config: ServiceConfig) -> None:
        """Take new settings; connections that are open keep theirs where it matters.

        Raises:
            ConfigError: the keys' file has become none since it was checked; nothing has changed.
        """
        self._reconfigure_keys(config)  # first: nothing else can fail
        self.config = config
        self.session_header = config.routing.session_header.lower().encode("latin-1")
        self.telemetry.slo = config.slo
        self.bodies.max_bytes = config.limits.max_total_body_bytes
        self._logs_access = config.log.access
        self.headers_of_note = headers_of_note(config, traces=self.tracing is not None)
        if self.retry_budget.share != config.routing.retry_share:
            self.retry_budget = RetryBudget(config.routing.retry_share)
            self.hedge_budget = RetryBudget(config.routing.retry_share)
        self._reconfigure_flow(config)
        self.router.forget_rosters()
        self.hedge_after_s = config.routing.hedge_after_s
        """Until a second instance is asked for what one has not begun to answer; None: never."""
        self.reads_promises = self.flow is not None or self.keys is not None
        """Whether a request with a wrong one is refused here; else they only help to choose."""

    def _reconfigure_flow(self, config: ServiceConfig) -> None:
        before, retry_after_s = self.flow, config.routing.retry_after_s
        if not config.flow.enabled:
            self.flow = self.router.has_room = None
            if before is not None:
                before.release_all()
            return
        if before is not None:
            before.reconfigure(config.flow, retry_after_s)
            return
        self.flow = self._make_flow(config.flow, retry_after_s)
        self.router.has_room = self.flow.has_room

    def _reconfigure_keys(self, config: ServiceConfig) -> None:
        path, num_replicas = config.keys.file, config.flow.num_replicas
        if path is None:
            self.keys = None
        elif self.keys is None or self.keys.path != path:
            self.keys = self._make_keys(path, num_replicas)
        else:
            self.keys.num_replicas = num_replicas
        key = config.instances.api_key
        self.instances_key_line = b""
        """Header line that requests with a client's key have instead of it."""
        if key is not None and not config.keys.forward:
            self.instances_key_line = b"authorization: Bearer %b\r\n" % (
                key.get_secret_value().encode()
            )

    def _make_flow(self, config: FlowConfig, retry_after_s: float) -> FlowControl:
        return FlowControl(config, self.fleet, self._send, retry_after_s)

    def _make_keys(self, path: Path, num_replicas: int) -> KeyRing:
        return KeyRing(path, num_replicas, self.loop.time)

    async def listen(
        self,
        sweep_s: float = _SWEEP_S,
        tls: ssl.SSLContext | None = None,
        *,
        port: int | None = None,
    ) -> int:
        """Begin to accept clients.

        Args:
            sweep_s: between two looks at how long everything takes.
            tls: of HTTPS.
            port: shared with other processes that say the same; None: `listen.port`, alone.

        Returns:
            The port.

        Raises:
            OSError: it is taken.
        """
        listen = self.config.listen
        self._server = await self.loop.create_server(
            lambda: ClientConnection(self),
            listen.host,
            listen.port if port is None else port,
            backlog=listen.backlog,
            reuse_port=port is not None,
            ssl=tls,
            # A client that dawdles over its handshake is closed as one that does over its headers.
            ssl_handshake_timeout=self.config.timeouts.header_s if tls else None,
        )
        self._sweep_s = sweep_s
        self._sweeper = self.loop.call_later(sweep_s, self._sweep)
        sockets: Any = cast("Any", self._server).sockets  # uvloop has a list
        opened: int = sockets[0].getsockname()[1]
        return opened

    async def drain(self, timeout_s: float) -> int:
        """Accept nothing new, let what runs finish; returns how many clients were cut off."""
        self.is_draining = True
        if self._server is not None:
            self._server.close()
        for client in tuple(self.clients):
            if client.is_idle:
                client.close()
        deadline_s = self.loop.time() + timeout_s
        while self.clients and self.loop.time() < deadline_s:  # noqa: ASYNC110 - not in traffic
            await asyncio.sleep(min(0.05, timeout_s))
        num_cut = self.cut_off()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for instance in self.fleet:
            instance.pool.close_idle()
        await asyncio.sleep(0)
        return num_cut

    def cut_off(self) -> int:
        """End every connection at once; returns how many there were."""
        clients = tuple(self.clients)
        for client in clients:
            client.abort()
        return len(clients)

    @property
    def num_clients(self) -> int:
        """Open connections of clients."""
        return len(self.clients)

    @property
    def num_prompts_unread(self) -> int:
        """Prompts routed without their tokens, on an error."""
        return self.prompts.num_failures if self.prompts is not None else 0

    @property
    def num_chats_misread(self) -> int:
        """Chats that were rendered here otherwise than their instance does."""
        return self.prompts.num_misread if self.prompts is not None else 0

    def count_refusal(self, status: int) -> None:
        """Count an error that the service answered with."""
        self.refusals[status] = self.refusals.get(status, 0) + 1

    def ended(self, exchange: Exchange, ending: Ending) -> None:
        """A request is over: measure it, and say so where that is wanted."""
        self.telemetry.finished(exchange, ending)
        if exchange.span is not None and self.tracing is not None:
            self.tracing.end(exchange, ending)
        if self._logs_access:
            access_log.log(exchange, ending)

    def _sweep(self) -> None:
        """About once a second: cheaper than a timer for each leg of each request."""
        self._sweeper = self.loop.call_later(self._sweep_s, self._sweep)
        now_s = self.loop.time()
        timeouts = self.config.timeouts
        stalled_s = timeouts.client_stalled_s or float("inf")
        for client in tuple(self.clients):
            if client.deadline_s < now_s:
                client.timed_out()
            elif client.is_write_paused and now_s - client.paused_s > stalled_s:
                client.abort()
            elif client.exchange is not None:
                client.exchange.check_timeouts(now_s, timeouts.first_byte_s, timeouts.stalled_s)
        for instance in self.fleet:
            instance.pool.close_idle(now_s - timeouts.pool_idle_s)
        self.fleet.tick()
        if self.flow is not None:
            self.flow.sweep()
        if self.keys is not None:
            self.keys.refresh()
