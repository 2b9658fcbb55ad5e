"""A proxy between real sockets: scripted instances behind it, raw clients in front.

For tests of the service, and of routing policies that a plugin brings.  Besides, what tests of a
whole service share: a client of its admin port, and waiting for what a process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from xllm_plugin.service import lifecycle
from xllm_plugin.service.app import Service
from xllm_plugin.service.config import InstanceEntry, ListenConfig, ServiceConfig
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.policies import least_loaded
from xllm_plugin.service.policy import RoutingPolicy
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.router import Router
from xllm_plugin.service.upstream import Pool
from xllm_plugin.testing.fake_instance import FakeInstance

__all__ = [
    "PATIENCE_S",
    "Harness",
    "RawClient",
    "RunningService",
    "make_pool",
    "request",
    "serving",
    "wait_until",
]

PATIENCE_S = 30.0
"""Bounds a test that hangs; says nothing about speed."""


class RawClient:
    """A client that sends and sees bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Write without waiting."""
        self.writer.write(data)

    async def read_answer(self) -> tuple[bytes, bytes]:
        """Head and body of one answer, the body as framed on the wire."""
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lower = head.lower()
            if b"transfer-encoding: chunked" in lower:
                return head, await self._chunks()
            if b"content-length:" in lower:
                length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
                return head, await self.reader.readexactly(length)
            return head, await self.reader.read()

    async def read_all(self) -> bytes:
        """Everything until the service closes."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def _chunks(self) -> bytes:
        parts: list[bytes] = []
        while True:
            line = await self.reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            parts += (line, await self.reader.readexactly(size + 2))
            if not size:
                return b"".join(parts)


def make_pool(entry: InstanceEntry) -> Pool:
    """Connections to one instance, without TLS."""
    return Pool(entry.host, entry.port, tls=None, connect_timeout_s=5.0)


class Harness:
    """A proxy, its fleet and its fake instances."""

    def __init__(self, proxy: Proxy, port: int, instances: list[FakeInstance]) -> None:
        self.proxy = proxy
        self.port = port
        self.instances = instances
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> RawClient:
        """Open a connection to the proxy."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        self.writers.append(writer)
        return RawClient(reader, writer)

    async def ask(self, raw: bytes) -> tuple[bytes, bytes]:
        """One request on its own connection; head and body of its answer."""
        client = await self.connect()
        client.send(raw)
        answer = await client.read_answer()
        client.writer.close()
        return answer

    async def settle(self) -> None:
        """Wait until no request runs, then check that none is counted."""
        async with asyncio.timeout(PATIENCE_S):
            while any(client.exchange for client in self.proxy.clients):
                await asyncio.sleep(0.002)
        self.proxy.fleet.check_integrity()


class RunningService:
    """A whole service in this process, and a client of its admin port.

    Args:
        service: started.
        session: of the client.
        token: of the admin port.
    """

    def __init__(self, service: Service, session: aiohttp.ClientSession, token: str) -> None:
        self.service = service
        self.session = session
        self._token = token

    async def admin(
        self, method: str, path: str, body: Any = None, token: str | None = None
    ) -> tuple[int, Any]:
        """Status and answer of one request; JSON is read."""
        url = f"http://127.0.0.1:{self.service.admin_port}{path}"
        headers = {"Authorization": f"Bearer {token or self._token}"}
        async with self.session.request(method, url, json=body, headers=headers) as reply:
            text = await reply.text()
            return reply.status, json.loads(text) if text.startswith("{") else text

    def states(self) -> dict[str, State]:
        """Of all instances, by name."""
        return {one.name: one.life.state for one in self.service.fleet}

    async def until(self, **states: State | None) -> None:
        """Wait until instances are so; names without their host: p1234=State.READY; None: gone."""
        wanted = {f"127.0.0.1:{name[1:]}": state for name, state in states.items()}
        async with asyncio.timeout(PATIENCE_S):
            while any(self.states().get(name) is not state for name, state in wanted.items()):
                await asyncio.sleep(0.005)


def wait_until(
    is_so: Callable[[], bool],
    log: Path,
    patience_s: float = 4 * PATIENCE_S,
    *,
    rest_s: float = 0.05,
) -> None:
    """Ask again until it is so; who is asked may not listen yet.

    Raises:
        AssertionError: it is not so in time; says what `log` says.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if is_so():
                return
        assert time.monotonic() < deadline_s, log.read_text(encoding="utf-8")
        time.sleep(rest_s)


def request(
    body: bytes = b'{"model":"fake"}',
    path: bytes = b"/v1/completions",
    method: bytes = b"POST",
    headers: bytes = b"",
) -> bytes:
    """The bytes of a request."""
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    return b"%b %b HTTP/1.1\r\nHost: test\r\n%b%b\r\n%b" % (method, path, headers, length, body)


@contextlib.asynccontextmanager
async def serving(
    *instances: FakeInstance, policy: Any = least_loaded, sweep_s: float = 0.02, **sections: Any
) -> AsyncIterator[Harness]:
    """A proxy over `instances`, all ready; `sections` are sections of `ServiceConfig`."""
    config = ServiceConfig(listen=ListenConfig(host="127.0.0.1", port=0), **sections)
    fleet = Fleet(
        config.instances.timings(),
        make_pool,
    )
    router = Router(
        fleet,
        RoutingPolicy("tested", "", policy),
        num_decisions=16,
        retry_after_s=config.routing.retry_after_s,
        clock=time.time,
    )
    proxy = Proxy(config, fleet, router)
    async with contextlib.AsyncExitStack() as stack:
        for instance in instances:
            await stack.enter_async_context(instance)
            known = fleet.register(InstanceEntry(url=instance.url), source="test")
            fleet.set_models(known, {name: {"id": name} for name in instance.models})
            fleet.report(known, lifecycle.Alive(""))
        port = await proxy.listen(sweep_s)
        harness = Harness(proxy, port, list(instances))
        try:
            yield harness
        finally:
            for writer in harness.writers:
                writer.close()
            await proxy.drain(0.0)
            await asyncio.sleep(0.01)
            assert proxy.bodies.num_bytes == 0, "what a client held is let go with it"
