"""Asks one server's scale-out routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import aiohttp
import msgspec

from xllm_plugin.service.answers import read_at_most
from xllm_plugin.service.scale_out.messages import Derendered, GenerateChunk, Rendered
from xllm_plugin.service.stream_events import StreamEvent

__all__ = ["GENERATE_PATH", "NotContinuedError", "ScaleOutServer", "events_of"]

GENERATE_PATH: Final = "/inference/v1/generate"
_CALL_TIMEOUT_S: Final = 30.0
_MAX_ANSWER_BYTES: Final = 64 * 2**20
_MAX_SAID: Final = 300
_OK: Final = 200
_END: Final = b"\n\n"
_DATA: Final = b"data: "
_DONE: Final = b"data: [DONE]"
_UNREADABLE: Final = (msgspec.DecodeError, ValueError, RecursionError)

_decode_rendered: Final = msgspec.json.Decoder(Rendered).decode
_decode_several: Final = msgspec.json.Decoder(list[Rendered]).decode
_decode_derendered: Final = msgspec.json.Decoder(Derendered).decode
_decode_chunk: Final = msgspec.json.Decoder(GenerateChunk).decode
_decode_fault: Final = msgspec.json.Decoder(StreamEvent).decode


class NotContinuedError(Exception):
    """The server lives, and does not continue the stream; says why.

    Attributes:
        status: 400 if nobody without this plugin could, else 502.
    """

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class ScaleOutServer:
    """One server, as asked for one stream.

    Every method raises `NotContinuedError` for an answer that is of no use, and `OSError` or
    `aiohttp.ClientError` where the server has gone.

    Args:
        session: with the certificates that servers are shown.
        url: of the server, without a slash at its end.
        path: of the original request.
        headers: of the original request, as they are for servers.
        connect_s: to open a connection.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        path: str,
        headers: Mapping[str, str],
        *,
        connect_s: float,
    ) -> None:
        self._session = session
        self._url = url
        self._path = path
        self._headers = headers
        self._connect_s = connect_s

    async def render(self, body: bytes) -> Rendered:
        """Which tokens the prompt of `body` has, and how it is sampled."""
        path = f"{self._path}/render"
        said = await self._call(path, body)
        try:
            if self._path != "/v1/completions":
                return _decode_rendered(said)
            (found,) = _decode_several(said)
        except _UNREADABLE as error:
            raise NotContinuedError(f"{path} answers what is no rendered request") from error
        return found

    async def derender(self, body: bytes) -> Derendered:
        """The text of some tokens."""
        path = f"{self._path}/derender"
        said = await self._call(path, body)
        try:
            return _decode_derendered(said)
        except _UNREADABLE as error:
            raise NotContinuedError(f"{path} answers what is no derendered chunk") from error

    @contextlib.asynccontextmanager
    async def generate(self, body: bytes) -> AsyncIterator[aiohttp.StreamReader]:
        """The answer's body, events; leaving early ends the work."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s)
        async with self._post(GENERATE_PATH, body, timeout) as reply:
            if reply.status != _OK or reply.content_type != "text/event-stream":
                said = await _read(reply)
                raise NotContinuedError(_said(GENERATE_PATH, reply.status, said))
            yield reply.content

    async def _call(self, path: str, body: bytes) -> bytes:
        timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S, sock_connect=self._connect_s)
        try:
            try:
                return await self._call_once(path, body, timeout)
            except aiohttp.ServerDisconnectedError:  # it may have closed an idle connection
                return await self._call_once(path, body, timeout)
        except TimeoutError as error:
            raise NotContinuedError(f"{path} does not answer in {_CALL_TIMEOUT_S:g} s") from error

    async def _call_once(self, path: str, body: bytes, within: aiohttp.ClientTimeout) -> bytes:
        async with self._post(path, body, within) as reply:
            said = await _read(reply)
            if reply.status != _OK:
                raise NotContinuedError(_said(path, reply.status, said))
            return said

    def _post(self, path: str, body: bytes, timeout: aiohttp.ClientTimeout) -> Any:
        return self._session.post(
            self._url + path,
            data=body,
            headers=self._headers,
            timeout=timeout,
            allow_redirects=False,
        )


async def events_of(content: aiohttp.StreamReader) -> AsyncIterator[list[GenerateChunk | None]]:
    """What has come of a generated stream, whole events together; None is its last one.

    Raises:
        NotContinuedError: something is no event.
        ConnectionError: it ends before its last one.
    """
    rest = b""
    async for data in content.iter_any():
        *whole, rest = (rest + data).split(_END)
        if len(rest) > _MAX_ANSWER_BYTES:
            raise NotContinuedError(f"{GENERATE_PATH} sends an event of over {len(rest)} bytes")
        found = [_event(one) for one in whole if one.startswith(_DATA)]
        if found:
            yield found
        if None in found:
            return
    raise ConnectionError(f"{GENERATE_PATH} ended the stream before its last event")


def _event(event: bytes) -> GenerateChunk | None:
    if event == _DONE:
        return None
    try:
        return _decode_chunk(event[len(_DATA) :])
    except _UNREADABLE as error:
        raise NotContinuedError(f"{GENERATE_PATH} sends an event that is none") from error


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    try:
        return await read_at_most(reply, _MAX_ANSWER_BYTES, reply.url.path)
    except ValueError as error:
        raise NotContinuedError(str(error)) from error


def _said(path: str, status: int, body: bytes) -> str:
    """An error in a line; vLLM's have a message."""
    try:
        fault = _decode_fault(body).error
    except _UNREADABLE:
        fault = None
    message = fault.message[:_MAX_SAID] if fault is not None else ""
    return f"{path} answers {status}" + (f": {message}" if message else "")
