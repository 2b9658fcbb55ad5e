"""Keeps the workers running.

::

    starting --Ready--> up --ended--> waiting, longer each time --> starting
        |                 |--stop--> draining --ended, or killed after the time--> ended
        |--it says why it cannot, before any was up--> the service does not start
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import xllm_plugin
from xllm_plugin.errors import InternalError, MisuseError, NotNowError, XllmError
from xllm_plugin.service.carrier import said
from xllm_plugin.service.processes.channel import Channel
from xllm_plugin.service.processes.messages import (
    CannotStart,
    FromControl,
    FromWorker,
    Ready,
    WhyNot,
    decoder,
    encode,
)

__all__ = ["Link", "Supervisor"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 10.0
_STEADY_S: Final = 10.0
"""One that was up for so long is started again without a longer pause."""
_GRACE_S: Final = 5.0
"""Beyond the drain's time, for ending."""
_SILENT_S: Final = 10.0
"""A worker whose event loop runs is heard much more often."""
_MODULE: Final = "xllm_plugin.service.processes.worker"


class Link:
    """One worker: the process that runs now, and the way to it.

    Args:
        index: its number, which its successors have too.
        descriptor: of the shared memory.
        received: is called with what it says, and this link.
    """

    def __init__(
        self, index: int, descriptor: int, received: Callable[[Link, FromWorker], None]
    ) -> None:
        self.index = index
        self.pid = 0
        self.is_up = False
        self.num_restarts = 0
        self.why_not: CannotStart | None = None
        self.ending = ""
        """How the last one ended."""
        self.heard_s = 0.0
        """When it last said something; it reports several times a second."""
        self._descriptor = descriptor
        self._received = received
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = asyncio.Event()

    @property
    def is_heard(self) -> bool:
        """Whether we are: it takes in what it is told."""
        return self._channel is None or self._channel.is_heard

    async def start(self) -> None:
        """Start a process; it knows nothing yet."""
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self._descriptor)
        # A few milliseconds; the event loop's own way knows no process groups.
        self._process = subprocess.Popen(  # noqa: ASYNC220
            [
                *(sys.executable, "-P", "-m", _MODULE),
                *(*map(str, descriptors), xllm_plugin.__version__),
            ],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            # A terminal's signals are for the control process.
            process_group=0,
        )
        theirs.close()
        self.pid = self._process.pid
        self.why_not = None
        self._closed.clear()
        self._channel = Channel(decoder(FromWorker), self._take, self._closed.set)
        channel = self._channel
        loop = asyncio.get_running_loop()
        self.heard_s = loop.time()
        await loop.create_unix_connection(lambda: channel, sock=ours)

    def say(self, message: FromControl) -> None:
        """Send a message."""
        if self._channel is not None:
            self._channel.send(encode(message))

    async def wait_ended(self) -> None:
        """Wait for its end; `ending` says how it was."""
        assert self._process is not None
        await self._closed.wait()
        self.is_up = False
        self._channel = None
        code = await asyncio.to_thread(self._process.wait)
        self.ending = f"was killed by signal {-code}" if code < 0 else f"has ended with code {code}"

    def trouble(self, now_s: float) -> str:
        """What is wrong with it at `now_s` of the loop's time, for people; empty: nothing."""
        if not self.is_up:
            return f"worker {self.index} {self.ending or 'is being started'}"
        silent_s = now_s - self.heard_s
        if silent_s > _SILENT_S:
            return f"worker {self.index} (pid {self.pid}) has said nothing for {silent_s:.0f} s"
        return ""

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()

    def _take(self, message: FromWorker) -> None:
        self.heard_s = asyncio.get_running_loop().time()
        if isinstance(message, CannotStart):
            self.why_not = message
        elif isinstance(message, Ready):
            self.is_up = True
        self._received(self, message)


class Supervisor:
    """Owns the workers' processes.

    Args:
        num_workers: how many.
        descriptor: of the shared memory.
        greet: is called with one that was started, to tell it what it has to know.
        received: is called with what workers say.
        lost: is called with one that has ended.
    """

    def __init__(
        self,
        num_workers: int,
        descriptor: int,
        *,
        greet: Callable[[Link], None],
        received: Callable[[Link, FromWorker], None],
        lost: Callable[[Link], None],
    ) -> None:
        self._greet = greet
        self._received = received
        self._lost = lost
        self._stopping = asyncio.Event()
        self._farewell: FromControl | None = None
        """Makes workers end, once that is wanted."""
        self._all_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.links = [Link(index, descriptor, self._take) for index in range(num_workers)]
        self._keeping: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all and wait until they are up.

        Raises:
            MisuseError: something has to be changed, a worker says.
            NotNowError: the port is taken, for example.
            InternalError: one has ended without a word.
        """
        self._keeping = [
            asyncio.create_task(said(self._keep(link), f"worker {link.index}"))
            for link in self.links
        ]
        await self._all_up

    async def stop(self, farewell: FromControl, within_s: float) -> None:
        """Have all end, and wait for it; those that do not are killed.

        Args:
            farewell: makes them end.
            within_s: they may take that long.
        """
        self._farewell = farewell
        self._stopping.set()
        self.say(farewell)
        if not self._keeping:
            return
        _, late = await asyncio.wait(self._keeping, timeout=within_s + _GRACE_S)
        for link, task in zip(self.links, self._keeping, strict=True):
            if task in late:
                logger.warning(
                    "worker %d (pid %d) does not end and is killed", link.index, link.pid
                )
                link.kill()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    def say(self, message: FromControl) -> None:
        """Send a message to all."""
        for link in self.links:
            link.say(message)

    async def _keep(self, link: Link) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            await self._run(link)
            if self._stopping.is_set():
                return
            if not self._all_up.done():
                self._all_up.set_exception(_why_not(link))
            if self._all_up.exception() is not None:
                return
            if time.monotonic() - began_s > _STEADY_S:
                pause_s = _FIRST_PAUSE_S
            logger.error(
                "worker %d (pid %d) %s; another one is started in %.1f s",
                *(link.index, link.pid),
                *(link.why_not.message if link.why_not else link.ending, pause_s),
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
                return
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            link.num_restarts += 1

    async def _run(self, link: Link) -> None:
        """One process from start to end."""
        try:
            await link.start()
        except OSError as error:
            link.ending = f"cannot be started ({error})"
            return
        self._greet(link)
        if self._farewell is not None:
            link.say(self._farewell)
        await link.wait_ended()
        self._lost(link)

    def _take(self, link: Link, message: FromWorker) -> None:
        self._received(link, message)
        if not self._all_up.done() and all(one.is_up for one in self.links):
            self._all_up.set_result(None)


def _why_not(link: Link) -> XllmError:
    word = link.why_not
    if word is None:
        return InternalError(
            f"worker {link.index} {link.ending} before it was up; see the log above."
        )
    kind = MisuseError if word.why is WhyNot.MISUSE else NotNowError
    return kind(word.message)


def _environment() -> dict[str, str]:
    """Ours; and the package that runs here is the one that is found, wherever that is.

    Where packages are installed it is found anyway.  In PYTHONPATH they all would come before the
    standard library, with which some share names.
    """
    found = Path(xllm_plugin.__file__).resolve().parents[1]
    sites = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        sites = [*sites, site.getusersitepackages()]
    if found in [Path(one).resolve() for one in sites]:
        return dict(os.environ)
    paths = [str(found), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
