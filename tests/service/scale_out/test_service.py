"""A whole service finds out who has the routes, and uses them with its key and certificates."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from xllm_plugin.service.app import Service
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.lifecycle import State
from xllm_plugin.testing.fake_instance import FakeInstance
from xllm_plugin.testing.fake_scale_out import scale_out_instance
from xllm_plugin.testing.fake_streams import Death, FakeModel
from xllm_plugin.testing.service_harness import RunningService
from xllm_plugin.testing.streams import events_in, say_together

COMPLETION = "/v1/completions"
PIECES = [b"Gr", "ü".encode(), b"n"] * 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl, which is not here")
    folder = tmp_path_factory.mktemp("certificates")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject)
    files = ("-keyout", str(key), "-out", str(certificate))
    subprocess.run([*command, *files], check=True, capture_output=True)
    return certificate, key


def p(instance: FakeInstance) -> str:
    return f"p{instance.port}"


def test_a_stream_goes_on_over_https_with_the_instances_key(
    run: Any, pair: tuple[Path, Path]
) -> None:
    certificate, key = pair
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    model = FakeModel(PIECES)
    body = {"model": "fake", "stream": True, "prompt": "x"}

    async def check() -> None:
        dying = scale_out_instance(model, death=Death(700))
        good, without = scale_out_instance(model), FakeInstance()
        dying.tls = good.tls = context
        async with dying, good, without:
            config = ServiceConfig(
                listen={"host": "127.0.0.1", "port": 0},
                admin={"port": 0, "token": "t"},
                routing={"policy": "round-robin"},
                instances={
                    "static": [dying.url, good.url, without.url],
                    "probe_interval_s": 0.02,
                    "ssl_ca_certs": certificate,
                    "api_key": "theirs",
                },
                timeouts={"drain_s": 0.0},
            )
            service = Service(config)
            await service.start()
            async with aiohttp.ClientSession() as session:
                it = RunningService(service, session, "t")
                await it.until(**{p(one): State.READY for one in (dying, good, without)})
                _, found = await it.admin("GET", "/v1/instances")
                told = {one["url"]: one["continues"] for one in found["instances"]}
                assert told == {
                    dying.url: "scale-out",
                    good.url: "scale-out",
                    without.url: "no",
                }
                await it.admin("POST", f"/v1/instances/127.0.0.1:{without.port}/drain")
                while not any(one.target == COMPLETION.encode() for one in dying.requests):
                    url = f"http://127.0.0.1:{service.port}{COMPLETION}"
                    async with session.post(url, json=body) as reply:
                        events = events_in(await reply.text())
                raw = b"".join(model.events(COMPLETION, body))
                assert say_together(events) == say_together(events_in(raw.decode()))
                assert {one.target for one in good.requests} >= {b"/inference/v1/generate"}
            await service.stop()

    run(check())


def test_a_service_of_several_processes_continues_too(run: Any) -> None:
    """Who has the routes is asked by the control process, and used by workers."""
    model = FakeModel(PIECES)
    body = {"model": "fake", "stream": True, "prompt": "x"}

    async def check() -> None:
        from xllm_plugin.service.processes.control import ControlService

        dying = scale_out_instance(model, death=Death(700))
        good = scale_out_instance(model)
        async with dying, good:
            config = ServiceConfig(
                listen={"host": "127.0.0.1", "port": 0},
                admin={"port": 0, "token": "t"},
                routing={"policy": "round-robin"},
                service={"processes": 2},
                instances={"static": [dying.url, good.url], "probe_interval_s": 0.02},
                timeouts={"drain_s": 0.0},
            )
            service = ControlService(config, lambda: config)
            await service.start()
            async with aiohttp.ClientSession() as session:
                it = RunningService(service, session, "t")
                await it.until(**{p(one): State.READY for one in (dying, good)})
                number = service._ledger.number + 1
                for audience in service._audiences.values():
                    audience.has_heard_else = True
                service._publish()
                while not service._ledger.is_taken(number):
                    await asyncio.sleep(0.005)
                while not any(one.target == COMPLETION.encode() for one in dying.requests):
                    url = f"http://127.0.0.1:{service.port}{COMPLETION}"
                    async with session.post(url, data=json.dumps(body)) as reply:
                        events = events_in(await reply.text())
                raw = b"".join(model.events(COMPLETION, body))
                assert say_together(events) == say_together(events_in(raw.decode()))
            await service.stop()

    run(check())
