"""Promises in HTTP headers: read when a request arrives, handed on to where it meets the engine.

A header becomes the entry of the same meaning in the request's ``vllm_xargs``.  The body is not
touched: it may be large, and to find ``vllm_xargs`` in it would mean to parse it twice.  The values
travel beside it in a context variable, which every task of the request inherits, and are merged by
`xllm_plugin.instance.gate` into the sampling parameters that vLLM has made of the body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xllm_plugin.errors import PromiseError
from xllm_plugin.scheduler.promise import (
    CLASS_KEY,
    PRIORITY_KEY,
    TENANT_KEY,
    TPOT_KEY,
    TTFT_KEY,
    Promise,
    read_promise,
)

__all__ = [
    "HEADERS",
    "PromiseMiddleware",
    "RequestContext",
    "current_request",
    "error_response",
    "promise_args",
    "with_headers",
]

HEADERS: Final[dict[str, str]] = {
    "x-xllm-ttft-ms": TTFT_KEY,
    "x-xllm-tpot-ms": TPOT_KEY,
    "x-xllm-class": CLASS_KEY,
    "x-xllm-priority": PRIORITY_KEY,
    "x-xllm-tenant": TENANT_KEY,
}
"""Request header -> key in ``vllm_xargs``."""

_KEY_OF: Final = {name.encode(): key for name, key in HEADERS.items()}
_HEADER_OF: Final = {key: name for name, key in HEADERS.items()}


@dataclass(slots=True)
class RequestContext:
    """What belongs to one HTTP request from its arrival to the end of its answer.

    Attributes:
        promise_args: what the headers promise, as entries of ``vllm_xargs``.
        response_headers: added to the answer when it starts.
        was_decided: whether admission has let it in; it decides once a request.
        at_end: called when the answer has ended, or the client has gone.
    """

    promise_args: dict[str, str] = field(default_factory=dict)
    response_headers: dict[str, str] = field(default_factory=dict)
    was_decided: bool = False
    at_end: list[Callable[[], None]] = field(default_factory=list)


current_request: ContextVar[RequestContext | None] = ContextVar("xllm_request", default=None)
"""The HTTP request that the running task belongs to; None outside of one."""


class PromiseMiddleware:
    """ASGI middleware: reads our request headers, refuses wrong ones, adds response headers.

    It passes every message on as it comes, so streams stay streams.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            context = RequestContext(promise_args(scope["headers"]))
        except PromiseError as error:
            refusal = error_response(400, "BadRequestError", str(error), param=error.field)
            await refusal(scope, receive, send)
            return
        token = current_request.set(context)
        try:
            await self._app(scope, receive, _with_headers(send, context))
        finally:
            current_request.reset(token)
            for end in context.at_end:
                end()


def promise_args(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """What the headers of a request promise, as entries of ``vllm_xargs``.

    Args:
        headers: as in an ASGI scope, names in lower case.

    Raises:
        PromiseError: a value is wrong, or a header is given twice; `.field` names the header.
    """
    found: dict[str, str] = {}
    for name, value in headers:
        key = _KEY_OF.get(name)
        if key is None:
            continue
        if key in found:
            header = _HEADER_OF[key]
            raise PromiseError(f"{header} is given twice; give it once.", field=header)
        found[key] = value.decode("latin-1")
    if found:
        _check(found)
    return found


def with_headers(
    extra_args: dict[str, Any] | None, context: RequestContext | None
) -> dict[str, Any] | None:
    """What a request asks for in its body and its headers, as `SamplingParams.extra_args`.

    The body wins: headers are what a gateway adds for clients that say nothing.
    """
    if context is None or not context.promise_args:
        return extra_args
    return {**context.promise_args, **(extra_args or {})}


def _check(found: dict[str, str]) -> None:
    try:
        read_promise(found, Promise())
    except PromiseError as error:
        header = _HEADER_OF[error.field]
        message = str(error).replace(error.field, header, 1)
        raise PromiseError(message, field=header) from error


def _with_headers(send: Send, context: RequestContext) -> Send:
    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start" and context.response_headers:
            ours = [(k.encode(), v.encode()) for k, v in context.response_headers.items()]
            message = {**message, "headers": [*message.get("headers", ()), *ours]}
        await send(message)

    return send_on


def error_response(
    status_code: int, kind: str, message: str, *, param: str | None = None
) -> Response:
    """Answer in the form of OpenAI's errors, as vLLM writes them."""
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": status_code}
    body = msgspec.json.encode({"error": error})
    return Response(body, status_code=status_code, media_type="application/json")
