"""The client against a real etcd: what its JSON looks like, members that fail, users, TLS."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from xllm_plugin.errors import EtcdError
from xllm_plugin.etcd import wire
from xllm_plugin.etcd.client import AsyncEtcdClient, EtcdClient
from xllm_plugin.etcd.config import EtcdAccess, EtcdAddress, parse_url
from xllm_plugin.testing.etcd_server import EtcdServer

PATIENCE_S = 60.0


def client_of(etcd: EtcdServer, **access: Any) -> EtcdClient:
    return EtcdClient(parse_url(etcd.url), EtcdAccess(**access))


def gateway(path: str, **body: Any) -> wire.Call[Any]:
    """A call that the package has no use for."""
    return wire.Call(path, body, lambda answer: answer)


@pytest.fixture
def client(etcd: EtcdServer) -> Iterator[EtcdClient]:
    client = client_of(etcd)
    yield client
    client.close()


def test_keys(client: EtcdClient) -> None:
    assert client.send(wire.get("/k/a")) is None
    client.send(wire.put("/k/a", b"\x00\xff"))
    found = client.send(wire.get("/k/a"))
    assert found is not None
    assert (found.key, found.value, found.lease) == ("/k/a", b"\x00\xff", 0)
    client.send(wire.put("/k/b", b""))
    client.send(wire.put("/k0", b"behind the prefix"))
    snapshot = client.send(wire.read_all("/k/"))
    assert {key: one.value for key, one in snapshot.records.items()} == {
        "/k/a": b"\x00\xff",
        "/k/b": b"",
    }
    assert snapshot.revision >= max(one.mod_revision for one in snapshot.records.values())
    client.send(wire.delete("/k/a"))
    client.send(wire.delete("/k/a"))
    assert set(client.send(wire.read_all("/k/")).records) == {"/k/b"}


def test_a_key_is_taken_by_one(client: EtcdClient) -> None:
    assert client.send(wire.put_if("/t/a", 0, b"1", 0))
    assert not client.send(wire.put_if("/t/a", 0, b"2", 0))
    found = client.send(wire.get("/t/a"))
    assert found is not None
    assert found.value == b"1"
    assert client.send(wire.put_if("/t/a", found.mod_revision, b"3", 0))


def test_leases(client: EtcdClient) -> None:
    grant = client.send(wire.grant(60))
    assert grant.ttl_s >= 60
    client.send(wire.put("/l/a", b"1", grant.lease))
    found = client.send(wire.get("/l/a"))
    assert found is not None
    assert found.lease == grant.lease
    assert client.send(wire.keep_alive(grant.lease)) == grant.ttl_s
    client.send(wire.revoke(grant.lease))
    assert client.send(wire.get("/l/a")) is None
    assert client.send(wire.keep_alive(grant.lease)) == 0
    with pytest.raises(EtcdError, match="lease not found"):
        client.send(wire.put("/l/a", b"1", grant.lease))


def test_a_watch_tells_in_order_and_says_when_its_past_is_gone(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    client.send(wire.put("/w/a", b"old"))
    revision = client.send(wire.read_all("/w/")).revision

    async def check() -> None:
        async with AsyncEtcdClient(parse_url(etcd.url), EtcdAccess()) as watcher:
            events = watcher.watch("/w/", revision + 1)
            assert await anext(events) == ()
            grant = await watcher.send(wire.grant(60))
            await watcher.send(wire.put("/w/a", b"new"))
            await watcher.send(wire.put("/other", b"not ours"))
            await watcher.send(wire.put("/w/b", b"leased", grant.lease))
            await watcher.send(wire.put("/w/c", b"leased", grant.lease))
            await watcher.send(wire.revoke(grant.lease))
            told: list[wire.Event] = []
            while len(told) < 5:
                told += await anext(events)
            assert [(one.key, one.record and one.record.value) for one in told] == [
                ("/w/a", b"new"),
                ("/w/b", b"leased"),
                ("/w/c", b"leased"),
                ("/w/b", None),
                ("/w/c", None),
            ]
            assert told[3].mod_revision == told[4].mod_revision > told[2].mod_revision
            await events.aclose()
            last = (await watcher.send(wire.read_all("/w/"))).revision
            await watcher.send(gateway("/v3/kv/compaction", revision=str(last)))
            with pytest.raises(EtcdError, match="compact"):
                async for _ in watcher.watch("/w/", revision + 1):
                    pass

    asyncio.run(asyncio.wait_for(check(), PATIENCE_S))


def test_members_are_asked_in_turn_and_the_one_that_answered_is_kept(etcd: EtcdServer) -> None:
    address = EtcdAddress(("http://127.0.0.1:1", etcd.endpoint), "/x")
    client = EtcdClient(address, EtcdAccess())
    client.send(wire.put("/m", b"1"))
    asked: list[str] = []
    client._http.event_hooks = {"request": [lambda request: asked.append(str(request.url))]}
    client.send(wire.get("/m"))
    assert asked == [f"{etcd.endpoint}/v3/kv/range"]
    client.close()
    nobody = EtcdClient(EtcdAddress(("http://127.0.0.1:1",) * 2, "/x"), EtcdAccess())
    with pytest.raises(EtcdError, match=r"127.0.0.1:1: ConnectError.*; http://127.0.0.1:1: Conn"):
        nobody.send(wire.get("/m"))
    nobody.close()


@pytest.mark.parametrize("reply", [b"<html>", b"[]", b"{}", b'{"header": 3}'])
def test_a_server_that_is_no_etcd(reply: bytes) -> None:
    client = EtcdClient(EtcdAddress(("http://a:1",), "/x"), EtcdAccess())
    for status, says in ((200, "nonsense"), (404, "404")):
        transport = httpx.MockTransport(lambda _, s=status: httpx.Response(s, content=reply))
        client._http = httpx.Client(transport=transport)
        with pytest.raises(EtcdError, match=says):
            client.send(wire.read_all("/x/"))


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"result": {"events": [{}]}}', '{"result": 3}'])
def test_a_watch_that_tells_nonsense(line: str) -> None:
    with pytest.raises(EtcdError, match="no event"):
        wire.read_events(line)


def test_an_error_within_a_watch() -> None:
    with pytest.raises(EtcdError, match="no leader"):
        wire.read_events(json.dumps({"error": {"code": 14, "message": "no leader"}}))


def test_a_slow_etcd_is_given_up(etcd: EtcdServer) -> None:
    async def check() -> None:
        access = EtcdAccess(command_timeout_s=0.3)
        async with AsyncEtcdClient(parse_url(etcd.url), access) as client:
            etcd.freeze()
            try:
                with pytest.raises(EtcdError, match="Timeout"):
                    await client.send(wire.get("/m"))
            finally:
                etcd.thaw()
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    try:
                        await client.send(wire.get("/m"))
                    except EtcdError:
                        continue
                    return

    asyncio.run(check())


def test_users(has_etcd: None, tmp_path: Path) -> None:
    """A token that etcd no longer knows (it was restarted) is fetched anew."""
    with EtcdServer(tmp_path) as etcd:
        admin = client_of(etcd)
        admin.send(gateway("/v3/auth/user/add", name="root", password="hush"))
        admin.send(gateway("/v3/auth/user/grant", user="root", role="root"))
        admin.send(gateway("/v3/auth/user/add", name="guest", password="hush"))
        admin.send(gateway("/v3/auth/enable"))
        with pytest.raises(EtcdError, match="user name is empty"):
            admin.send(wire.get("/u"))
        root = client_of(etcd, user="root", password=SecretStr("hush"))
        root.send(wire.put("/u", b"1"))
        for wrong in (("guest", "hush", "permission denied"), ("root", "no", "invalid")):
            client = client_of(etcd, user=wrong[0], password=SecretStr(wrong[1]))
            with pytest.raises(EtcdError, match=wrong[2]):
                client.send(wire.get("/u"))
            client.close()
        etcd.kill()
        etcd.start()
        found = root.send(wire.get("/u"))
        assert found is not None
        for client in (admin, root):
            client.close()


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Makes certificates that are their own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificates with openssl, which is not here")

    def make(name: str) -> tuple[Path, Path]:
        certificate, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        )
        return certificate, key

    return make


def test_tls_with_client_certificates(
    has_etcd: None, tmp_path: Path, certificates: Callable[[str], tuple[Path, Path]]
) -> None:
    (server, server_key), (ours, our_key) = certificates("server"), certificates("ours")
    context = ssl.create_default_context(cafile=server)
    context.load_cert_chain(ours, our_key)
    # etcd's own gateway comes to it with the certificate of the server.
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(server.read_bytes() + ours.read_bytes())
    options = (
        *("--cert-file", str(server), "--key-file", str(server_key)),
        *("--client-cert-auth", "--trusted-ca-file", str(trusted)),
    )
    with EtcdServer(tmp_path, options, context) as etcd:
        right = client_of(etcd, cacert=server, cert=ours, key=our_key)
        right.send(wire.put("/s", b"1"))
        careless = client_of(etcd, insecure_skip_tls_verify=True, cert=ours, key=our_key)
        careless.send(wire.get("/s"))
        suspicious = client_of(etcd, cert=ours, key=our_key)
        with pytest.raises(EtcdError, match="CERTIFICATE_VERIFY_FAILED"):
            suspicious.send(wire.get("/s"))
        nameless = client_of(etcd, cacert=server)
        with pytest.raises(EtcdError, match="Error"):
            nameless.send(wire.get("/s"))
        for client in (right, careless, suspicious, nameless):
            client.close()
