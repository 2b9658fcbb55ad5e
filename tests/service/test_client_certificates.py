"""Certificates of clients: asked for on both ports, shown to instances that ask for one."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiohttp
import pytest
from click.testing import CliRunner

from xllm_plugin.cli.service import service as command
from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.etcd.config import EtcdConfig
from xllm_plugin.instance.registry_clients import registry_client
from xllm_plugin.registration import Registration, RegistrationConfig
from xllm_plugin.service.app import Service, check
from xllm_plugin.service.config import LogConfig, ServiceConfig
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.tls import PortTls
from xllm_plugin.testing.fake_instance import FakeInstance, stream
from xllm_plugin.testing.service_harness import PATIENCE_S

REFUSED = (aiohttp.ClientError, OSError)
TOKEN = {"Authorization": "Bearer t"}


class Pair(NamedTuple):
    """A certificate and its key."""

    certificate: Path
    key: Path

    def copied(self, folder: Path, name: str) -> Pair:
        """The same in other files; those that are there are replaced."""
        copy = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        for source, target in zip(self, copy, strict=True):
            shutil.copy(source, target)
        return copy


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def authority(folder: Path, name: str) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl("req", "-x509", *curve, "-subj", f"/CN={name}", "-keyout", pair.key, "-out", pair[0])
    return pair


def signed(folder: Path, name: str, by: Pair) -> Pair:
    """A certificate for this machine."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    asked, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-new", *curve, "-subj", f"/CN={name}", "-keyout", pair.key, "-out", asked)
    signing = ("-CA", by.certificate, "-CAkey", by.key, "-CAcreateserial", "-days", "2")
    openssl("x509", "-req", "-in", asked, *signing, "-extfile", extensions, "-out", pair[0])
    return pair


class Files(NamedTuple):
    """Two authorities, a server of ours, and a client of each authority."""

    ours: Pair
    others: Pair
    server: Pair
    client: Pair
    stranger: Pair


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificates with openssl, which is not here")
    folder = tmp_path_factory.mktemp("tls")
    ours, others = authority(folder, "ours"), authority(folder, "others")
    return Files(
        ours,
        others,
        signed(folder, "server", ours),
        signed(folder, "client", ours),
        signed(folder, "stranger", others),
    )


def port(files: Files, reqs: int = 2, authorities: Path | None = None) -> dict[str, Any]:
    """Settings of a port that asks for certificates."""
    return {
        "ssl_certfile": files.server.certificate,
        "ssl_keyfile": files.server.key,
        "ssl_ca_certs": authorities or files.ours.certificate,
        "ssl_cert_reqs": reqs,
    }


def settings(
    listen: dict[str, Any] | None = None,
    admin: dict[str, Any] | None = None,
    **instances: Any,
) -> ServiceConfig:
    found: dict[str, Any] = {
        "listen": {"host": "127.0.0.1", "port": 0, **(listen or {})},
        "admin": {"port": 0, "token": "t", **(admin or {})},
        "instances": {"probe_interval_s": 0.02, **instances},
        "timeouts": {"drain_s": 0.0},
    }
    return ServiceConfig(**found)


@asynccontextmanager
async def running(
    config: ServiceConfig, load: Callable[[], ServiceConfig] | None = None
) -> AsyncIterator[Service]:
    service = Service(config, load)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def context_of(files: Files, shown: Pair | None) -> ssl.SSLContext:
    """What a client that trusts our server connects with."""
    context = ssl.create_default_context(cafile=str(files.ours.certificate))
    if shown is not None:
        context.load_cert_chain(*shown)
    return context


async def status_of(files: Files, number: int, shown: Pair | None) -> int:
    """Of an answer to a client that shows a certificate, or none."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(
            f"https://127.0.0.1:{number}/v1/instances",
            ssl=context_of(files, shown),
            headers=TOKEN,
        ) as reply,
    ):
        return reply.status


async def until(is_so: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.005)


async def the_only(service: Service) -> Instance:
    await until(lambda: list(service.fleet))
    (instance,) = service.fleet
    return instance


# -- clients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reqs", [1, 2])
def test_both_ports_let_in_who_shows_a_certificate_of_ours(
    run: Any, files: Files, reqs: int
) -> None:
    async def check() -> None:
        tls = port(files, reqs)
        async with running(settings(tls, tls)) as service:
            for number, status in ((service.port, 503), (service.admin_port, 200)):
                assert await status_of(files, number, files.client) == status
                with pytest.raises(REFUSED):
                    await status_of(files, number, files.stranger)
                if reqs == 1:
                    assert await status_of(files, number, None) == status
                else:
                    with pytest.raises(REFUSED):
                        await status_of(files, number, None)

    run(check())


def test_a_certificate_is_no_token(run: Any, files: Files) -> None:
    async def check() -> None:
        async with running(settings(admin=port(files))) as service:
            url = f"https://127.0.0.1:{service.admin_port}/v1/instances"
            shown = context_of(files, files.client)
            async with aiohttp.ClientSession() as session, session.get(url, ssl=shown) as reply:
                assert reply.status == 401

    run(check())


def test_a_reload_brings_new_authorities_and_forgets_the_old(
    run: Any, files: Files, tmp_path: Path
) -> None:
    authorities = tmp_path / "authorities.pem"
    shutil.copy(files.ours.certificate, authorities)

    async def check() -> None:
        tls = port(files, authorities=authorities)
        async with running(settings(tls, tls)) as service:
            authorities.write_text("no certificate")
            service.reload()  # nothing changes
            for number in (service.port, service.admin_port):
                await status_of(files, number, files.client)
            shutil.copy(files.others.certificate, authorities)
            service.reload()
            for number in (service.port, service.admin_port):
                await status_of(files, number, files.stranger)
                with pytest.raises(REFUSED):
                    await status_of(files, number, files.client)

    run(check())


@pytest.mark.parametrize("wrong", ["admin", "instances"])
def test_a_reload_with_one_wrong_file_renews_no_other(
    run: Any, files: Files, tmp_path: Path, wrong: str
) -> None:
    """The new settings name it no more, so that they are right; what is in force still reads it."""
    pairs = {name: files.server.copied(tmp_path, name) for name in ("listen", "admin")}
    pairs["instances"] = files.client.copied(tmp_path, "instances")
    tls = [{"ssl_certfile": pairs[name][0], "ssl_keyfile": pairs[name][1]} for name in pairs]

    async def check() -> None:
        instance_tls = asking(files, files.ours.certificate)
        async with FakeInstance(tls=instance_tls, script=stream(b"data: a\n\n")) as one:
            which = {"static": [one.url], "ssl_ca_certs": files.ours.certificate}
            before = settings(tls[0], tls[1], **which, **tls[2])
            after = settings(tls[0], {} if wrong == "admin" else tls[1], **which)
            async with running(before, lambda: after) as service:
                await until(lambda: service.fleet.candidates("fake"))
                for name, pair in pairs.items():
                    shutil.copy(files.stranger.certificate, pair.certificate)
                    if name != wrong:  # whose certificate and key do not fit
                        shutil.copy(files.stranger.key, pair.key)
                service.reload()
                for number in (service.port, service.admin_port):  # the client trusts the old alone
                    await status_of(files, number, None)
                (instance,) = service.fleet
                instance.pool.close_idle()
                (await instance.pool.connect()).transport.abort()
                assert service.config is before

    run(check())


def test_settings_that_keep_their_start_are_named_until_they_are_as_at_the_start(
    run: Any, tmp_path: Path, caplog: Any
) -> None:
    before = settings()
    other = before.model_copy(
        update={"log": LogConfig(access_file=tmp_path / "log"), "etcd": EtcdConfig(url="etcd://a")}
    )

    async def check() -> None:
        configs = [before]
        async with running(before, lambda: configs[-1]) as service:
            for config, names in ((other, ["etcd", "log.access_file"]),) * 2 + ((before, []),):
                configs.append(config)
                caplog.clear()
                service.reload()
                said = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
                assert [one.split()[0] for one in said] == names

    run(check())


def ask(
    context: ssl.SSLContext, number: int, session: ssl.SSLSession | None
) -> tuple[bytes, ssl.SSLSession | None]:
    """The beginning of an answer, and a session to go on with."""
    with (
        socket.create_connection(("127.0.0.1", number), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as secure,
    ):
        secure.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        return secure.recv(1000), secure.session


def test_an_earlier_session_is_no_reason_to_refuse_who_may_come(run: Any, files: Files) -> None:
    shown = context_of(files, files.client)

    async def check() -> None:
        async with running(settings(port(files))) as service:
            _, session = await asyncio.to_thread(ask, shown, service.port, None)
            service.reload()
            answer, _ = await asyncio.to_thread(ask, shown, service.port, session)
            assert answer.startswith(b"HTTP/1.1 503")

    run(check())


def test_a_session_is_judged_by_when_it_was_made(files: Files) -> None:
    now_s = 1000.0
    section = ServiceConfig.model_validate({"listen": port(files)}).listen
    tls = PortTls(section, "listen", clock=lambda: now_s)
    tls.use(tls.read())

    def alert(made_s: float) -> int | None:
        session = SimpleNamespace(time=made_s)
        connection: Any = SimpleNamespace(session_reused=True, session=session, context=None)
        assert tls.context is not None
        return tls._hand_over(connection, None, tls.context)

    assert alert(1000) == ssl.ALERT_DESCRIPTION_ACCESS_DENIED
    assert alert(1001) is None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_earlier_session_does_not_outlive_its_authority(
    run: Any, files: Files, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    authorities = tmp_path / "authorities.pem"
    shutil.copy(files.ours.certificate, authorities)
    shown = context_of(files, files.client)
    shown.maximum_version = version

    async def check() -> None:
        async with running(settings(port(files, authorities=authorities))) as service:
            answer, session = await asyncio.to_thread(ask, shown, service.port, None)
            assert answer.startswith(b"HTTP/1.1 503")
            shutil.copy(files.others.certificate, authorities)
            service.reload()
            with contextlib.suppress(OSError):
                answer = b""
                answer, _ = await asyncio.to_thread(ask, shown, service.port, session)
            assert not answer

    run(check())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ssl_ca_certs": None}, "ssl_cert_reqs=2 asks for certificates of unknown origin"),
        ({"ssl_cert_reqs": 0}, "set ssl_cert_reqs to 2 (required) or 1 (optional)"),
        ({"ssl_cert_reqs": 3}, "less than or equal to 2"),
        ({"ssl_certfile": None, "ssl_keyfile": None}, "given without ssl_certfile"),
    ],
)
@pytest.mark.parametrize("section", ["listen", "admin"])
def test_settings_that_do_not_go_together(
    files: Files, section: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=section) as caught:
        ServiceConfig.model_validate({section: {**port(files), **changes}})
    assert says in str(caught.value)


@pytest.mark.parametrize("section", ["listen", "admin", "instances"])
def test_authorities_that_cannot_be_read_are_named_before_anything_starts(
    files: Files, section: str, tmp_path: Path
) -> None:
    absent, wrong = tmp_path / "absent.pem", tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for path in (absent, wrong):
        given = {"ssl_ca_certs": path} if section == "instances" else port(files, authorities=path)
        with pytest.raises(ConfigError, match=rf"{section}\.ssl_ca_certs") as caught:
            check(ServiceConfig.model_validate({section: given}))
        assert str(path) in str(caught.value)


def test_a_certificate_for_instances_that_cannot_be_read_is_named(
    files: Files, tmp_path: Path
) -> None:
    given = {"ssl_certfile": files.client.certificate, "ssl_keyfile": tmp_path / "absent"}
    with pytest.raises(ConfigError, match=r"instances\.ssl_certfile") as caught:
        check(ServiceConfig.model_validate({"instances": given}))
    assert "absent" in str(caught.value)
    with pytest.raises(ValueError, match="ssl_keyfile is given without ssl_certfile"):
        ServiceConfig.model_validate({"instances": {"ssl_keyfile": files.client.key}})


# -- who asks the admin port -----------------------------------------------------------------------


def test_commands_show_a_certificate(run: Any, files: Files) -> None:
    async def check() -> None:
        async with running(settings(admin=port(files))) as service:
            url = f"https://127.0.0.1:{service.admin_port}"
            given = ["instances", "--admin-url", url, "--token", "t"]
            given += ["--ssl-ca-certs", str(files.ours.certificate)]
            refused = await asyncio.to_thread(CliRunner().invoke, command, given)
            assert isinstance(refused.exception, NotNowError)
            given += ["--ssl-certfile", str(files.client.certificate)]
            given += ["--ssl-keyfile", str(files.client.key)]
            found = await asyncio.to_thread(CliRunner().invoke, command, given)
            assert (found.exit_code, found.exception) == (0, None)

    run(check())


def test_servers_register_with_a_certificate(run: Any, files: Files) -> None:
    async def check() -> None:
        config = settings(admin=port(files), registration_token="join")
        async with FakeInstance() as one, running(config) as service:
            asked = Registration(url=one.url, incarnation="1")
            where: dict[str, Any] = {
                "url": f"https://127.0.0.1:{service.admin_port}",
                "token": "join",
                "ssl_ca_certs": files.ours.certificate,
            }
            stranger = registry_client(RegistrationConfig(**where))
            with pytest.raises(NotNowError):
                await asyncio.to_thread(stranger.register, asked)
            where |= {"ssl_certfile": files.client.certificate, "ssl_keyfile": files.client.key}
            client = registry_client(RegistrationConfig(**where))
            lease = await asyncio.to_thread(client.register, asked)
            assert lease.name == f"127.0.0.1:{one.port}"

    run(check())


def test_a_server_that_cannot_show_its_certificate_says_so(files: Files, tmp_path: Path) -> None:
    config = RegistrationConfig(
        url="https://service:8001", ssl_certfile=tmp_path / "absent", ssl_keyfile=files.client.key
    )
    with pytest.raises(ConfigError, match=r"registration\.ssl_certfile"):
        registry_client(config)


# -- instances -------------------------------------------------------------------------------------


def asking(files: Files, authorities: Path) -> ssl.SSLContext:
    """What an instance of ours speaks HTTPS with, as `vllm serve --ssl-cert-reqs 2`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authorities))
    context.load_cert_chain(*files.server)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def shown(files: Files, pair: Pair) -> dict[str, Any]:
    return {
        "ssl_ca_certs": files.ours.certificate,
        "ssl_certfile": pair.certificate,
        "ssl_keyfile": pair.key,
    }


async def asked(service: Service, path: str = "/v1/completions") -> bytes:
    url = f"http://127.0.0.1:{service.port}{path}"
    async with aiohttp.ClientSession() as session, session.post(url, json={"model": "fake"}) as got:
        assert got.status == 200
        return await got.read()


def test_probes_and_requests_show_our_certificate(run: Any, files: Files) -> None:
    async def check() -> None:
        tls = asking(files, files.ours.certificate)
        async with FakeInstance(tls=tls, script=stream(b"data: a\n\n")) as one:
            given = shown(files, files.client)
            async with running(settings(static=[one.url], **given)) as service:
                await until(lambda: service.fleet.candidates("fake"))
                assert await asked(service) == b"data: a\n\n"
                assert one.requests[0].target == b"/v1/completions"
                admin = f"http://127.0.0.1:{service.admin_port}/v1/instances/127.0.0.1:{one.port}"
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(f"{admin}/control/sleep", headers=TOKEN) as reply,
                ):
                    assert reply.status == 200
                assert one.requests[1].target == b"/sleep"

    run(check())


@pytest.mark.parametrize("name", ["nothing", "a stranger", "an unknown authority"])
def test_an_instance_that_does_not_know_us_or_that_we_do_not_know_is_not_used(
    run: Any, files: Files, name: str
) -> None:
    async def check() -> None:
        given = shown(files, files.client)
        if name == "nothing":
            given = {"ssl_ca_certs": files.ours.certificate}
        elif name == "a stranger":
            given = shown(files, files.stranger)
        else:
            given["ssl_ca_certs"] = files.others.certificate
        async with (
            FakeInstance(tls=asking(files, files.ours.certificate)) as one,
            running(settings(static=[one.url], **given)) as service,
        ):
            instance = await the_only(service)
            await until(lambda: instance.life.reason.startswith("probe: "))
            assert instance.life.state is State.JOINING
            assert not one.requests

    run(check())


def test_a_reload_shows_a_renewed_certificate(run: Any, files: Files, tmp_path: Path) -> None:
    pair = files.client.copied(tmp_path, "pair")

    async def check() -> None:
        async with FakeInstance(tls=asking(files, files.others.certificate)) as one:
            config = settings(static=[one.url], **shown(files, pair))
            async with running(config) as service:
                instance = await the_only(service)
                await until(lambda: instance.life.reason.startswith("probe: "))
                files.stranger.copied(tmp_path, "pair")
                service.reload()
                await until(lambda: instance.life.state is State.READY)
                assert await asked(service) == b"{}"

    run(check())


def test_a_reload_says_what_needs_a_restart(run: Any, files: Files, caplog: Any) -> None:
    async def check() -> None:
        later = settings(**shown(files, files.client))
        service = Service(settings(), lambda: later)
        await service.start()
        service.reload()
        await service.stop()
        assert "instances.ssl_* settings have changed and need a restart" in caplog.text

    run(check())
