"""The service with two workers, which are real processes; the control process is this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import xllm_plugin
from xllm_plugin.errors import MisuseError, NotNowError
from xllm_plugin.service.config import InstanceEntry, ServiceConfig
from xllm_plugin.service.key_file import KeyRecord, hash_of, make_key, write
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.processes import control, supervisor
from xllm_plugin.service.processes.control import ControlService
from xllm_plugin.service.processes.messages import FleetNews, Keys
from xllm_plugin.service.processes.supervisor import Link
from xllm_plugin.service.processes.worker import main
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer, stream
from xllm_plugin.testing.service_harness import PATIENCE_S, RawClient, request

TOKEN, KEY = "a secret", make_key()
SHOWN = f"Authorization: Bearer {KEY}\r\n".encode()


class Running:
    """A started service, and raw clients of it."""

    def __init__(self, service: ControlService, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.session = session
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> RawClient:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.service.port)
        self.writers.append(writer)
        return RawClient(reader, writer)

    async def clients(self, number: int) -> list[RawClient]:
        """So many that one worker alone has them once in 2 ** (number - 1) runs."""
        return [await self.connect() for _ in range(number)]

    async def ask_all(self, clients: list[RawClient], raw: bytes) -> list[int]:
        """A request on every connection; the statuses."""
        return [_status(await self.ask(client, raw)) for client in clients]

    @staticmethod
    async def ask(client: RawClient, raw: bytes) -> bytes:
        client.send(raw)
        head, _ = await client.read_answer()
        return head

    async def admin(self, path: str) -> Any:
        url = f"http://127.0.0.1:{self.service.admin_port}{path}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with self.session.get(url, headers=headers) as reply:
            text = await reply.text()
            assert reply.status == 200, text
            return json.loads(text) if text.startswith("{") else text

    @property
    def links(self) -> Any:
        return self.service._supervisor.links

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await asyncio.sleep(0.01)


def _status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1])


def settings(static: list[str], **sections: Any) -> ServiceConfig:
    found: dict[str, Any] = {
        "listen": {"host": "127.0.0.1", "port": 0},
        "admin": {"port": 0, "token": TOKEN},
        "instances": {"probe_interval_s": 0.05, "static": static},
        "timeouts": {"drain_s": PATIENCE_S},
        "continuation": {"enabled": False},
        "service": {"processes": 2},
        **sections,
    }
    return ServiceConfig(**found)


@contextlib.asynccontextmanager
async def running(config: ServiceConfig, load: Any = None) -> AsyncIterator[Running]:
    service = ControlService(config, load)
    async with contextlib.AsyncExitStack() as unless_started:
        unless_started.push_async_callback(service.abandon)
        await service.start()
        unless_started.pop_all()
    async with aiohttp.ClientSession() as session:
        it = Running(service, session)
        try:
            yield it
        finally:
            for writer in it.writers:
                writer.close()
            await service.stop()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Gate:
    """Holds answers back until it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.num_waiting = 0

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        self.num_waiting += 1
        await self.opened.wait()
        await answer()(received, writer)


def test_two_workers_from_start_to_end(run: Any, tmp_path: Path) -> None:
    """One load, one limit a key, one sum of metrics; a worker that dies costs its sockets alone."""
    keys = tmp_path / "keys.yaml"
    write(keys, [KeyRecord(name="ann", sha256=hash_of(KEY), max_concurrency=4)])

    async def check() -> None:
        async with FakeInstance() as a, FakeInstance() as b:
            static, files = [a.url, b.url], {"keys": {"file": keys}}
            configs = [settings(static, **files, routing={"policy": "least-loaded"})]
            async with running(configs[0], lambda: configs[-1]) as it:
                ready = [State.READY] * 2
                await it.until(lambda: [one.life.state for one in it.service.fleet] == ready)
                await until_workers_agree(it)
                clients = await it.clients(16)
                assert await it.ask_all(clients, request(headers=SHOWN)) == [200] * 16
                assert await it.ask_all(await it.clients(8), request()) == [401] * 8
                await check_figures(it)
                await check_limit_and_load(it, clients, a, b)
                await check_owner(it, clients, a, b)
                await check_reload(it, clients, configs, static, files)
                await check_death(it, a, b)
                pids = [link.pid for link in it.links]
                client = await it.connect()
                a.script = b.script = stream(*[b"data: x\n\n"] * 20, pause_s=0.02)
                client.send(request(b'{"model":"fake","stream":true}', headers=SHOWN))
                await client.reader.readuntil(b"\r\n\r\n")
                await it.service.stop()
                rest = await client.read_all()
                assert rest.endswith(b"0\r\n\r\n"), "what runs is finished"
                assert rest.count(b"data: x") == 20
                assert not any(map(is_alive, pids))
                with pytest.raises(ConnectionRefusedError):
                    await it.connect()

    run(check())


async def until_workers_agree(it: Running) -> None:
    """Until every worker has taken in how things are now."""
    number = it.service._ledger.number + 1
    for audience in it.service._audiences.values():
        audience.has_heard_else = True
    it.service._publish()
    await it.until(lambda: it.service._ledger.is_taken(number))


async def settled(it: Running) -> None:
    """Until nothing runs; then nothing is counted."""
    await it.until(lambda: not any(one.in_flight for one in it.service.fleet))
    it.service.fleet.check_integrity()


async def check_figures(it: Running) -> None:
    def num_answers() -> int:
        return sum(one.stats.answered.get(200, 0) for one in it.service.fleet)

    proxy = it.service.proxy
    await it.until(lambda: (num_answers(), proxy.num_clients) == (16, 16))
    await it.until(lambda: proxy.refusals == {401: 8})
    assert all(one.num_clients for one in proxy.workers), "the kernel has spread them"
    metrics = await it.admin("/metrics")
    assert 'xllm_service_refusals_total{status="401"} 8.0' in metrics
    for worker in (0, 1):
        assert f'xllm_service_worker_up{{worker="{worker}"}} 1.0' in metrics
    assert "xllm_service_client_connections 16.0" in metrics
    assert 'xllm_service_key_requests_total{key="ann"} 16.0' in metrics
    assert 'xllm_service_decisions_total{cause="load",policy="least-loaded"} 16.0' in metrics
    overview = await it.admin("/v1/overview")
    assert (overview["clients"], overview["degraded"]) == (16, [])
    assert len((await it.admin("/v1/decisions"))["decisions"]) == 16


async def check_limit_and_load(
    it: Running, clients: list[RawClient], a: FakeInstance, b: FakeInstance
) -> None:
    gate = Gate()
    a.script = b.script = gate
    for number, client in enumerate(clients[:4]):
        client.send(request(headers=SHOWN))
        await it.until(lambda number=number: gate.num_waiting == number + 1)  # type: ignore[misc]
    assert await it.ask_all(clients[4:], request(headers=SHOWN)) == [429] * 12
    shown = (await it.admin("/v1/instances"))["instances"]
    assert [one["in_flight"] for one in shown] == [2, 2], "each saw what the others had booked"
    (key,) = (await it.admin("/v1/keys"))["keys"]
    assert key["in_flight"] == 4
    gate.opened.set()
    assert [_status((await client.read_answer())[0]) for client in clients[:4]] == [200] * 4
    a.script = b.script = answer()
    assert await it.ask_all(clients[:4], request(headers=SHOWN)) == [200] * 4
    await settled(it)


async def check_owner(
    it: Running, clients: list[RawClient], a: FakeInstance, b: FakeInstance
) -> None:
    """A response is asked for where it was made, whichever worker gets the question."""
    a.script = answer(b'{"id":"resp_a"}')
    b.script = answer(b'{"id":"resp_b"}')
    made = request(b'{"model":"fake","input":"x"}', b"/v1/responses", headers=SHOWN)
    clients[0].send(made)
    _, body = await clients[0].read_answer()
    owner, other = (a, b) if body == b'{"id":"resp_a"}' else (b, a)
    before = len(owner.requests), len(other.requests)
    path = b"/v1/responses/" + json.loads(body)["id"].encode()
    asked = request(b"", path, b"GET", SHOWN)
    assert await it.ask_all(clients, asked) == [200] * 16
    assert (len(owner.requests), len(other.requests)) == (before[0] + 16, before[1])
    a.script = b.script = answer()


async def check_reload(
    it: Running, clients: list[RawClient], configs: list[Any], static: list[str], files: Any
) -> None:
    flow = {"enabled": True, "max_in_flight": 8}
    configs.append(settings(static, **files, flow=flow, routing={"policy": "session"}))
    it.service.reload()
    it.service.router.decisions.clear()

    def policies() -> list[str]:
        return [decision.policy for decision in it.service.router.decisions]

    async with asyncio.timeout(PATIENCE_S):
        while policies()[-16:] != ["session"] * 16:
            await it.ask_all(clients, request(headers=SHOWN))
            await asyncio.sleep(0.05)
    configs.append(settings(static, **files, routing={"policy": "no such"}))
    it.service.reload()
    assert await it.ask_all(clients, request(headers=SHOWN)) == [200] * 16
    assert (await it.admin("/v1/queue"))["queue"] == []


async def check_death(it: Running, a: FakeInstance, b: FakeInstance) -> None:
    """Killed with requests on it: they are lost, the other worker's are not, and it comes back."""
    gate = Gate()
    a.script = b.script = gate
    before = {link.index: link.pid for link in it.links}
    holders = []
    for number in range(4):
        holders.append(await it.connect())
        holders[-1].send(request(headers=SHOWN))
        await it.until(lambda number=number: gate.num_waiting == number + 1)  # type: ignore[misc]
    os.kill(before[0], signal.SIGKILL)
    await it.until(lambda: "worker" in it.service.fleet.troubles)
    table = it.service._memory.keys
    assert table.total(0, 0) == sum(one.in_flight for one in it.service.fleet) < 5
    num_left = table.total(0, 0)
    gate.opened.set()
    begun = await asyncio.gather(*(_first_bytes(client) for client in holders))
    assert sum(one == b"HTTP/1.1 200" for one in begun) == num_left
    assert sum(one == b"" for one in begun) == 4 - num_left
    a.script = b.script = answer()
    await it.until(lambda: all(link.is_up for link in it.links))
    await it.until(lambda: "worker" not in it.service.fleet.troubles)
    assert [link.num_restarts for link in it.links] == [1, 0]
    assert it.links[0].pid != before[0]
    assert it.links[1].pid == before[1]
    await until_workers_agree(it)
    clients = await it.clients(16)
    assert await it.ask_all(clients, request(headers=SHOWN)) == [200] * 16
    await it.until(lambda: all(one.num_clients for one in it.service.proxy.workers))
    await settled(it)
    assert 'worker_restarts_total{worker="0"} 1.0' in await it.admin("/metrics")


async def _first_bytes(client: RawClient) -> bytes:
    """Empty if the connection was lost instead."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await client.reader.read(12)
        except ConnectionResetError:
            return b""


def test_a_worker_that_says_nothing_is_said(run: Any) -> None:
    async def check() -> None:
        link = Link(1, -1, lambda *_: None)
        assert link.trouble(0.0) == "worker 1 is being started"
        link.is_up, link.heard_s = True, 100.0
        assert link.trouble(105.0) == ""
        assert "worker 1 (pid 0) has said nothing for 12 s" in link.trouble(112.0)
        link.is_up, link.ending = False, "was killed by signal 9"
        assert link.trouble(112.0) == "worker 1 was killed by signal 9"

    run(check())


class Ear:
    """Stands for a worker: what it is told, if it listens."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.is_heard = True
        self.num_restarts = 0
        self.told: list[Any] = []

    def say(self, message: Any) -> None:
        self.told.append(message)

    def trouble(self, now_s: float) -> str:
        return ""

    def heard(self) -> list[Any]:
        told, self.told = self.told, []
        return told


@contextlib.asynccontextmanager
async def idle(config: ServiceConfig, load: Any = None) -> AsyncIterator[Any]:
    """A service that is not started, and stand-ins for its workers, which are told all."""
    service = ControlService(config, load)
    ears = [Ear(0), Ear(1)]
    service._supervisor.links[:] = ears  # type: ignore[assignment]
    for ear in ears:
        service._greet(ear)  # type: ignore[arg-type]
        ear.told.clear()
    yield service, ears
    await service._stack.aclose()


def keys_of(path: Path, *names: str) -> Path:
    write(path, [KeyRecord(name=name, sha256=hash_of(name)) for name in names])
    return path


def test_keys_for_which_there_is_no_room_change_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each file alone would do; both are counted until every worker knows the new one."""
    monkeypatch.setattr(control, "MAX_KEYS", 3)
    first = keys_of(tmp_path / "a.yaml", "ann", "bob")
    second = keys_of(tmp_path / "b.yaml", "cid", "dan")
    before = settings([], keys={"file": first}, routing={"policy": "session"})
    after = settings([], keys={"file": second}, routing={"policy": "least-loaded"})

    async def check() -> None:
        async with idle(before, lambda: after) as (service, ears):
            service.reload()
            assert "b.yaml: 3 API keys are known" in caplog.text
            assert service.config is before
            assert service.router.policy.name == "session"
            assert sorted(service.proxy.keys.by_name()) == ["ann", "bob"]
            assert not any(ear.told for ear in ears)

    run(check())


def test_who_does_not_listen_is_told_keys_and_instances_later(run: Any, tmp_path: Path) -> None:
    """The number of news is sent last: whoever says it has taken in the keys too."""
    path = keys_of(tmp_path / "keys.yaml", "ann")

    async def check() -> None:
        async with idle(settings([], keys={"file": path})) as (service, ears):
            ears[1].is_heard = False
            keys_of(path, "ann", "bob")
            service.proxy.keys.refresh()
            service.fleet.register(InstanceEntry(url="http://a:1"), source="test")
            service._publish()
            kinds = [type(one) for one in ears[0].told]
            assert kinds == [Keys, FleetNews]
            assert ears[1].told == []
            ears[1].is_heard = True
            service._publish()
            assert [type(one) for one in ears[1].told] == kinds
            numbers = [ear.heard()[-1].number for ear in ears]
            assert numbers == [service._ledger.number - 1, service._ledger.number]
            service._publish()
            assert [ear.heard() for ear in ears] == [[], []]
            keys_of(path, "bob")
            service.proxy.keys.refresh()
            service._publish()
            (keys, news) = ears[0].heard()
            assert [one.record.name for one in keys.keys] == ["bob"]
            assert news == FleetNews(service._ledger.number - 1), "only to be answered"

    run(check())


def test_restarts_of_a_worker_that_never_comes_up_are_counted(run: Any) -> None:
    async def check() -> None:
        async with idle(settings([])) as (service, ears):
            ears[1].num_restarts = 3
            service._say_trouble()
            assert [one.num_restarts for one in service.proxy.workers] == [0, 3]

    run(check())


def test_an_instance_that_drains_looks_twice_where_workers_send(run: Any) -> None:
    """They learn a moment later that it drains."""

    async def check() -> None:
        async with idle(settings([])) as (service, _):
            instance = service.fleet.register(InstanceEntry(url="http://a:1"), source="test")
            assert service.registrations.in_flight(instance) is None
            instance.in_flight = 1
            assert service.registrations.in_flight(instance) == 1

    run(check())


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_path_of_a_worker_is_changed_only_where_it_would_not_find_the_package(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(xllm_plugin.__file__).parents[1]
    monkeypatch.setattr("site.getsitepackages", lambda: [str(root if is_installed else tmp_path)])
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    expected = "/somewhere" if is_installed else f"{root}{os.pathsep}/somewhere"
    assert supervisor._environment()["PYTHONPATH"] == expected


def test_a_port_that_another_service_shares_is_taken(run: Any) -> None:
    """Its workers would let ours in, and each service would get some of the other's clients."""

    async def check() -> None:
        loop = asyncio.get_running_loop()
        other = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, reuse_port=True)
        port = other.sockets[0].getsockname()[1]
        config = settings([], listen={"host": "127.0.0.1", "port": port})
        with pytest.raises(NotNowError, match=f"127.0.0.1:{port}.*listen.port"):
            async with running(config):
                pass
        other.close()

    run(check())


@pytest.mark.full
def test_what_keeps_workers_from_starting_is_said_as_one_message(run: Any, tmp_path: Path) -> None:
    async def check() -> None:
        config = settings([], log={"access_file": tmp_path / "absent" / "log"})
        with pytest.raises(MisuseError, match=r"log\.access_file .* cannot be opened"):
            async with running(config):
                pass

    run(check())


def test_a_worker_of_another_version_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["worker", "3", "4", "0.0.1"])
    with pytest.raises(SystemExit, match=r"the service that runs is 0\.0\.1; restart it"):
        main()
