"""A server that registers in a real etcd."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from xllm_plugin.errors import NotNowError
from xllm_plugin.etcd import wire
from xllm_plugin.etcd.client import EtcdClient
from xllm_plugin.etcd.config import EtcdAccess, parse_url
from xllm_plugin.etcd.records import InstanceRecord
from xllm_plugin.instance.registrar import Registrar
from xllm_plugin.instance.registry_clients import EtcdRegistry, registry_client
from xllm_plugin.registration import Heartbeat, Load, Registration, RegistrationConfig, Role
from xllm_plugin.testing.etcd_server import EtcdServer

HERE = Registration(
    url="http://10.0.0.9:8000",
    incarnation="i1",
    models=("m", "lora"),
    role=Role.DECODE,
    capacity=2.0,
)
KEY = "/xllm/instances/10.0.0.9:8000"
BEAT = Heartbeat(incarnation="i1", load=Load(num_running=3))


@pytest.fixture
def client(etcd: EtcdServer) -> Iterator[EtcdClient]:
    client = EtcdClient(parse_url(etcd.url), EtcdAccess())
    for key in client.send(wire.read_all("/")).records:
        client.send(wire.delete(key))
    yield client
    client.close()


def record_in(client: EtcdClient, key: str = KEY) -> InstanceRecord | None:
    found = client.send(wire.get(key))
    return InstanceRecord.model_validate_json(found.value) if found else None


def test_a_life_in_etcd(client: EtcdClient) -> None:
    registry = EtcdRegistry(client, "/xllm", 60.0)
    lease = registry.register(HERE)
    assert (lease.name, lease.lease_s, lease.in_flight) == ("10.0.0.9:8000", 60, None)
    record = record_in(client)
    assert record is not None
    assert (record.url, record.models, record.role) == (HERE.url, HERE.models, Role.DECODE)
    revision = client.send(wire.read_all("/")).revision
    for _ in range(3):
        assert registry.beat(lease, BEAT) == lease
    assert client.send(wire.read_all("/")).revision == revision  # heartbeats write nothing
    draining = BEAT.model_copy(update={"is_draining": True})
    for _ in range(2):
        assert registry.beat(lease, draining) == lease
    assert client.send(wire.read_all("/")).revision == revision + 1
    record = record_in(client)
    assert record is not None
    assert record.is_draining
    registry.deregister(lease, "i1")
    assert record_in(client) is None
    assert registry.beat(lease, BEAT) is None


def test_who_leaves_without_draining_says_so_first(client: EtcdClient) -> None:
    """Else services would take it for a lease that has lapsed."""
    registry = EtcdRegistry(client, "/xllm", 60.0)
    lease = registry.register(HERE)
    revision = client.send(wire.read_all("/")).revision
    registry.deregister(lease, "i1")
    assert client.send(wire.read_all("/")).revision == revision + 2


def test_a_name_belongs_to_one_address(client: EtcdClient) -> None:
    named = HERE.model_copy(update={"name": "gpu"})
    first = EtcdRegistry(client, "/xllm", 60.0)
    lease = first.register(named)
    other = named.model_copy(update={"url": "http://10.0.0.8:8000", "incarnation": "i2"})
    with pytest.raises(NotNowError, match=r"held by http://10.0.0.9:8000.*registration.name"):
        EtcdRegistry(client, "/xllm", 60.0).register(other)
    # The same server, restarted before its lease has lapsed.
    restarted = named.model_copy(update={"incarnation": "i3"})
    second = EtcdRegistry(client, "/xllm", 60.0)
    assert second.register(restarted).name == "gpu"
    record = record_in(client, "/xllm/instances/gpu")
    assert record is not None
    assert record.incarnation == "i3"
    assert first.beat(lease, BEAT) is None
    client.send(wire.put("/xllm/instances/junk", b"\xff{"))
    junk = HERE.model_copy(update={"name": "junk"})
    assert EtcdRegistry(client, "/xllm", 60.0).register(junk).name == "junk"


def test_an_etcd_that_has_lost_everything_is_registered_in_again(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    registry = registry_client(RegistrationConfig(url=f"{etcd.url}/fleets/a", lease_s=60))
    lease = registry.register(HERE)
    assert record_in(client, "/fleets/a/instances/10.0.0.9:8000") is not None
    etcd.kill()
    with pytest.raises(NotNowError, match="ConnectError"):
        registry.beat(lease, BEAT)
    etcd.start()
    assert registry.beat(lease, BEAT) == lease  # leases outlive a restart
    etcd.kill()
    etcd.forget()
    etcd.start()
    assert registry.beat(lease, BEAT) is None
    registry.register(HERE)
    assert record_in(client, "/fleets/a/instances/10.0.0.9:8000") is not None


def test_a_member_that_hangs_does_not_cost_the_lease(etcd: EtcdServer, client: EtcdClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:  # accepts, and never answers
        url = f"etcd://127.0.0.1:{hanging.getsockname()[1]},127.0.0.1:{etcd.port}"
        registry = registry_client(RegistrationConfig(url=url, lease_s=3))
        assert isinstance(registry, EtcdRegistry)
        timeouts = registry._client._talk.request("/", {}).extensions["timeout"]
        assert timeouts["read"] == 1.0
        assert registry.register(HERE).lease_s == 3
        assert record_in(client) is not None


def test_the_registrar_drains_with_a_second_look(client: EtcdClient) -> None:
    """Services that have not heard yet may send one more request."""
    looks = iter([0, 1, 0, 0])
    registrar = Registrar(
        RegistrationConfig(url="etcd://unused", drain_s=60),
        HERE,
        lambda: Load(num_running=1),
        lambda: next(looks),
        registry=EtcdRegistry(client, "/xllm", 60.0),
    )
    assert registrar.step() == 20.0
    assert registrar.step() == 20.0
    assert registrar.last_beat is not None
    assert registrar.last_beat.load == Load(num_running=1)
    registrar.leave(drain=True)
    assert list(looks) == []
    assert record_in(client) is None


def test_the_lease_of_a_killed_owner_lapses(etcd: EtcdServer, client: EtcdClient) -> None:
    """kill -9: nobody deregisters, and etcd takes the key away by itself."""
    program = f"""
        import threading
        from xllm_plugin.instance.registrar import Registrar
        from xllm_plugin.instance.registry_clients import registry_client
        from xllm_plugin.registration import Registration, RegistrationConfig

        config = RegistrationConfig(url={etcd.url!r}, lease_s=2)
        here = Registration(url={HERE.url!r}, incarnation="i1")
        registrar = Registrar(
            config, here, lambda: None, lambda: 0, registry=registry_client(config)
        )
        registrar.start()
        threading.Event().wait()
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    try:
        asyncio.run(_until(client, is_there=True))
        os.kill(owner.pid, signal.SIGKILL)
        asyncio.run(_until(client, is_there=False))
    finally:
        owner.kill()
        owner.wait()


async def _until(client: EtcdClient, *, is_there: bool) -> None:
    async with asyncio.timeout(120):
        while (record_in(client) is not None) is not is_there:
            await asyncio.sleep(0.02)
