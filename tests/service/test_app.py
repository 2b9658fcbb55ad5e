"""The whole service in this process: registries, probes, the admin port, reload and drain."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.service.app import Service, check, token_path
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.key_file import KeyRecord, write
from xllm_plugin.service.lifecycle import State
from xllm_plugin.testing.fake_instance import FakeInstance, stream
from xllm_plugin.testing.service_harness import PATIENCE_S, RunningService

TOKEN = "a secret"
FAST = {"probe_interval_s": 0.02, "lease_s": 0.4, "suspect_s": 0.3}


def settings(**sections: Any) -> ServiceConfig:
    found: dict[str, Any] = {
        "listen": {"host": "127.0.0.1", "port": 0},
        "admin": {"port": 0, "token": TOKEN},
        "instances": FAST,
        "timeouts": {"drain_s": 1.0},
    }
    for name, values in sections.items():
        found[name] = {**found.get(name, {}), **values}
    return ServiceConfig(**found)


class Running(RunningService):
    """A started service and a client of both its ports."""

    async def public(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.service.port}{path}"
        async with self.session.request(method, url, json=body) as reply:
            return reply.status, await reply.json(content_type=None)


@asynccontextmanager
async def running(config: ServiceConfig, load: Any = None) -> AsyncIterator[Running]:
    service = Service(config, load)
    await service.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Running(service, session, TOKEN)
    finally:
        await service.stop()


def p(instance: FakeInstance) -> str:
    return f"p{instance.port}"


@asynccontextmanager
async def joined(instance: FakeInstance) -> AsyncIterator[Running]:
    """A service with one ready instance."""
    async with running(settings(instances={"static": [instance.url]})) as it:
        await it.until(**{p(instance): State.READY})
        yield it


def test_plain_servers_join_die_and_come_back(run: Any) -> None:
    async def check() -> None:
        async with FakeInstance(models=["a"]) as a, FakeInstance(models=["b"]) as b:
            static = {**FAST, "static": [a.url, b.url]}
            async with running(settings(instances=static)) as it:
                await it.until(**{p(a): State.READY, p(b): State.READY})
                _, models = await it.public("GET", "/v1/models")
                assert {one["id"] for one in models["data"]} == {"a", "b"}
                b.is_healthy = False
                await it.until(**{p(b): State.SUSPECT})
                b.is_healthy = True
                await it.until(**{p(b): State.READY})
                await a.die()
                await it.until(**{p(a): State.SUSPECT})
                async with FakeInstance(models=["a2"], port=a.port):
                    await it.until(**{p(a): State.READY})
                    async with asyncio.timeout(PATIENCE_S):
                        while "a2" not in it.service.fleet.models():
                            await asyncio.sleep(0.01)

    run(check())


def test_a_restarted_server_is_a_new_incarnation(run: Any) -> None:
    async def check() -> None:
        async with FakeInstance() as one:
            one.metrics = (
                'vllm:num_requests_running{engine="0"} 2.0\n'
                'vllm:num_requests_running{engine="1"} 1.0\n'
                'vllm:num_requests_waiting{engine="0"} 4.0\nprocess_start_time_seconds 17.5\n'
            )
            async with running(settings(instances={"static": [one.url]})) as it:
                await it.until(**{p(one): State.READY})
                (instance,) = it.service.fleet
                assert instance.life.incarnation == "17.50"
                assert instance.foreign_requests == 7
                assert not instance.resumes, "a plain server"
                one.metrics = 'process_start_time_seconds 99\nxllm:engine_up{engine="0"} 1.0\n'
                async with asyncio.timeout(PATIENCE_S):
                    while instance.life.incarnation != "99.00":
                        await asyncio.sleep(0.005)
                await it.until(**{p(one): State.READY})
                assert instance.foreign_requests == 0
                assert instance.resumes, "one with this plugin, which says so"

    run(check())


def test_registered_instances_live_by_their_lease(run: Any) -> None:
    async def check() -> None:
        config = settings(instances={"registration_token": "join"})
        async with FakeInstance() as one, running(config) as it:
            body = {"url": one.url, "incarnation": "1"}
            path = f"/v1/registrations/127.0.0.1:{one.port}"
            assert (await it.admin("POST", "/v1/registrations", body))[0] == 401
            assert (await it.admin("POST", "/v1/registrations", body, "no"))[0] == 401
            assert not list(it.service.fleet)
            status, lease = await it.admin("POST", "/v1/registrations", body, "join")
            assert (status, lease["lease_s"]) == (200, 0.4)
            await it.until(**{p(one): State.READY})
            for _ in range(8):  # longer than the lease
                await asyncio.sleep(0.1)
                beat = {"incarnation": "1"}
                assert (await it.admin("POST", path + "/heartbeat", beat, "join"))[0] == 200
            (instance,) = it.service.fleet
            assert instance.life.state in (State.READY, State.SUSPECT)
            await it.until(**{p(one): None})  # no more heartbeats, though probes succeed
            assert (await it.admin("POST", path + "/heartbeat", beat, "join"))[0] == 409
            body["incarnation"] = "2"
            assert (await it.admin("POST", "/v1/registrations", body, "join"))[0] == 200
            await it.until(**{p(one): State.READY})
            assert (await it.admin("DELETE", path + "?incarnation=1", None, "join"))[0] == 409
            assert (await it.admin("DELETE", path + "?incarnation=2", None, "join"))[0] == 200
            assert not list(it.service.fleet)

    run(check())


def test_without_a_registration_token_nobody_registers(run: Any) -> None:
    async def check() -> None:
        async with running(settings()) as it:
            body = {"url": "http://127.0.0.1:1", "incarnation": "1"}
            for token in ("", TOKEN, "None"):
                assert (await it.admin("POST", "/v1/registrations", body, token))[0] == 401

    run(check())


def test_a_token_that_is_no_text_is_a_wrong_one(run: Any) -> None:
    async def check() -> None:
        async with running(settings()) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.service.admin_port)
            head = b"GET /v1/instances HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            writer.write(head + b"Authorization: Bearer \xff\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 401")
            writer.close()

    run(check())


def test_a_registration_cannot_take_anothers_name(run: Any) -> None:
    async def check() -> None:
        async with FakeInstance() as one:
            config = settings(instances={"static": [one.url], "registration_token": "join"})
            async with running(config) as it:
                await it.until(**{p(one): State.READY})
                body = {"url": one.url, "incarnation": "1"}
                status, reply = await it.admin("POST", "/v1/registrations", body, "join")
                assert (status, "known from source 'static'" in str(reply)) == (409, True)
                body = {"url": "ftp://x", "incarnation": "1"}
                assert (await it.admin("POST", "/v1/registrations", body, "join"))[0] == 400

    run(check())


def test_a_file_is_followed_and_nonsense_in_it_changes_nothing(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "instances.yaml"

    async def check() -> None:
        async with FakeInstance() as a, FakeInstance() as b:
            file.write_text(f"- {a.url}\n")
            async with running(settings(instances={"file": file})) as it:
                await it.until(**{p(a): State.READY})
                for nonsense in ("- nonsense: [\n", "[" * 5000):
                    file.write_text(nonsense)
                    async with asyncio.timeout(PATIENCE_S):
                        while "file" not in it.service.fleet.troubles:
                            await asyncio.sleep(0.01)
                    await it.until(**{p(a): State.READY})
                    file.write_text(f"- {a.url}\n")
                    async with asyncio.timeout(PATIENCE_S):
                        while "file" in it.service.fleet.troubles:
                            await asyncio.sleep(0.01)
                file.write_text(f"- url: {b.url}\n  capacity: 2\n")
                await it.until(**{p(a): None, p(b): State.READY})
                (instance,) = it.service.fleet
                assert instance.capacity == 2

    run(check())


def test_drain_by_hand_and_control_routes(run: Any) -> None:
    async def check() -> None:
        async with FakeInstance() as one, joined(one) as it:
            path = f"/v1/instances/127.0.0.1:{one.port}"
            assert (await it.admin("POST", path + "/drain"))[1]["state"] == "draining"
            assert (await it.public("POST", "/v1/completions", {"model": "fake"}))[0] == 503
            status, _ = await it.admin("POST", path + "/control/sleep?level=2", {"x": 1})
            assert status == 200
            assert one.requests[-1].target == b"/sleep?level=2"
            assert one.requests[-1].body == b'{"x": 1}'
            assert (await it.admin("POST", path + "/control/v1/completions", {}))[0] == 400
            await it.admin("POST", path + "/undrain")
            await it.until(**{p(one): State.READY})
            status, reply = await it.admin("POST", "/v1/instances/none/drain")
            assert (status, f"127.0.0.1:{one.port}" in str(reply)) == (404, True)

    run(check())


def test_the_admin_port_shows_what_happened_and_asks_for_the_token(run: Any) -> None:
    async def check() -> None:
        async with FakeInstance() as one, joined(one) as it:
            await it.public("POST", "/v1/completions", {"model": "fake"})
            await it.public("POST", "/v1/completions", {"model": "other"})
            for path in ("/v1/instances", "/v1/decisions", "/v1/config", "/v1/nothing"):
                status, reply = await it.admin("GET", path, token="wrong")
                assert (status, set(reply)) == (401, {"error"})
            _, found = await it.admin("GET", "/v1/decisions")
            assert [one["model"] for one in found["decisions"]] == ["fake"]
            _, found = await it.admin("GET", "/v1/config")
            assert TOKEN not in json.dumps(found)
            assert found["listen"]["host"] == "127.0.0.1"
            _, metrics = await it.admin("GET", "/metrics", token="")
            name = f'server="127.0.0.1:{one.port}"'
            assert f'xllm_service_requests_total{{{name},status="200"}} 1.0' in metrics
            assert f"xllm_service_duration_seconds_count{{{name}}} 1.0" in metrics
            assert 'xllm_service_refusals_total{status="404"} 1.0' in metrics
            _, health = await it.admin("GET", "/health", token="")
            assert health["instances"] == {"ready": 1}

    run(check())


def test_reload_changes_settings_and_keeps_connections(run: Any) -> None:
    async def check() -> None:
        async with FakeInstance() as a, FakeInstance() as b:
            instances, routing = {"static": [b.url]}, {"policy": "session"}
            configs = [settings(instances=instances, routing=routing, slo={"ttft_ms": 7})]
            before = settings(instances={"static": [a.url]})
            async with running(before, lambda: configs[-1]) as it:
                await it.until(**{p(a): State.READY})
                await it.public("POST", "/v1/completions", {"model": "fake"})
                (client,) = it.service.proxy.clients
                it.service.reload()
                await it.until(**{p(a): None, p(b): State.READY})
                await it.public("POST", "/v1/completions", {"model": "fake"})
                assert it.service.proxy.clients == {client}
                assert [len(one.requests) for one in (a, b)] == [1, 1]
                assert it.service.router.policy.name == "session"
                assert it.service.proxy.telemetry.slo.ttft_ms == 7
                configs.append(settings(routing={"policy": "no such"}))
                it.service.reload()
                assert it.service.router.policy.name == "session"
                assert (await it.public("POST", "/v1/completions", {"model": "fake"}))[0] == 200

    run(check())


def test_keys_that_are_none_by_the_time_they_are_put_in_force_change_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("- nonsense: [\n")
    before = settings()
    after = settings(keys={"file": file}, routing={"policy": "session"}, slo={"ttft_ms": 7})
    monkeypatch.setattr(Service, "_check", lambda *_: None)  # it was right a moment ago

    async def check() -> None:
        async with running(before, lambda: after) as it:
            used: list[object] = []
            monkeypatch.setattr(it.service.carrier, "use_certificates", used.append)
            it.service.reload()
            assert "not reloaded, the settings stay as they were: keys.file" in caplog.text
            assert not used
            proxy, router = it.service.proxy, it.service.router
            assert it.service.config is proxy.config is it.service.carrier.config is before
            assert (router.policy.name, proxy.telemetry.slo) == ("cost", before.slo)

    run(check())


def test_certificates_that_have_gone_since_they_were_read_are_named(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    after = settings(routing={"policy": "session"})

    def gone(_: object) -> None:
        raise ConfigError("instances.ssl_certfile is gone")

    async def check() -> None:
        async with running(settings(), lambda: after) as it:
            monkeypatch.setattr(it.service.carrier, "use_certificates", gone)
            it.service.reload()
            said = "certificates for instances stay as they were: instances.ssl_certfile is gone"
            assert said in caplog.text
            assert (it.service.config, it.service.router.policy.name) == (after, "session")

    run(check())


def test_a_port_that_is_taken_and_a_policy_that_is_not_there(run: Any) -> None:
    async def check() -> None:
        async with FakeInstance() as one:
            service = Service(settings(listen={"port": one.port}))
            with pytest.raises(NotNowError, match=f"127.0.0.1:{one.port}.*listen.port"):
                await service.start()
            await service.abandon()
        with pytest.raises(ConfigError, match="known are cost, least-loaded, power-of-two"):
            Service(settings(routing={"policy": "best"}))

    run(check())


def test_several_processes_where_they_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    several = settings(service={"processes": 2}, keys={"file": tmp_path / "keys.yaml"})
    records = [KeyRecord(name=f"k{number}", sha256=f"{number:064x}") for number in (1, 2)]
    write(tmp_path / "keys.yaml", records)
    check(several)
    monkeypatch.setattr("xllm_plugin.service.processes.shared.MAX_KEYS", 1)
    with pytest.raises(ConfigError, match="processes=2: they share the limits of 1 API keys"):
        check(several)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match="processes=2: they share a port"):
        check(several)


def test_a_token_that_was_made_is_left_for_its_user_only(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def check() -> None:
        async with running(settings(admin={"token": None})) as it:
            path = token_path(it.service.admin_port)
            assert path.stat().st_mode & 0o777 == 0o600
            assert (await it.admin("GET", "/v1/instances", token=path.read_text()))[0] == 200
        assert not path.exists()

    run(check())


def test_instances_may_speak_https(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their certificate is checked as the machine checks others; SSL_CERT_FILE adds authorities."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl, which is not here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    large = {"model": "fake", "prompt": "x" * 500_000}

    async def check() -> None:
        async with FakeInstance(tls=context) as one:
            config = settings(instances={"static": [one.url]})
            async with running(config) as it:
                async with asyncio.timeout(PATIENCE_S):
                    while not any(
                        "CERTIFICATE_VERIFY_FAILED" in one.life.reason for one in it.service.fleet
                    ):
                        await asyncio.sleep(0.01)
                assert (await it.public("POST", "/v1/completions", large))[0] == 503
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            async with running(config) as it:
                await it.until(**{p(one): State.READY})
                for _ in range(2):
                    assert (await it.public("POST", "/v1/completions", large))[0] == 200
                assert json.loads(one.requests[-1].body) == large

    run(check())


def test_the_access_log_has_a_line_a_request_and_no_secrets(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with FakeInstance() as one:
            config = settings(instances={"static": [one.url]}, log={"access": True})
            async with running(config) as it:
                await it.until(**{p(one): State.READY})
                await it.public("POST", "/v1/completions", {"model": "fake", "prompt": "hush"})
                await it.public("POST", "/v1/completions", {"model": "other"})
                one.script = stream(*[b"data: x\n\n"] * 10_000, pause_s=0.01)
                url = f"http://127.0.0.1:{it.service.port}/v1/completions"
                async with it.session.post(url, json={"model": "fake"}) as reply:
                    await reply.content.read(5)
                    reply.close()
                async with asyncio.timeout(PATIENCE_S):
                    while next(iter(it.service.fleet)).in_flight:
                        await asyncio.sleep(0.01)

    with caplog.at_level(logging.INFO, "xllm_plugin.service.access"):
        run(check())
    lines = [
        json.loads(record.message)
        for record in caplog.records
        if record.name == "xllm_plugin.service.access"
    ]
    assert [(one["path"], one["status"], one["model"]) for one in lines] == [
        ("/v1/completions", 200, "fake"),
        ("/v1/completions", 404, "other"),
        ("/v1/completions", 200, "fake"),
    ]
    assert {one["client"] for one in lines} == {"127.0.0.1"}
    assert lines[0]["instance"].startswith("127.0.0.1:")
    assert lines[1]["instance"] is None
    assert "hush" not in caplog.text
