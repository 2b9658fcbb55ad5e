"""One process that carries traffic: `python -m` this module, CHANNEL MEMORY VERSION.

It is told who is there and what is wanted, and says what it met.  It ends when it is told to, and
when the control process is gone: in both cases it accepts nothing more and finishes what runs,
within `timeouts.drain_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys

import aiohttp

import xllm_plugin
from xllm_plugin.errors import ConfigError, MisuseError, NotNowError
from xllm_plugin.service.carrier import Carrier, MakePool, said
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.lifecycle import Timings
from xllm_plugin.service.process import loop_factory, prepare_process
from xllm_plugin.service.processes.channel import Channel
from xllm_plugin.service.processes.limits import WorkerKeyRing
from xllm_plugin.service.processes.messages import (
    CannotStart,
    CutOff,
    Drain,
    FleetNews,
    FromControl,
    FromWorker,
    Keys,
    Owner,
    OwnerAnswer,
    OwnerQuestion,
    Ready,
    Settings,
    Start,
    WhyNot,
    decoder,
    encode,
    settings_from,
)
from xllm_plugin.service.processes.mirror import MirrorFleet
from xllm_plugin.service.processes.reports import Reporter
from xllm_plugin.service.processes.shared import SharedMemory
from xllm_plugin.service.processes.worker_proxy import WorkerProxy
from xllm_plugin.service.router import Router

__all__ = ["REPORT_S", "Worker", "main"]

logger = logging.getLogger(__name__)

REPORT_S = 0.25
_OWNER_TIMEOUT_S = 1.0


class Worker:
    """Everything that runs in this process.  `run` is its life.

    Args:
        channel: this end of the socket.
        descriptor: of the shared memory.
    """

    memory: SharedMemory
    carrier: Carrier
    fleet: MirrorFleet

    def __init__(self, channel: socket.socket, descriptor: int) -> None:
        self.num_workers = 0
        self.keys: Keys | None = None
        """In force, as the control process has said."""
        self._socket = channel
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(decoder(FromControl), self._take, self._lost)
        self._started: asyncio.Future[Start | None] = self._loop.create_future()
        """None: the control process has gone before."""
        self._stopping = asyncio.Event()
        self._questions: dict[str, asyncio.Future[str]] = {}
        self._pending: list[FromControl] = []
        """What came before it was ready to take it."""
        self._is_open = False
        self._is_lost = False
        self._closed = asyncio.Event()

    async def run(self) -> None:
        """Carry traffic until told to stop."""
        await self._loop.create_unix_connection(lambda: self._channel, sock=self._socket)
        self._loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        start = await self._started
        if start is None:
            return
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._open(start, stack)
            except (MisuseError, NotNowError) as error:
                why = WhyNot.MISUSE if isinstance(error, MisuseError) else WhyNot.NOT_NOW
                self.say(CannotStart(why, str(error)))
                await self._hang_up()
                return
            await self._stopping.wait()
            if self._is_lost:
                logger.error("the control process has gone; finishing what runs")
            await self.carrier.drain(self.carrier.config.timeouts.drain_s)
            self._report()
        await self._hang_up()

    def say(self, message: FromWorker) -> None:
        """Send a message to the control process."""
        self._channel.send(encode(message))

    async def owner_of(self, response_id: str) -> str:
        """Name of the instance that has made a response at another worker; empty: unknown."""
        if not self._channel.is_heard:
            return ""  # nobody would answer in time
        answer = self._questions.get(response_id)
        if answer is None:
            answer = self._questions[response_id] = self._loop.create_future()
            self.say(OwnerQuestion(response_id))
        try:
            return await asyncio.wait_for(asyncio.shield(answer), _OWNER_TIMEOUT_S)
        except TimeoutError:
            return ""
        finally:
            if self._questions.get(response_id) is answer:  # else somebody has asked again
                del self._questions[response_id]

    # -- start ----------------------------------------------------------------------------------

    async def _open(self, start: Start, stack: contextlib.AsyncExitStack) -> None:
        config = settings_from(start.settings.sections)
        prepare_process(config.log, f"worker {start.index}: ")
        self.num_workers, self.keys = start.num_workers, start.settings.keys
        self.memory = SharedMemory(
            start.num_workers, descriptor=self._descriptor, writer=start.index
        )
        self.carrier = Carrier(config, make_fleet=self._make_fleet, make_proxy=self._make_proxy)
        self.carrier.router.tell_owner = self._tell_owner
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.carrier.tls, limit=0))
        )
        self.carrier.prepare(session, stack)
        self._is_open = True
        self.fleet.take(start.fleet)
        # What has come meanwhile: not before the fleet is there.
        for message in self._pending:
            self._take(message)
        following = asyncio.create_task(said(self.carrier.follow_caches(), "following KV events"))
        stack.callback(following.cancel)
        await self.carrier.listen(start.port)
        self._reporter = Reporter(self.carrier.proxy, self.fleet)
        self._report()  # before `Ready`, so that it knows what it was told
        self.say(Ready())
        reporting = asyncio.create_task(said(self._keep_reporting(), "reporting"))
        stack.callback(reporting.cancel)

    def _make_fleet(self, timings: Timings, make_pool: MakePool) -> Fleet:
        self.fleet = MirrorFleet(
            timings,
            make_pool,
            loads=self.memory.instances,
            tell=self.say,
            clock=self._loop.time,
        )
        return self.fleet

    def _make_proxy(self, config: ServiceConfig, fleet: Fleet, router: Router) -> WorkerProxy:
        return WorkerProxy(config, fleet, router, self)

    # -- messages -------------------------------------------------------------------------------

    def _take(self, message: FromControl) -> None:
        if not self._is_open and not isinstance(message, Start):
            self._pending.append(message)
            return
        match message:
            case Start():
                self._started.set_result(message)
            case Settings():
                self._reconfigure(message)
            case Keys():
                self._take_keys(message)
            case FleetNews():
                self.fleet.take(message)
            case OwnerAnswer():
                answer = self._questions.get(message.response_id)
                if answer is not None and not answer.done():
                    answer.set_result(message.name)
            case Drain():
                self._stopping.set()
            case CutOff():
                self._stopping.set()
                self.carrier.proxy.cut_off()

    def _reconfigure(self, settings: Settings) -> None:
        self.keys = settings.keys
        try:
            self.carrier.use_certificates(self.carrier.read_certificates())
        except ConfigError as error:  # the control process could read it a moment ago
            logger.error("%s The certificates stay as they were.", error)  # noqa: TRY400
        self.carrier.reconfigure(settings_from(settings.sections))
        if self.keys is not None:
            self._take_keys(self.keys)

    def _take_keys(self, keys: Keys) -> None:
        self.keys = keys
        ring = self.carrier.proxy.keys
        if isinstance(ring, WorkerKeyRing):
            ring.take(keys)

    def _lost(self) -> None:
        self._closed.set()
        self._is_lost = not self._stopping.is_set()
        self._stopping.set()
        if not self._started.done():
            self._started.set_result(None)

    def _tell_owner(self, response_id: str, name: str) -> None:
        if self._channel.is_heard:
            self.say(Owner(response_id, name))

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            self._report()

    def _report(self) -> None:
        if self._channel.is_heard:  # else the counters are kept until it is
            self.say(self._reporter.report())

    async def _hang_up(self) -> None:
        self._channel.close()
        await self._closed.wait()


async def _work(channel: socket.socket, descriptor: int) -> None:
    await Worker(channel, descriptor).run()


def main() -> None:
    """Run as the control process has started it."""
    channel, descriptor, version = sys.argv[1:]
    if version != xllm_plugin.__version__:
        sys.exit(
            f"xllm: this is {xllm_plugin.__version__}, and the service that runs is {version}; "
            "restart it."
        )
    # Both are for the control process: a terminal sends them to everybody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_work(socket.socket(fileno=int(channel)), int(descriptor)))


if __name__ == "__main__":
    main()
