"""A service and its instances as processes, and clients that count: for tests that break them.

A test is a fault: a coroutine that is given a `Trial`, breaks something, and says what its clients
must have got.  `Chaos.trial` then mends what was broken, and finds out whether the service is alive
and counts nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import httpx
import msgspec
import yaml

from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.testing.chaos_instance import MODEL, TEXT, TOKENS, Behaviour, Entry
from xllm_plugin.testing.service_harness import PATIENCE_S, RawClient, wait_until

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "MAX_BODY_BYTES",
    "NAMES",
    "Chaos",
    "Fault",
    "Told",
    "Trial",
]

NAMES: Final = ("a", "b")
TOKEN: Final = "chaos"  # noqa: S105 - of an admin port on loopback
COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
MAX_BODY_BYTES: Final = 2**23
_LONG_S = 2 * PATIENCE_S


@dataclass(slots=True)
class Told:
    """What a client got of one stream."""

    user: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    num_counted: int | None = None
    """By its usage."""
    error: str = ""
    is_done: bool = False

    def require_whole(self) -> None:
        """Every token once, in order, as if nothing had happened."""
        assert not self.error, self.error
        assert self.tokens == TOKENS, f"{self.user}: {self.tokens}"
        assert (self.text, self.finish_reason) == (TEXT, "length")
        assert self.num_counted == len(TOKENS)
        assert self.is_done


class Chaos:
    """The processes: a service over two instances with the same model, `a` and `b`.

    Args:
        folder: for settings, logs and the journal.
        sections: of the service's settings.
    """

    def __init__(self, folder: Path, **sections: Any) -> None:
        self._folder = folder
        self._journal = folder / "journal"
        self._ports = {name: find_free_port() for name in NAMES}
        self.port, self.admin_port = find_free_port(), find_free_port()
        self.settings: dict[str, Any] = {
            "listen": {"host": "127.0.0.1", "port": self.port},
            "admin": {"port": self.admin_port, "token": TOKEN},
            "instances": {
                "static": [{"name": name, "url": self.url(name)} for name in NAMES],
                "probe_interval_s": 0.05,
                "probe_timeout_s": 20.0,
                "registration_token": TOKEN,
            },
            "routing": {"policy": "session", "hedge_after_s": None},
            "limits": {"max_body_bytes": MAX_BODY_BYTES},
        }
        for name, values in sections.items():
            self.settings[name] = {**self.settings.get(name, {}), **values}
        self._instances: dict[str, Server] = {}
        self._service: Server | None = None
        self._sessions: dict[str, str] = {}
        self._num_users = 0
        no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else the authorities are read each time
        self._client = httpx.Client(trust_env=False, timeout=PATIENCE_S, verify=no_tls)

    def __enter__(self) -> Self:
        self._journal.touch()
        try:
            with ThreadPoolExecutor(len(NAMES)) as pool:
                list(pool.map(self.start, NAMES))
            self.start_service()
            self._find_sessions()
        except BaseException:  # __exit__ does not run for what __enter__ raises; raised again
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop every process."""
        self._client.close()
        for server in (*self._instances.values(), self._service):
            if server is not None:
                server.stop()

    @property
    def service(self) -> Server:
        """The service's process."""
        assert self._service is not None
        return self._service

    def url(self, name: str) -> str:
        """Of an instance."""
        return f"http://127.0.0.1:{self._ports[name]}"

    # -- processes ------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start an instance, at the address that it has had."""
        arguments = ("--name", name, "--journal", str(self._journal))
        self._instances[name] = self._started(
            name, self._ports[name], "xllm_plugin.testing.chaos_instance", *arguments
        )

    def kill(self, name: str) -> None:
        """SIGKILL: it says nothing to anybody."""
        pid = self._instances[name].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def restart(self, name: str) -> None:
        """Start an instance that was killed."""
        self._instances[name].stop()
        self.start(name)

    def start_service(self) -> None:
        """Start the service; without a static list, its instances register there."""
        path = self._folder / "service.yaml"
        path.write_text(yaml.safe_dump(self.settings), encoding="utf-8")
        command = ("xllm_plugin.cli", "service", "--config", str(path))
        self._service = self._started("service", self.admin_port, *command)
        if not self.settings["instances"]["static"]:
            self.register()

    def register(self) -> None:
        """Register the instances at the service, as if they did it themselves."""
        url = f"http://127.0.0.1:{self.admin_port}/v1/registrations"
        headers = {"Authorization": f"Bearer {TOKEN}"}

        def is_registered(name: str) -> bool:
            asked = {"url": self.url(name), "name": name, "models": [MODEL], "incarnation": "1"}
            return self._client.post(url, json=asked, headers=headers).is_success

        for name in NAMES:
            self._until(partial(is_registered, name))

    def reload(self, sections: dict[str, Any]) -> None:
        """Change sections of the running service's settings, as a whole."""
        self.settings |= sections
        path = self._folder / "service.yaml"
        path.write_text(yaml.safe_dump(self.settings), encoding="utf-8")
        assert self.service.pid is not None
        os.kill(self.service.pid, signal.SIGHUP)

    def _started(self, name: str, port: int, module: str, *arguments: str) -> Server:
        is_service = module == "xllm_plugin.cli"
        ports = () if is_service else ("--port", str(port))
        server = Server(
            name,
            [sys.executable, "-m", module, *arguments, *ports],
            port=port,
            log_path=self._folder / f"{name}.{time.monotonic_ns()}.log",
            environment=clean_environment({"XDG_RUNTIME_DIR": str(self._folder)}),
            ready_timeout_s=_LONG_S,
            poll_s=0.03,
        )
        return server.__enter__()  # `close` stops it

    def _find_sessions(self) -> None:
        """For each instance a session whose place it is."""
        self._until(lambda: self._is_serving() and self._is_idle())
        for number in range(64):
            headers = {"x-session-id": str(number), "x-xllm-explain": "1", "connection": "close"}
            url = f"http://127.0.0.1:{self.port}{COMPLETIONS}"
            body = {"model": MODEL, "prompt": "x"}
            reply = self._client.post(url, json=body, headers=headers).raise_for_status()
            name = json.loads(reply.headers["x-xllm-explain"])["instance"]
            self._sessions.setdefault(name, str(number))
            if set(self._sessions) == set(NAMES):
                return
        raise AssertionError(f"of 64 sessions all have their place at {set(self._sessions)}")

    # -- a trial --------------------------------------------------------------------------------

    async def trial(self, fault: Fault, *, ends_service: bool = False) -> None:
        """Run one fault, then require that all is as it was before it; or it ends the service."""
        # A client that keeps connections may use one that is just being closed.
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            trial = Trial(self, session)
            try:
                await fault(trial)
            finally:
                await trial.close()
                await asyncio.to_thread(self._mend)
        if not ends_service:
            await asyncio.to_thread(self.require_idle)

    def _mend(self) -> None:
        """Start what was killed, have every instance behave, and take drains back."""
        admin = f"http://127.0.0.1:{self.admin_port}/v1/instances"
        for name in NAMES:
            with contextlib.suppress(httpx.TransportError):  # a test may have ended the service
                headers = {"Authorization": f"Bearer {TOKEN}"}
                self._client.post(f"{admin}/{name}/undrain", headers=headers)
            try:
                self._client.post(f"{self.url(name)}/chaos", content=b"{}")
            except httpx.TransportError:
                self.restart(name)

    def require_idle(self) -> None:
        """The service is alive, has its instances, and counts no request and no connection."""
        self._until(self._is_idle)
        self._until(lambda: self.metric("xllm_service_client_connections") == 0)
        assert self._is_serving()

    def _is_serving(self) -> bool:
        url = f"http://127.0.0.1:{self.port}/health"
        return self._client.get(url, headers={"connection": "close"}).is_success

    def _is_idle(self) -> bool:
        found = self.instances()
        counters = ("in_flight", "outstanding_tokens", "prefill_tokens")
        return all(found.get(name, {}).get("state") == "ready" for name in NAMES) and not any(
            one[counter] for one in found.values() for counter in counters
        )

    def instances(self) -> dict[str, Any]:
        """What the admin port says of each instance."""
        url = f"http://127.0.0.1:{self.admin_port}/v1/instances"
        reply = self._client.get(url, headers={"Authorization": f"Bearer {TOKEN}"})
        return {one["name"]: one for one in reply.json()["instances"]}

    def metric(self, name: str) -> float:
        """A metric of the service, over all labels."""
        text = self._client.get(f"http://127.0.0.1:{self.admin_port}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def _until(self, is_so: Callable[[], bool]) -> None:
        def is_so_while_it_lives() -> bool:
            self.service.check_alive()
            return is_so()

        wait_until(is_so_while_it_lives, self.service.log_path, _LONG_S, rest_s=0.01)

    # -- books ----------------------------------------------------------------------------------

    def next_user(self) -> str:
        """A name that no other stream has."""
        self._num_users += 1
        return f"user{self._num_users}"

    def session_of(self, name: str) -> str:
        """A session whose place is the instance of that name."""
        return self._sessions[name]

    def journal(self, user: str) -> list[Entry]:
        """What instances have sent of one stream, in order."""
        lines = self._journal.read_bytes().splitlines()
        entries = [msgspec.json.decode(line, type=Entry) for line in lines]
        return [entry for entry in entries if entry.user == user]

    def require_balance(self, user: str) -> list[str]:
        """Instances have sent each token of a stream, and where one went on, no gap was left.

        Returns:
            Who has sent some of it, in order.
        """
        furthest = 0
        positions: dict[str, int] = {}  # one that was left may send until it notices
        by: list[str] = []
        for entry in self.journal(user):
            if entry.begins is not None:
                assert entry.begins <= furthest, f"{user}: tokens {furthest} to {entry.begins}"
                positions[entry.by] = entry.begins
                by.append(entry.by)
            start, end = positions[entry.by], positions[entry.by] + len(entry.sent)
            assert entry.sent == TOKENS[start:end], f"{user}: {entry}"
            positions[entry.by] = end
            furthest = max(furthest, end)
        assert positions[by[-1]] == len(TOKENS), f"{user}: the last one stopped at {positions}"
        return by


class Trial:
    """One fault's clients.

    Args:
        chaos: the processes.
        session: of well-behaved clients.
    """

    def __init__(self, chaos: Chaos, session: aiohttp.ClientSession) -> None:
        self.chaos = chaos
        self._session = session
        self._writers: list[asyncio.StreamWriter] = []

    async def close(self) -> None:
        """Close the connections of clients."""
        for writer in self._writers:
            writer.close()

    # -- instances ------------------------------------------------------------------------------

    async def behave(self, name: str, **wishes: Any) -> None:
        """Have an instance behave so (`Behaviour`)."""
        body = msgspec.json.encode(Behaviour(**wishes))
        async with self._session.post(f"{self.chaos.url(name)}/chaos", data=body) as reply:
            assert reply.status == 200  # noqa: PLR2004

    async def count(self, name: str, what: str = "num_requests") -> int:
        """How many requests, probes aside, an instance has had; or how often it has lied."""
        async with self._session.get(f"{self.chaos.url(name)}/chaos") as reply:
            return int((await reply.json(content_type=None))[what])

    async def lie(self, name: str, lies: dict[str, str]) -> None:
        """Have probes of an instance told lies, and wait until they were, more than once."""
        before = await self.count(name, "num_lies")
        await self.behave(name, times=0, lies=lies)
        async with asyncio.timeout(_LONG_S):
            while await self.count(name, "num_lies") < before + 2:
                await asyncio.sleep(0.02)

    async def until(self, name: str, **expected: Any) -> None:
        """Wait until the admin port says so of an instance."""
        async with asyncio.timeout(_LONG_S):
            while True:
                found = await self.seen(name)
                if all(found[key] == value for key, value in expected.items()):
                    return
                await asyncio.sleep(0.01)

    async def seen(self, name: str) -> Any:
        """What the admin port says of an instance."""
        _, found = await self.admin("GET", "/v1/instances")
        return next(one for one in found["instances"] if one["name"] == name)

    async def admin(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Ask the admin port."""
        url = f"http://127.0.0.1:{self.chaos.admin_port}{path}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with self._session.request(method, url, json=body, headers=headers) as reply:
            return reply.status, await reply.json(content_type=None)

    @contextlib.asynccontextmanager
    async def settings(self, **sections: Any) -> AsyncIterator[None]:
        """Other settings of the service, taken over by a reload, and taken back."""
        before = {name: dict(self.chaos.settings.get(name, {})) for name in sections}
        await self._reload(sections)
        try:
            yield
        finally:
            await self._reload(before)

    async def _reload(self, sections: dict[str, Any]) -> None:
        self.chaos.reload(sections)
        async with asyncio.timeout(_LONG_S):
            while True:
                _, config = await self.admin("GET", "/v1/config")
                if all(
                    config[name][key] == value
                    for name, values in sections.items()
                    for key, value in values.items()
                ):
                    return
                await asyncio.sleep(0.01)

    # -- clients --------------------------------------------------------------------------------

    async def connect(self) -> RawClient:
        """A client that sends bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.chaos.port, limit=2**24)
        self._writers.append(writer)
        return RawClient(reader, writer)

    async def ask(self, body: dict[str, Any], *, first: str = "a") -> tuple[int, bytes]:
        """A request that is no stream; status and body of its answer."""
        url = f"http://127.0.0.1:{self.chaos.port}{COMPLETIONS}"
        headers = {"x-session-id": self.chaos.session_of(first)}
        body = {"model": MODEL, "prompt": "x", **body}
        async with self._session.post(url, json=body, headers=headers) as reply:
            return reply.status, await reply.read()

    async def stream(
        self,
        *,
        first: str = "a",
        path: str = COMPLETIONS,
        shows_ids: bool = True,
        began: asyncio.Event | None = None,
    ) -> Told:
        """Read one stream to its end.

        Args:
            first: the instance whose turn it is.
            path: of the request.
            shows_ids: whether the client asks for token ids; else it has no `tokens`.
            began: set at its first token.
        """
        told = Told(self.chaos.next_user())
        prompt: dict[str, Any] = {"messages": []} if path == CHAT else {"prompt": "x"}
        options = {"include_usage": True}
        body = {"model": MODEL, "stream": True, "user": told.user, **prompt}
        body |= {"return_token_ids": shows_ids, "stream_options": options}
        headers = {"x-session-id": self.chaos.session_of(first)}
        url = f"http://127.0.0.1:{self.chaos.port}{path}"
        async with self._session.post(url, json=body, headers=headers) as reply:
            if reply.status != 200:  # noqa: PLR2004
                told.error = f"HTTP {reply.status}: {await reply.text()}"
                return told
            async for line in reply.content:
                _take(told, line)
                if told.tokens and began is not None:
                    began.set()
        return told

    async def require_whole(self, *, first: str = "a", path: str = COMPLETIONS) -> list[str]:
        """Read a stream that loses nothing; who has sent some of it, in order."""
        told = await self.stream(first=first, path=path)
        told.require_whole()
        return self.chaos.require_balance(told.user)

    @contextlib.asynccontextmanager
    async def load(
        self, num_streams: int, *, first: str = "a", pause_s: float = 0.0
    ) -> AsyncIterator[list[asyncio.Task[Told]]]:
        """Streams that have begun when the block does, and lose nothing by what happens in it.

        Args:
            num_streams: how many.
            first: the instance whose turn it is.
            pause_s: between two events; 0 leaves the instance as it is.
        """
        if pause_s:
            await self.behave(first, times=0, pause_s=pause_s)
        began = [asyncio.Event() for _ in range(num_streams)]
        streams = [asyncio.create_task(self.stream(first=first, began=one)) for one in began]
        async with asyncio.timeout(_LONG_S):
            await asyncio.gather(*(one.wait() for one in began))
            yield streams
            for told in await asyncio.gather(*streams):
                told.require_whole()
                self.chaos.require_balance(told.user)


Fault = Callable[[Trial], Awaitable[None]]


def _take(told: Told, line: bytes) -> None:
    """One line of a stream."""
    content = line.removeprefix(b"data: ").strip()
    if content == b"[DONE]":
        told.is_done = True
        return
    if not content.startswith(b"{"):
        return
    event = json.loads(content)
    if "error" in event:
        told.error = event["error"]["message"]
        return
    for choice in event["choices"]:
        told.tokens += choice.get("token_ids") or []
        told.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        told.finish_reason = choice["finish_reason"] or told.finish_reason
    if event.get("usage"):
        told.num_counted = event["usage"]["completion_tokens"]
