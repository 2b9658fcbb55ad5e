"""Talks to etcd: one client that waits, for a server's registrar, and one for an event loop.

Both follow the same script (`_Talk`): members are asked in turn until one answers, and a token is
fetched where there are users, and again when it has run out.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Generator
from typing import Any, Self, TypeVar

import httpx

from xllm_plugin.errors import EtcdError
from xllm_plugin.etcd.config import EtcdAccess, EtcdAddress, tls_context
from xllm_plugin.etcd.wire import (
    WATCH_PATH,
    Call,
    Event,
    authenticate,
    read_events,
    refusal,
    watch_body,
)

__all__ = ["AsyncEtcdClient", "EtcdClient"]

Answer = TypeVar("Answer")
_DEADLINE_EXCEEDED, _UNAVAILABLE, _UNAUTHENTICATED = 4, 14, 16
"""Codes of gRPC: with the first two another member may do better."""
_AUTH_CHANGED = "revision of auth store is old"


class _Talk:
    """What is asked of whom next.

    Does no IO: requests are yielded, what came of them is sent in.
    """

    def __init__(self, address: EtcdAddress, access: EtcdAccess) -> None:
        self._endpoints = deque(address.endpoints)
        self._access = access
        self._token = ""
        self._timeout = httpx.Timeout(access.command_timeout_s, connect=access.dial_timeout_s)

    def ask(
        self, call: Call[Answer]
    ) -> Generator[httpx.Request, httpx.Response | Exception, Answer]:
        """Get an answer from whoever gives one.  Raises `EtcdError`."""
        problems = []
        for _ in range(len(self._endpoints)):
            endpoint = self._endpoints[0]
            try:
                return (yield from self._ask_member(call))
            except EtcdError as error:
                if error.code not in (None, _DEADLINE_EXCEEDED, _UNAVAILABLE):
                    raise
                problems.append(f"{endpoint}: {error}")
                if self._endpoints[0] == endpoint:  # else another exchange has met the same
                    self._endpoints.rotate(-1)
        raise EtcdError("; ".join(problems))

    def request(self, path: str, body: Any) -> httpx.Request:
        """A request to the member that answered last."""
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = self._token
        return httpx.Request(
            "POST",
            self._endpoints[0] + path,
            content=json.dumps(body),
            headers=headers,
            extensions={"timeout": self._timeout.as_dict()},
        )

    def _ask_member(
        self, call: Call[Answer]
    ) -> Generator[httpx.Request, httpx.Response | Exception, Answer]:
        if self._access.user and not self._token:
            yield from self._authenticate()
        try:
            return (yield from self._exchange(call))
        except EtcdError as error:
            is_old = error.code == _UNAUTHENTICATED or _AUTH_CHANGED in str(error)
            if not self._token or not is_old:
                raise
        # Tokens run out, a member that was restarted knows none, and users or roles may change.
        self._token = ""
        yield from self._authenticate()
        return (yield from self._exchange(call))

    def _authenticate(self) -> Generator[httpx.Request, httpx.Response | Exception, None]:
        password = self._access.password
        assert password is not None
        self._token = yield from self._exchange(
            authenticate(self._access.user, password.get_secret_value())
        )

    def _exchange(
        self, call: Call[Answer]
    ) -> Generator[httpx.Request, httpx.Response | Exception, Answer]:
        reply = yield self.request(call.path, call.body)
        if isinstance(reply, Exception):
            raise EtcdError(f"{type(reply).__name__}: {reply}".rstrip(": ")) from reply
        if reply.status_code != httpx.codes.OK:
            raise refusal(reply.status_code, reply.content)
        try:
            return call.read(reply.json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EtcdError(
                f"{call.path} is answered with nonsense: {reply.text[:200]!r}"
            ) from error


class EtcdClient:
    """Waits for each answer.  Not for an event loop.

    Args:
        address: of the cluster.
        access: how to talk to it.

    Raises:
        ConfigError: a TLS file cannot be read.
    """

    def __init__(self, address: EtcdAddress, access: EtcdAccess) -> None:
        self._talk = _Talk(address, access)
        # Proxies of the environment lead out of the cluster.
        self._http = httpx.Client(verify=tls_context(access), trust_env=False)

    def send(self, call: Call[Answer]) -> Answer:
        """One exchange.  Raises `EtcdError` if no member answers, or one says no."""
        talk = self._talk.ask(call)
        request = next(talk)
        while True:
            reply: httpx.Response | Exception
            try:
                reply = self._http.send(request)
            except httpx.HTTPError as error:
                reply = error
            try:
                request = talk.send(reply)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    def close(self) -> None:
        """Close its connections."""
        self._http.close()


class AsyncEtcdClient:
    """The same for an event loop, and watches.  Arguments and errors as `EtcdClient`."""

    def __init__(self, address: EtcdAddress, access: EtcdAccess) -> None:
        self._talk = _Talk(address, access)
        self._command_timeout_s = access.command_timeout_s
        self._http = httpx.AsyncClient(verify=tls_context(access), trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(self, call: Call[Answer]) -> Answer:
        """One exchange.  Raises `EtcdError` if no member answers, or one says no."""
        talk = self._talk.ask(call)
        request = next(talk)
        while True:
            reply: httpx.Response | Exception
            try:
                async with asyncio.timeout(
                    self._command_timeout_s
                ):  # of drops that come slowly too
                    reply = await self._http.send(request)
            except (httpx.HTTPError, TimeoutError) as error:
                reply = error
            try:
                request = talk.send(reply)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    async def watch(
        self, prefix: str, from_revision: int
    ) -> AsyncGenerator[tuple[Event, ...], None]:
        """Every change from `from_revision` on, in order; first of all, nothing: it has begun.

        The member that answered last is watched.  It says nothing while nothing changes: whether it
        is still there is for reads to find out.  Close the generator when it is no longer followed.

        Raises:
            EtcdError: the watch was ended or broke: read again from where it is now.
        """
        request = self._talk.request(WATCH_PATH, watch_body(prefix, from_revision))
        # A member that loses its leader shall end the watch, not go on in silence.
        request.headers["Grpc-Metadata-hasleader"] = "true"
        request.extensions = {"timeout": {**request.extensions["timeout"], "read": None}}
        try:
            reply = await self._http.send(request, stream=True)
            try:
                if reply.status_code != httpx.codes.OK:
                    raise refusal(reply.status_code, await reply.aread())
                async for line in reply.aiter_lines():
                    if line:
                        yield read_events(line)
            finally:
                await reply.aclose()
        except httpx.HTTPError as error:
            raise EtcdError(f"the watch broke: {type(error).__name__}: {error}") from error
        raise EtcdError("the watch was closed.")
