"""The floor: a relay that reads nothing, so that its CPU time is the kernel's sockets and the loop.

``python relay.py --port N http://127.0.0.1:8001 http://127.0.0.1:8002`` joins each connection of a
client to one of its own to a backend, in turn, and carries bytes both ways.  It knows of no
request: nothing is parsed, chosen, counted or retried.  What reads requests cannot cost less on
this loop.
"""

from __future__ import annotations

import asyncio
from itertools import cycle
from typing import cast
from urllib.parse import urlsplit

import click
import uvloop


class Leg(asyncio.Protocol):
    """One of two connections; what comes in goes out of the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Leg | None = None
        self._early: list[bytes] = []
        """Read before the other leg stood."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """One end is gone: so is the other."""
        del exc
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        if self.other is None:
            self._early.append(data)
            return
        assert self.other.transport is not None
        self.other.transport.write(data)

    def pause_writing(self) -> None:
        """The receiver is slow: so is the sender."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def join(self, other: Leg) -> None:
        """Carry bytes to `other` from now on, those first that came before."""
        self.other = other
        if self._early:
            self.data_received(b"".join(self._early))
            self._early.clear()


class ClientLeg(Leg):
    """A client's connection, which is given one to a backend.

    Args:
        loop: that runs.
        port: of the backend.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, port: int) -> None:
        super().__init__()
        self._loop = loop
        self._port = port
        self._opening: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open the other leg."""
        super().connection_made(transport)
        self._opening = self._loop.create_task(self._open())

    async def _open(self) -> None:
        assert self.transport is not None
        try:
            _, leg = await self._loop.create_connection(Leg, "127.0.0.1", self._port)
        except OSError:
            self.transport.abort()
            return
        if self.transport.is_closing():
            assert leg.transport is not None
            leg.transport.close()
            return
        leg.other = self
        self.join(leg)


async def _serve(port: int, backends: list[int]) -> None:
    loop, turns = asyncio.get_running_loop(), cycle(backends)
    server = await loop.create_server(lambda: ClientLeg(loop, next(turns)), "127.0.0.1", port)
    await server.serve_forever()


@click.command()
@click.option("--port", type=int, required=True)
@click.argument("urls", nargs=-1, required=True)
def main(port: int, urls: tuple[str, ...]) -> None:
    """Serve until killed."""
    backends = [urlsplit(url).port or 80 for url in urls]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(port, backends))


if __name__ == "__main__":
    main()
