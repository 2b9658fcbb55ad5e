"""HTTPS on the service's own ports."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from xllm_plugin.errors import ConfigError
from xllm_plugin.service.app import Service
from xllm_plugin.service.config import ListenConfig, ServiceConfig, load
from xllm_plugin.service.tls import server_context
from xllm_plugin.testing.fake_instance import FakeInstance, stream
from xllm_plugin.testing.service_harness import PATIENCE_S

LARGE = {"model": "fake", "prompt": "x" * 500_000}


def certify(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of this machine and its key."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl, which is not here")
    return certify(tmp_path_factory.mktemp("tls"), "first")


def settings(certificate: Path, key: Path, *static: str, **timeouts: float) -> ServiceConfig:
    tls = {"ssl_certfile": certificate, "ssl_keyfile": key}
    found: dict[str, Any] = {
        "listen": {"host": "127.0.0.1", "port": 0, **tls},
        "admin": {"port": 0, "token": "t", **tls},
        "instances": {"static": static, "probe_interval_s": 0.02},
        "timeouts": {"drain_s": 0.0, **timeouts},
    }
    return ServiceConfig(**found)


async def ask(service: Service, trusted: Path, port: int, path: str, body: Any = None) -> bytes:
    context = ssl.create_default_context(cafile=str(trusted))
    async with aiohttp.ClientSession() as session:
        url = f"https://127.0.0.1:{port}{path}"
        method = "POST" if body is not None else "GET"
        headers = {"Authorization": "Bearer t"}
        async with session.request(method, url, json=body, ssl=context, headers=headers) as reply:
            assert reply.status == 200, await reply.text()
            return await reply.read()


async def until_ready(service: Service) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not service.fleet.candidates(None):
            await asyncio.sleep(0.005)


def test_both_ports_speak_it_and_a_reload_brings_the_new_certificate(
    run: Any, certified: tuple[Path, Path], tmp_path: Path
) -> None:
    certificate, key = tmp_path / "service.pem", tmp_path / "service.key"
    for source, target in zip(certified, (certificate, key), strict=True):
        shutil.copy(source, target)
    old = certified[0]

    async def check() -> None:
        async with FakeInstance() as one:
            service = Service(settings(certificate, key, one.url))
            await service.start()
            await until_ready(service)
            assert await ask(service, old, service.port, "/v1/completions", LARGE) == b"{}"
            assert b"127.0.0.1" in await ask(service, old, service.admin_port, "/v1/instances")
            one.script = stream(*[b"data: %d\n\n" % number for number in range(300)])
            streamed = await ask(service, old, service.port, "/v1/completions", LARGE)
            assert streamed.count(b"data: ") == 300

            new, new_key = certify(tmp_path, "second")
            shutil.copy(new, certificate)
            service.reload()  # the key does not fit: nothing changes
            await ask(service, old, service.port, "/v1/models")
            shutil.copy(new_key, key)
            service.reload()
            for port in (service.port, service.admin_port):
                await ask(service, new, port, "/health")
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await ask(service, old, service.port, "/v1/models")
            await service.stop()

    run(check())


def test_a_client_that_dawdles_over_its_handshake_is_closed(
    run: Any, certified: tuple[Path, Path]
) -> None:
    async def check() -> None:
        service = Service(settings(*certified, header_s=0.1))
        await service.start()
        for sent in (b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(sent)
            async with asyncio.timeout(PATIENCE_S):
                assert b"HTTP/1.1 2" not in await reader.read()
            writer.close()
        await service.stop()

    run(check())


def test_what_cannot_be_used_is_said_before_anything_starts(
    certified: tuple[Path, Path], tmp_path: Path
) -> None:
    certificate, key = certified
    absent = tmp_path / "absent.pem"
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    for first, second in ((absent, key), (other, key), (certificate, absent), (certificate, other)):
        with pytest.raises(ConfigError, match=r"listen\.ssl_certfile") as caught:
            server_context(ListenConfig(ssl_certfile=first, ssl_keyfile=second), "listen")
        assert str(first) in str(caught.value)
    with pytest.raises(ConfigError, match="ssl_keyfile is given without ssl_certfile"):
        load({"listen": {"ssl_keyfile": str(key)}}, None)
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        [
            *("openssl", "ec", "-aes256", "-passout", "pass:hush"),
            *("-in", str(key), "-out", str(encrypted)),
        ],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigError, match="must not ask for a password"):
        server_context(ListenConfig(ssl_certfile=certificate, ssl_keyfile=encrypted), "listen")


def test_one_file_may_hold_both(certified: tuple[Path, Path], tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(one.read_bytes() for one in certified))
    assert server_context(ListenConfig(ssl_certfile=both), "listen") is not None
    assert server_context(ListenConfig(), "listen") is None
