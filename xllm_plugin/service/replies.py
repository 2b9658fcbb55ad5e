"""Answers that the service gives itself, in the form in which vLLM gives its errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

__all__ = ["Refusal", "error_body", "error_reply", "json_reply", "unknown_model"]

_MAX_MODEL_CHARS: Final = 256


class Refusal(Exception):  # noqa: N818 - an answer, not a fault of the program
    """A request that is answered with an error here, and goes no further."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "",
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Iterable[str] = (),
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = tuple(headers)
        self.close = close

    def reply(self) -> bytes:
        """The whole answer."""
        body = error_body(self.status, str(self), kind=self.kind, param=self.param)
        headers = self.headers
        if self.retry_after_s is not None:
            headers = (f"retry-after: {max(1, math.ceil(self.retry_after_s))}", *headers)
        return _reply(self.status, body, headers=headers, close=self.close)


_KINDS: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    413: "RequestEntityTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def error_body(status: int, message: str, *, kind: str = "", param: str | None = None) -> bytes:
    """The JSON object that OpenAI's clients read errors from."""
    kind = kind or _KINDS.get(status, "BadRequestError")
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}
    ).encode()


def error_reply(status: int, message: str, *, close: bool = False) -> bytes:
    """An error with nothing special about it."""
    return Refusal(status, message, close=close).reply()


def json_reply(payload: object, status: int = 200, *, close: bool = False) -> bytes:
    """A JSON answer."""
    return _reply(status, json.dumps(payload).encode(), close=close)


def unknown_model(model: str, known: Iterable[str]) -> Refusal:
    """404 with the names that would work."""
    names = ", ".join(f"`{name}`" for name in sorted(known)) or "none"
    asked = model[:_MAX_MODEL_CHARS]
    return Refusal(
        404, f"The model `{asked}` does not exist. Models served here: {names}.", param="model"
    )


def _reply(status: int, body: bytes, *, headers: Iterable[str] = (), close: bool = False) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *headers,
    ]
    if close:
        lines.append("connection: close")
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body
