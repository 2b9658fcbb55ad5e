"""A TCP relay before a server; it breaks a stream off where it is told to, as a crash would.

What the server wrote before is there, what it writes after is not, and its connection is closed.
So a test has a server that dies at a certain byte, without the time to start another.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections import deque
from dataclasses import dataclass
from typing import Self

__all__ = ["Cut", "Relay"]

LOOPBACK = "127.0.0.1"
_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a stream is broken off.

    Attributes:
        num_times: after `what` has passed so often.
        what: bytes of the answer; by default the end of an event.
        num_bytes: that pass after them: by default a piece of the next event.
    """

    num_times: int = 1
    what: bytes = b"\n\n"
    num_bytes: int = 12


class Relay:
    """Listens on a port of its own for a server on loopback.

    Args:
        paths: POST requests for these are streams that can be cut.
        cuts: each is used for one stream, in turn; without any, streams pass whole.  Relays may
            share them.
    """

    def __init__(self, paths: tuple[str, ...], cuts: deque[Cut]) -> None:
        self.port = 0
        """Of the server; may change while the relay runs."""
        self.cuts = cuts
        self.num_cut = 0
        """Streams that were broken off."""
        self.starts = tuple(b"POST %b " % path.encode() for path in paths)
        self._server = _Server((LOOPBACK, 0), _Handler)
        self._server.relay = self
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64
    relay: Relay


class _Handler(socketserver.BaseRequestHandler):
    """One connection: two threads, one for each direction."""

    server: _Server
    request: socket.socket
    _cutter: _Cutter | None = None

    def handle(self) -> None:
        """Relay until either side closes, or the stream is cut."""
        with contextlib.suppress(OSError):
            address = (LOOPBACK, self.server.relay.port)
            with self.request, socket.create_connection(address) as server:
                requests = threading.Thread(target=self._requests, args=(server,), daemon=True)
                requests.start()
                self._answers(server)
                _hang_up(self.request)
                _hang_up(server)
                requests.join()

    def _requests(self, server: socket.socket) -> None:
        relay = self.server.relay
        with contextlib.suppress(OSError):
            while data := self.request.recv(_READ_BYTES):
                if data.startswith((b"POST ", b"GET ")):
                    is_cut = data.startswith(relay.starts) and relay.cuts
                    self._cutter = _Cutter(relay.cuts.popleft()) if is_cut else None
                server.sendall(data)
        _hang_up(server)

    def _answers(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(_READ_BYTES):
                cutter = self._cutter
                passed = cutter.take(data) if cutter is not None else data
                self.request.sendall(passed)
                if cutter is not None and cutter.is_over:
                    self.server.relay.num_cut += 1
                    return


class _Cutter:
    """How much of one answer passes."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._num_left = cut.num_times
        self._num_bytes_left = cut.num_bytes
        self._before = b""
        """The end of what has passed, in which `what` may have begun."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to pass."""
        return not self._num_left and not self._num_bytes_left

    def take(self, data: bytes) -> bytes:
        """What passes of the next bytes."""
        seen, end = self._before + data, 0
        start = len(self._before)
        what = self._cut.what
        while self._num_left:
            found = seen.find(what, end)
            if found < 0:
                self._before = seen[max(end, len(seen) - len(what) + 1) :]
                return data
            end = found + len(what)
            self._num_left -= 1
        self._before = b""
        end = max(end, start)
        rest = seen[end : end + self._num_bytes_left]
        self._num_bytes_left -= len(rest)
        return seen[start:end] + rest


def _hang_up(connection: socket.socket) -> None:
    """Wake whoever reads it, on either side."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
