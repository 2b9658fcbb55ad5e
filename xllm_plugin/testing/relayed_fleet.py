"""Real servers, a relay before each, and a real `xllm service` over the relays.

For tests in which streams lose their server: the relays break connections where they are told to,
and the servers live on for the next test.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from xllm_plugin.bench.peers import PeerServer
from xllm_plugin.bench.servers import LOOPBACK, Server, clean_environment, find_free_port
from xllm_plugin.testing.relay import Cut, Relay
from xllm_plugin.testing.service_harness import wait_until

__all__ = ["RelayedFleet"]

PATIENCE_S = 600.0
READY_TIMEOUT_S = 900.0
_ADMIN_TOKEN = "admin"  # noqa: S105 - of a service on loopback that ends with its test
# In turns, so that a stream and the one that it is compared with begin at different servers.
_SETTINGS = (
    "routing.policy=round-robin",
    "instances.probe_interval_s=0.2",
    f"admin.token={_ADMIN_TOKEN}",
)


class RelayedFleet:
    """What a test asks, and what it breaks.

    Args:
        make: how a server of some kind is started; gets the kind, and its place in the fleet.
        paths: streams at these can be cut.
        num_servers: at most.
        folder: gets logs.
        stack: stops what is started.
    """

    def __init__(
        self,
        make: Callable[[str, int], PeerServer],
        paths: tuple[str, ...],
        *,
        num_servers: int,
        folder: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self.cuts: deque[Cut] = deque()
        """What is to happen to the next streams, wherever they go."""
        self.relays = [stack.enter_context(Relay(paths, self.cuts)) for _ in range(num_servers)]
        self.servers: list[Server | None] = [None] * num_servers
        self._kinds = [""] * num_servers
        self._make = make
        self._folder = folder
        self._stack = stack
        self._port, self._admin_port = find_free_port(), find_free_port()
        self._client = stack.enter_context(httpx.Client(timeout=PATIENCE_S, trust_env=False))
        stack.enter_context(self._service())

    @property
    def url(self) -> str:
        """Of the service."""
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def num_resumes(self) -> int:
        """Streams that broke, and that the service wanted continued."""
        return sum(one["resumes"] for one in self.instances())

    def have(self, *kinds: str) -> None:
        """Have a server of each kind in its place, all ready; those that run already stay."""
        new: list[tuple[int, str, Server]] = []
        for number, kind in enumerate(kinds):
            if self._kinds[number] == kind:
                continue
            self.kill(number)
            peer = self._make(kind, number)
            self.relays[number].port = peer.port
            log_path = self._folder / f"{number}-{kind}.log"
            new.append((number, kind, peer.server(log_path, ready_timeout_s=READY_TIMEOUT_S)))
        with ThreadPoolExecutor(len(kinds)) as pool:
            list(pool.map(self._stack.enter_context, [server for _, _, server in new]))
        for number, kind, server in new:
            self.servers[number], self._kinds[number] = server, kind
        self.until_ready()

    def kill(self, number: int) -> None:
        """`kill -9`, if it runs."""
        server, self.servers[number], self._kinds[number] = self.servers[number], None, ""
        if server is not None:
            assert server.pid is not None
            os.killpg(server.pid, signal.SIGKILL)
            server.stop()

    def until_ready(self) -> None:
        """Wait until the service has seen that all servers are well."""
        wait_until(
            lambda: {one["state"] for one in self.instances()} == {"ready"},
            self._folder / "service.log",
        )

    def instances(self) -> list[Any]:
        """What the service says of them."""
        headers = {"Authorization": f"Bearer {_ADMIN_TOKEN}"}
        url = f"http://{LOOPBACK}:{self._admin_port}/v1/instances"
        found: list[Any] = self._client.get(url, headers=headers).json()["instances"]
        return found

    def post(self, path: str, body: dict[str, Any], *cuts: Cut) -> str:
        """The answer of the service, cut off there on its way to it; every cut has to happen."""
        self.until_ready()
        num_cut = sum(relay.num_cut for relay in self.relays)
        self.cuts.extend(cuts)
        reply = self._client.post(self.url + path, json=body)
        assert reply.status_code == httpx.codes.OK, reply.text
        assert not self.cuts
        assert sum(relay.num_cut for relay in self.relays) == num_cut + len(cuts)
        return reply.text

    def post_http_1_0(self, path: str, body: bytes, *cuts: Cut) -> str:
        """The same by a client of 1996."""
        self.until_ready()
        self.cuts.extend(cuts)
        head = f"POST {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        with socket.create_connection((LOOPBACK, self._port), PATIENCE_S) as connection:
            connection.sendall(head.encode() + body)
            answered = b"".join(iter(lambda: connection.recv(65536), b""))
        assert not self.cuts
        return answered.partition(b"\r\n\r\n")[2].decode()

    def _service(self) -> Server:
        command = [sys.executable, "-m", "xllm_plugin.cli", "service", "--host", LOOPBACK]
        command += ["--port", str(self._port), "--admin-port", str(self._admin_port)]
        for relay in self.relays:
            command += ["--instance", relay.url]
        for setting in _SETTINGS:
            command += ["--set", setting]
        return Server(
            "service",
            command,
            port=self._admin_port,
            log_path=self._folder / "service.log",
            environment=clean_environment({}),
        )
