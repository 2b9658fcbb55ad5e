"""Several servers, each started once and kept until it is not needed any more.

A start costs half a minute to two, a trial less.  One server runs at a time: the others are paused
(an idle vLLM server uses about 2 % of a core) and hold nothing but memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

from xllm_plugin.bench.peers import PeerServer
from xllm_plugin.bench.servers import Server, Waiting, group_cpu_s
from xllm_plugin.errors import NotNowError

__all__ = ["Fleet"]

NEEDED_BYTES = 3 * 2**30
"""Free memory that a start asks for: SmolLM2 with 1 GiB of KV cache holds about two."""


class Fleet:
    """Servers by name, for the length of a `with` block.

    Args:
        log_folder: gets a log for each.
        on_wait: told how a start goes.
    """

    def __init__(self, log_folder: Path, on_wait: Callable[[Waiting], None]) -> None:
        self.ready_s: dict[str, float] = {}
        self._log_folder = log_folder
        self._on_wait = on_wait
        self._servers: dict[str, Server] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # all are stopped, whatever one of them raises
            for name in list(self._servers):
                stack.callback(self.stop, name)

    def is_started(self, name: str) -> bool:
        """Whether it has been started and not stopped, be it paused."""
        return name in self._servers

    def server(self, peer: PeerServer) -> Server:
        """The server, started if need be, running, and all others paused.

        Raises `NotNowError` when there is too little memory for a start.
        """
        for name, other in self._servers.items():
            if name != peer.name:
                other.pause()
        if peer.name in self._servers:
            self._servers[peer.name].resume()
        else:
            self._require_memory(peer.name)
            log_path = self._log_folder / f"{peer.name}.log"
            server = peer.server(log_path, on_wait=self._on_wait)
            self._servers[peer.name] = server.__enter__()
            self.ready_s[peer.name] = server.ready_after_s
        return self._servers[peer.name]

    def stop(self, name: str) -> None:
        """Stop one.  Safe to repeat."""
        if server := self._servers.pop(name, None):
            server.stop()

    def waiting_cpu_s(self, name: str) -> float:
        """Processor seconds that all servers but this have used so far."""
        pids = [server.pid for other, server in self._servers.items() if other != name]
        return sum(group_cpu_s(pid) for pid in pids if pid is not None)

    def _require_memory(self, name: str) -> None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        free = int(sizes["MemAvailable"].split()[0]) * 1024
        if free < NEEDED_BYTES:
            raise NotNowError(
                f"{free / 2**30:.1f} GiB of memory are free with {len(self._servers)} servers "
                f"running, and {name!r} wants {NEEDED_BYTES / 2**30:.0f}; free some, or compare "
                "fewer sides"
            )
