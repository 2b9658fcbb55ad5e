"""The engine's end of the socket: one daemon thread that answers and never stops the engine.

Two kinds of calls:

* on the **server thread** (default): answered at once, also while a step runs.  The function must
  be quick and touch only what is immutable or locked: reading one reference, for example.
* on the **engine thread** (`on_engine_thread=True`): put in a `CallQueue`, executed when the
  scheduler drains it between two steps, answered after that.  The function may use the scheduler,
  which is single-threaded; its result must not be changed afterwards, since the server thread
  encodes it.  A call whose caller has stopped waiting is dropped, unless it has begun.

What a client does can end its own connection and nothing else: garbage and oversize frames get one
error reply and are closed, a client that does not read is dropped after `write_timeout_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from xllm_plugin.channel import paths
from xllm_plugin.channel.messages import (
    CallInfo,
    Failure,
    FrameReader,
    Reply,
    Request,
    decode_request,
    encode_frame,
    encode_reply,
)
from xllm_plugin.errors import ChannelError, InternalError, MisuseError, XllmError

__all__ = ["CallQueue", "ChannelServer"]

logger = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024
# More than any set of watchers needs, and few enough to leave the engine its file descriptors.
_MAX_CLIENTS = 64
_MAX_CALL_TIMEOUT_S = 300.0
_JOIN_TIMEOUT_S = 5.0


class CallQueue:
    """Calls on their way from the server thread to the engine thread."""

    def __init__(self) -> None:
        # deque's append, popleft and len are atomic, so the engine takes no lock per step.
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Queue `call`, from any thread; the future gets its result or error at a later drain."""
        future: Future[Any] = Future()
        self._waiting.append((call, future))
        return future

    def drain(self) -> int:
        """Execute, on the calling thread, what was queued before now; returns how many were.

        Costs well under a microsecond when nothing waits.  Never raises what a call raises.
        """
        if not self._waiting:
            return 0
        num_executed = 0
        for _ in range(len(self._waiting)):
            call, future = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            num_executed += 1
            try:
                result = call()
            except Exception as error:  # noqa: BLE001 - it belongs to the caller, not to the engine
                future.set_exception(error)
            else:
                future.set_result(result)
        return num_executed

    def __len__(self) -> int:
        return len(self._waiting)

    def cancel_all(self) -> None:
        """Give up on everything still queued."""
        while self._waiting:
            self._waiting.popleft()[1].cancel()


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[..., Any]
    signature: inspect.Signature
    info: CallInfo

    def bind(self, args: dict[str, Any]) -> Callable[[], Any]:
        """`function` with its arguments; raises MisuseError when they do not fit."""
        try:
            bound = self.signature.bind(**args)
        except TypeError as error:
            accepted = ", ".join(self.info.parameters) or "none"
            raise MisuseError(
                f"call {self.info.name!r}: {error}; got {sorted(args)}, parameters: {accepted}."
            ) from error
        return lambda: self.function(*bound.args, **bound.kwargs)


class ChannelServer:
    """Serves registered calls on one Unix socket.

    Args:
        path: of the socket, see `paths.socket_path`.
        on_queued: called on the server thread after a call was queued for the engine thread; wakes
            an engine that sleeps for want of requests.
        write_timeout_s: a client that takes no bytes for this long is dropped.
        max_clients: further ones are told so and closed.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_queued: Callable[[], None] | None = None,
        write_timeout_s: float = 5.0,
        max_clients: int = _MAX_CLIENTS,
    ) -> None:
        self.path = path
        self.engine_calls = CallQueue()
        self._on_queued = on_queued
        self._write_timeout_s = write_timeout_s
        self._max_clients = max_clients
        self._calls: dict[str, _Call] = {}
        self._clients: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._inode = 0
        self.register_call("ping", _ping)
        self.register_call("describe", self._describe)

    def register_call(
        self, name: str, function: Callable[..., Any], *, on_engine_thread: bool = False
    ) -> None:
        """Offer `function` as call `name`; its keyword parameters are the call's arguments.

        The first line of its docstring is what `describe` shows.  Which thread it runs on, and
        what it may do there, is in this module's docstring.

        Raises:
            InternalError: the name is taken.
        """
        if name in self._calls:
            raise InternalError(f"channel call {name!r} is registered twice; choose another name.")
        signature = inspect.signature(function)
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        info = CallInfo(
            name=name,
            summary=summary,
            parameters=tuple(str(parameter) for parameter in signature.parameters.values()),
            thread="engine" if on_engine_thread else "server",
        )
        self._calls[name] = _Call(function, signature, info)

    def start(self) -> None:
        """Listen, and answer from a thread of our own.

        Raises:
            ChannelError: another engine listens at the path.
            ConfigError: the path is too long, or its directory not private.
        """
        if self._thread is not None:
            raise InternalError(f"the channel server at {self.path} was started twice.")
        listener = paths.listen(self.path)
        self._inode = self.path.lstat().st_ino
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop, listener), name="xllm-channel", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread, close the clients, remove the socket file.  Safe to repeat."""
        if self._thread is None or self._loop is None:
            return
        thread, loop = self._thread, self._loop
        self._thread = self._loop = None
        paths.remove_socket(self.path, self._inode)
        self.engine_calls.cancel_all()
        # The loop is closed already if the thread has died.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._stop.set)
        thread.join(_JOIN_TIMEOUT_S)
        if thread.is_alive():  # a call hangs; the thread is a daemon and holds nothing on disk
            logger.warning("The channel thread of %s did not end in time.", self.path)

    def _run(self, loop: asyncio.AbstractEventLoop, listener: Any) -> None:
        try:
            loop.run_until_complete(self._serve(listener))
        finally:
            loop.close()

    async def _serve(self, listener: Any) -> None:
        server = await asyncio.start_unix_server(self._handle, sock=listener)
        await self._stop.wait()
        server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, from connect to close."""
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            self._check_room()
            await self._converse(reader, writer)
        except ChannelError as error:
            # Best effort: the client may be gone, and what it sent may not even be our protocol.
            writer.write(_failure_frame(0, error))
        except (TimeoutError, ConnectionError, asyncio.CancelledError):
            # Gone, not reading, or we are closing: this task ends here either way, and on
            # Python 3.11 asyncio logs a traceback for a cancelled one.
            writer.transport.abort()
        finally:
            self._clients.discard(task)
            writer.close()

    def _check_room(self) -> None:
        if len(self._clients) > self._max_clients:
            raise ChannelError(
                f"{self.path} already has {self._max_clients} clients. Close some, or keep one "
                "connection instead of opening one for each call."
            )

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        while data := await reader.read(_READ_BYTES):
            frames.receive(data)
            while (payload := frames.next_payload()) is not None:
                writer.write(await self._answer(decode_request(payload)))
                async with asyncio.timeout(self._write_timeout_s):
                    await writer.drain()

    async def _answer(self, request: Request) -> bytes:
        try:
            return encode_reply(request.id, await self._execute(request))
        except XllmError as error:
            return _failure_frame(request.id, error)
        except Exception as error:
            # A call's bug is its caller's to hear of; the next call must still be answered.
            logger.exception("Channel call %r failed.", request.call)
            bug = InternalError(f"call {request.call!r} failed: {type(error).__name__}: {error}")
            return _failure_frame(request.id, bug)

    async def _execute(self, request: Request) -> Any:
        call = self._calls.get(request.call)
        if call is None:
            raise MisuseError(
                f"unknown call {request.call!r}; this engine knows: {', '.join(self._calls)}."
            )
        bound = call.bind(request.args)
        if call.info.thread == "server":
            return bound()
        future = self.engine_calls.submit(bound)
        if self._on_queued is not None:
            self._on_queued()
        timeout_s = min(request.timeout_s, _MAX_CALL_TIMEOUT_S)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except TimeoutError as error:
            raise ChannelError(
                f"the engine took no step within {timeout_s:g} s to execute {request.call!r}; it "
                "may be in a long step. If it had not begun, it will not. Wait longer."
            ) from error

    def _describe(self) -> list[CallInfo]:
        """List the calls of this engine."""
        return [call.info for call in self._calls.values()]


def _ping() -> str:
    """Answer, to show that the process lives."""
    return "pong"


def _failure_frame(request_id: int, error: XllmError) -> bytes:
    return encode_frame(
        Reply(id=request_id, result=msgspec.Raw(b"\xc0"), failure=Failure.from_error(error))
    )
