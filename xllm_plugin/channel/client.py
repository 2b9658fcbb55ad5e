"""The other end of the socket, for a thread (`ChannelClient`) and for an event loop (`Async...`).

Both connect on first use, keep the connection, and drop it after any error of transport: a reply
that comes after its caller has given up must not be taken for the next one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from xllm_plugin.channel.messages import (
    CallInfo,
    FrameError,
    FrameReader,
    Request,
    Snapshot,
    encode_frame,
    result_of,
)
from xllm_plugin.errors import ChannelError

__all__ = ["AsyncChannelClient", "ChannelClient"]

_READ_BYTES = 64 * 1024
# The engine gives up on a queued call a little before its caller does, and can so say why.
_ENGINE_SHARE = 0.9


class ChannelClient:
    """Blocking client for one thread at a time.  A context manager; `close` when done.

    Args:
        path: of the engine's socket, see `find_engines`.
        timeout_s: for one call, connecting included.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        path: Path,
        timeout_s: float = 1.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._clock = clock
        self._ids = itertools.count(1)
        self._socket: socket.socket | None = None

    def snapshot(self) -> Snapshot:
        """The engine's latest snapshot.  Raises ChannelError."""
        snapshot: Snapshot = self._request("snapshot", {}, Snapshot)
        return snapshot

    def describe(self) -> list[CallInfo]:
        """What this engine can be asked.  Raises ChannelError."""
        calls: list[CallInfo] = self._request("describe", {}, list[CallInfo])
        return calls

    def call(self, name: str, **args: Any) -> Any:
        """Make a control call; its result, in plain values.

        Raises:
            ChannelError: the engine is not there, or did not answer in time.  A call that did not
                answer may still have been executed.
            XllmError: what the call itself raised in the engine.
        """
        return self._request(name, args, Any)

    def close(self) -> None:
        """Drop the connection; the next call opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, name: str, args: dict[str, Any], kind: Any) -> Any:
        request = _make_request(next(self._ids), name, args, self.timeout_s)
        frame = encode_frame(request)
        try:
            with _explained(self.path, self.timeout_s):
                payload = self._exchange(frame, self._clock() + self.timeout_s)
        except BaseException:  # an interrupted call leaves half an answer; raised again
            self.close()
            raise
        return _result(payload, request.id, kind, self.close)

    def _exchange(self, frame: bytes, deadline_s: float) -> bytes:
        connection = self._connected(deadline_s)
        connection.settimeout(self._remaining_s(deadline_s))
        connection.sendall(frame)
        frames = FrameReader()
        while (payload := frames.next_payload()) is None:
            connection.settimeout(self._remaining_s(deadline_s))
            frames.receive(_not_empty(connection.recv(_READ_BYTES)))
        return payload

    def _connected(self, deadline_s: float) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(self._remaining_s(deadline_s))
            self._socket.connect(str(self.path))
        return self._socket

    def _remaining_s(self, deadline_s: float) -> float:
        remaining_s = deadline_s - self._clock()
        if remaining_s <= 0:
            raise TimeoutError
        return remaining_s


class AsyncChannelClient:
    """The same for an event loop, which it never blocks.  Tasks may share it: calls take turns."""

    def __init__(self, path: Path, timeout_s: float = 1.0) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def snapshot(self) -> Snapshot:
        """As `ChannelClient.snapshot`."""
        snapshot: Snapshot = await self._request("snapshot", {}, Snapshot)
        return snapshot

    async def describe(self) -> list[CallInfo]:
        """As `ChannelClient.describe`."""
        calls: list[CallInfo] = await self._request("describe", {}, list[CallInfo])
        return calls

    async def call(self, name: str, **args: Any) -> Any:
        """As `ChannelClient.call`."""
        return await self._request(name, args, Any)

    async def close(self) -> None:
        """Drop the connection; the next call opens another."""
        if self._streams is not None:
            writer = self._streams[1]
            self._streams = None
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _request(self, name: str, args: dict[str, Any], kind: Any) -> Any:
        request = _make_request(next(self._ids), name, args, self.timeout_s)
        frame = encode_frame(request)
        with _explained(self.path, self.timeout_s):
            async with asyncio.timeout(self.timeout_s), self._turn:
                try:
                    payload = await self._exchange(frame)
                except BaseException:  # a cancelled call leaves half an answer; raised again
                    self._abort()
                    raise
        return _result(payload, request.id, kind, self._abort)

    async def _exchange(self, frame: bytes) -> bytes:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(str(self.path))
        reader, writer = self._streams
        writer.write(frame)
        await writer.drain()
        frames = FrameReader()
        while (payload := frames.next_payload()) is None:
            frames.receive(_not_empty(await reader.read(_READ_BYTES)))
        return payload

    def _abort(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


def _make_request(id_: int, name: str, args: dict[str, Any], timeout_s: float) -> Request:
    return Request(id=id_, call=name, args=args, timeout_s=timeout_s * _ENGINE_SHARE)


def _result(payload: bytes, request_id: int, kind: Any, drop: Callable[[], None]) -> Any:
    try:
        return result_of(payload, request_id, kind)
    except FrameError:
        drop()
        raise


def _not_empty(data: bytes) -> bytes:
    if not data:
        raise ConnectionResetError
    return data


@contextlib.contextmanager
def _explained(path: Path, timeout_s: float) -> Iterator[None]:
    """Turn what the system says into what to do about it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ChannelError(
            f"no engine listens at {path}. `xllm top` lists the running ones; `xllm serve MODEL` "
            "starts one."
        ) from error
    except TimeoutError as error:
        raise ChannelError(
            f"the engine at {path} did not answer within {timeout_s:g} s. It may be busy: try "
            "again, or allow more time."
        ) from error
    except PermissionError as error:
        raise ChannelError(
            f"{path} belongs to another user. Run as the user who started the engine."
        ) from error
    except ConnectionError as error:
        raise ChannelError(
            f"the engine at {path} is gone, or has closed the connection. See its log; `xllm top` "
            "lists the running ones."
        ) from error
    except OSError as error:
        raise ChannelError(f"cannot talk to the engine at {path}: {error}.") from error
