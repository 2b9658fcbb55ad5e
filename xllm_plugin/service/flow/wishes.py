"""What a request was promised, read from its headers and its body as an instance reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from xllm_plugin.errors import PromiseError
from xllm_plugin.scheduler.promise import (
    KEYS,
    PRIORITY_KEY,
    TENANT_KEY,
    TPOT_KEY,
    TTFT_KEY,
    Promise,
    read_promise,
)
from xllm_plugin.service.policy import Slo
from xllm_plugin.service.replies import Refusal

__all__ = [
    "HEADERS",
    "NO_WISHES",
    "TENANT_HEADER",
    "Wishes",
    "for_tenant",
    "read_wishes",
    "with_ttft_left",
]

HEADERS: Final = {b"x-" + key.replace("_", "-").encode(): key for key in KEYS}
"""Request header -> key in ``vllm_xargs``; `instance/promises.py` has the same."""

TENANT_HEADER: Final = b"x-xllm-tenant"
_DEFAULT: Final = Promise()
_TTFT_LINE: Final = re.compile(rb"(\r\nx-xllm-ttft-ms:)[^\r\n]*", re.IGNORECASE)
_INFINITE: Final = float("inf")


class Wishes(NamedTuple):
    """A promise, and which parts of it the request has named itself."""

    promise: Promise
    has_ttft: bool = False
    has_tenant: bool = False
    slo: Slo | None = None
    """What of it a policy weighs, from the request's arrival on; None: it has named none."""

    @property
    def is_offline(self) -> bool:
        """Whether nobody waits for it."""
        return self.slo is not None and self.slo.is_offline

    @property
    def max_wait_s(self) -> float:
        """Seconds from arrival after which the answer would be too late; inf without a promise."""
        is_bound = self.has_ttft and self.promise.is_online
        return self.promise.ttft_ms / 1e3 if is_bound else _INFINITE


NO_WISHES: Final = Wishes(_DEFAULT)


def read_wishes(headers: Mapping[str, str], xargs: Any, priority: Any) -> Wishes:
    """The promise of one request.

    Args:
        headers: by the keys of `HEADERS`.
        xargs: `vllm_xargs` of its body; they win over headers, as in an instance.
        priority: of its body, vLLM's own field.

    Raises:
        Refusal: 400, a value is wrong.
    """
    if not headers and xargs is None and priority is None:
        return NO_WISHES
    given: dict[str, Any] = dict(headers)
    if isinstance(xargs, dict):
        given.update(xargs)
    if isinstance(priority, int) and not isinstance(priority, bool):
        given.setdefault(PRIORITY_KEY, priority)
    if not given:
        return NO_WISHES
    try:
        promise = read_promise(given, _DEFAULT)
    except PromiseError as error:
        raise _wrong(error, headers, xargs) from error
    return Wishes(promise, TTFT_KEY in given, TENANT_KEY in given, _slo(promise, given))


def for_tenant(wishes: Wishes, tenant: str) -> Wishes:
    """The same for the tenant that a key names."""
    return wishes._replace(promise=replace(wishes.promise, tenant=tenant))


def with_ttft_left(head: bytes, left_ms: float) -> bytes:
    """The head of a request that has waited here: its promise is shorter by that time.

    Only the header is rewritten: a promise in the body reaches the instance as it was.

    Args:
        head: as it goes to the instance.
        left_ms: until its first token is due.
    """
    return _TTFT_LINE.sub(rb"\1 %d" % max(1, int(left_ms)), head)


def _slo(promise: Promise, given: Mapping[str, Any]) -> Slo | None:
    if not promise.is_online:
        return Slo(is_offline=True)
    if TTFT_KEY not in given and TPOT_KEY not in given:
        return None
    return Slo(
        promise.ttft_ms / 1e3 if TTFT_KEY in given else _INFINITE,
        promise.tpot_ms / 1e3 if TPOT_KEY in given else _INFINITE,
    )


def _wrong(error: PromiseError, headers: Mapping[str, str], xargs: Any) -> Refusal:
    field, message = error.field, str(error)
    if field in headers and not (isinstance(xargs, dict) and field in xargs):
        header = "x-" + field.replace("_", "-")
        return Refusal(400, message.replace(field, header, 1), param=header)
    return Refusal(400, message, param=field)
