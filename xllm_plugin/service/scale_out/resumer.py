"""Stands in for `POST /v1/xllm/resume` where a server has the scale-out routes and not this plugin.

It is reached as an instance is, by a connection; each is a pair of sockets that nobody else can
open.  So what an `Exchange` does with an instance's answer (pause it, leave it, take its break for
one) holds for a translated one too, and the way of all other requests knows nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Final

import aiohttp
import msgspec
from aiohttp import web

from xllm_plugin.instance.resumption import REASON_HEADER, Resumption
from xllm_plugin.service.replies import error_body
from xllm_plugin.service.scale_out.continuation import Continuation, begun
from xllm_plugin.service.scale_out.events import error_event
from xllm_plugin.service.scale_out.server import NotContinuedError, ScaleOutServer

if TYPE_CHECKING:
    from xllm_plugin.service.fleet import Instance

__all__ = ["Resumer"]

logger = logging.getLogger(__name__)

_MAX_FIELD_BYTES: Final = 2**20
_MAX_REASON: Final = 500
_BAD_GATEWAY: Final = 502
_OWN_HEADERS: Final = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "expect",
        "host",
        "transfer-encoding",
    }
)
"""Of the client's request: those of ours differ."""

_decode: Final = msgspec.json.Decoder(Resumption).decode


class Resumer:
    """Makes connections that continue streams at servers without this plugin.

    Args:
        session: asks servers, with the certificates that they are shown.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def open(self, instance: Instance) -> socket.socket:
        """One end of a connection that answers as `instance` would if it had this plugin."""
        ours, theirs = socket.socketpair()

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            return await self._answer(instance, request)

        server = web.Server(
            answer,
            handler_cancellation=True,  # whose client has gone is not generated for
            access_log=None,
            max_line_size=_MAX_FIELD_BYTES,
            max_field_size=_MAX_FIELD_BYTES,
        )
        ours.setblocking(False)
        try:
            await asyncio.get_running_loop().create_unix_connection(server, sock=theirs)
        except BaseException:  # also cancelled; raised again
            ours.close()
            theirs.close()
            raise
        return ours

    async def _answer(self, instance: Instance, request: web.BaseRequest) -> web.StreamResponse:
        try:
            resumption = _decode(await request.content.read())
            server = self._server(instance, resumption.path, request)
            adapters = {name for name, record in instance.models.items() if record.get("parent")}
            found = await begun(server, resumption, adapters)
            return await self._stream(found, request)
        except NotContinuedError as error:
            return _refused(error)
        except (aiohttp.ClientError, OSError) as error:
            # As an instance that dies: no answer, or half of one.
            logger.info("instance %s: %s", instance.name, error or type(error).__name__)
            return _hung_up(request)

    async def _stream(self, found: Continuation, request: web.BaseRequest) -> web.StreamResponse:
        async with found.open() as events:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            response.enable_chunked_encoding()
            response.force_close()
            await response.prepare(request)
            try:
                async for event in events:
                    await response.write(event)
            except NotContinuedError as error:
                await response.write(error_event(str(error), _BAD_GATEWAY))
            await response.write_eof()
            return response

    def _server(self, instance: Instance, path: str, request: web.BaseRequest) -> ScaleOutServer:
        headers = request.headers.copy()
        for name in _OWN_HEADERS:
            headers.popall(name, None)
        headers["content-type"] = "application/json"
        headers["accept-encoding"] = "identity"
        url, connect_s = instance.entry.url.rstrip("/"), instance.pool.connect_timeout_s
        return ScaleOutServer(self._session, url, path, headers, connect_s=connect_s)


def _refused(error: NotContinuedError) -> web.Response:
    message = str(error)
    words = "".join(c if c.isascii() and c.isprintable() else " " for c in message).split()
    return web.Response(
        status=error.status,
        body=error_body(error.status, message),
        headers={REASON_HEADER: " ".join(words)[:_MAX_REASON], "connection": "close"},
        content_type="application/json",
    )


def _hung_up(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=_BAD_GATEWAY)  # nobody gets it
