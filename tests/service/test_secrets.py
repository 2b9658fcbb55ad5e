"""Keys and tokens appear in no log line, no error, no metric and no answer of the admin port."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from xllm_plugin.service.app import Service
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.key_file import KeyRecord, hash_of, write
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer
from xllm_plugin.testing.service_harness import PATIENCE_S, RawClient

SECRETS = {
    "client": "sk-hush-client-0123456789",
    "stranger": "sk-hush-stranger-0123456789",
    "admin": "hush-admin",
    "registration": "hush-registration",
    "instances": "hush-instances",
    "prompt": "hush-prompt",
    "hash": hash_of("sk-hush-client-0123456789"),
}


async def provoke(service: Service, instance: FakeInstance) -> bytes:
    """Everything that goes wrong with secrets in it; returns all that clients were answered."""
    heads = [
        f"Authorization: Bearer {SECRETS['client']}",
        f"Authorization: Bearer {SECRETS['stranger']}",
        f"Authorization: {SECRETS['client']}",
        f"Authorization: Bearer {SECRETS['client']}\r\nX-Xllm-Ttft-Ms: soon",
        f"Authorization: Bearer {SECRETS['client']}\r\nX-Xllm-Tenant: other",
        f"Authorization: Bearer {SECRETS['client']}\r\nAuthorization: Bearer x",
        f"Authorization: Bearer {SECRETS['client']}\r\nBad Header: x",
        f"Authorization: Bearer {SECRETS['client']}\r\nTransfer-Encoding: gzip",
        f"Authorization: Bearer {SECRETS['client']}\r\n{'X: ' + 'x' * 40_000}",
    ]
    body = json.dumps({"model": "fake", "prompt": SECRETS["prompt"]})
    said = []
    for number in range(3):
        if number == 1:
            instance.script = garbage
        if number == 2:
            await instance.die()
        for head in heads:
            raw = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\n{head}\r\nConnection: close\r\n"
            raw += f"Content-Length: {len(body)}\r\n\r\n{body}"
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(raw.encode())
            said.append(await RawClient(reader, writer).read_all())
            writer.close()
    assert {one[9:12] for one in said} >= {b"200", b"400", b"401", b"403", b"431", b"503"}
    return b"".join(said)


async def garbage(_: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(b"nonsense\r\n\r\n")
    await writer.drain()
    writer.close()


async def all_of_admin(service: Service) -> str:
    """What the admin port says, to those who may ask and to those who may not."""
    said = []
    paths = ("/health", "/metrics", "/v1/instances", "/v1/decisions", "/v1/config", "/v1/keys")
    async with aiohttp.ClientSession() as session:
        for token in (SECRETS["admin"], SECRETS["client"]):
            for path in (*paths, "/v1/queue", "/v1/registrations", "/nowhere"):
                url = f"http://127.0.0.1:{service.admin_port}{path}"
                headers = {"Authorization": f"Bearer {token}"}
                async with session.get(url, headers=headers) as reply:
                    said.append(await reply.text())
    return "".join(said)


def test_no_secret_is_ever_told(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    write(file, [KeyRecord(name="ann", sha256=SECRETS["hash"], requests_per_minute=1000)])

    async def check() -> tuple[bytes, str]:
        async with FakeInstance(script=answer()) as instance:
            found: dict[str, Any] = {
                "listen": {"host": "127.0.0.1", "port": 0},
                "admin": {"port": 0, "token": SECRETS["admin"]},
                "instances": {
                    "static": [instance.url],
                    "api_key": SECRETS["instances"],
                    "registration_token": SECRETS["registration"],
                    "probe_interval_s": 0.02,
                },
                "keys": {"file": file},
                "flow": {"enabled": True, "max_in_flight": 4},
                "log": {"level": "debug", "access": True},
                "timeouts": {"drain_s": 0.0},
            }
            service = Service(ServiceConfig(**found))
            await service.start()
            async with asyncio.timeout(PATIENCE_S):
                while not service.fleet.candidates(None):
                    await asyncio.sleep(0.005)
            said = await provoke(service, instance)
            assert instance.requests[0].headers()["authorization"] == "Bearer hush-instances"
            file.write_text(f"- {SECRETS['client']}")
            service.reload()
            admin = await all_of_admin(service)
            await service.stop()
            return said, admin

    with caplog.at_level(logging.DEBUG):
        said, admin = run(check())
    assert "ann" in admin
    assert "not reloaded" in caplog.text
    for name, secret in SECRETS.items():
        for where, text in (("answers", said.decode()), ("admin", admin), ("logs", caplog.text)):
            assert secret not in text, f"the secret of {name} is in {where}"
