"""Services over one real etcd: they agree, outlive it and each other, and say when it is away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from xllm_plugin.errors import ConfigError
from xllm_plugin.etcd import wire
from xllm_plugin.etcd.client import AsyncEtcdClient
from xllm_plugin.etcd.config import EtcdAccess, parse_url
from xllm_plugin.service.app import Service, check
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.etcd_registry import EtcdRegistry
from xllm_plugin.service.lifecycle import State
from xllm_plugin.testing.etcd_server import EtcdServer
from xllm_plugin.testing.fake_instance import FakeInstance, stream
from xllm_plugin.testing.service_harness import PATIENCE_S, RunningService

ADMIN, JOIN = "see", "join"


class Replica(RunningService):
    """One of the services, and a client of its ports."""

    @property
    def registry(self) -> EtcdRegistry:
        assert isinstance(self.service.registrations, EtcdRegistry)
        return self.service.registrations

    async def until_connected(self, is_connected: bool) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.registry.is_connected is not is_connected:
                await asyncio.sleep(0.005)

    async def complete(self) -> int:
        """One request of a client; its status."""
        url = f"http://127.0.0.1:{self.service.port}/v1/completions"
        async with self.session.post(url, json={"model": "fake", "prompt": "x"}) as reply:
            await reply.read()
            return reply.status


def settings(etcd: EtcdServer, prefix: str, **options: Any) -> ServiceConfig:
    return ServiceConfig(
        listen={"host": "127.0.0.1", "port": 0},
        admin={"port": 0, "token": ADMIN},
        instances={
            "registration_token": JOIN,
            "probe_interval_s": 0.02,
            "lease_s": 60,
            "suspect_s": 60,
        },
        etcd={
            "url": f"{etcd.url}/{prefix}",
            "poll_s": 0.1,
            "dial_timeout_s": 5,
            "command_timeout_s": 5,
            **options,
        },
        timeouts={"drain_s": 1.0},
    )


@asynccontextmanager
async def replicas(count: int, config: ServiceConfig) -> AsyncIterator[list[Replica]]:
    services = [Service(config) for _ in range(count)]
    async with aiohttp.ClientSession() as session:
        try:
            for service in services:
                await service.start()
            yield [Replica(service, session, ADMIN) for service in services]
        finally:
            for service in services:
                await service.stop()


def p(instance: FakeInstance) -> str:
    return f"p{instance.port}"


def registration(instance: FakeInstance, incarnation: str = "1") -> dict[str, Any]:
    return {"url": instance.url, "incarnation": incarnation, "models": ["fake"]}


def path_of(instance: FakeInstance) -> str:
    return f"/v1/registrations/127.0.0.1:{instance.port}"


@asynccontextmanager
async def client_of(etcd: EtcdServer) -> AsyncIterator[AsyncEtcdClient]:
    async with AsyncEtcdClient(parse_url(etcd.url), EtcdAccess()) as client:
        yield client


async def put_instance(
    client: AsyncEtcdClient, prefix: str, instance: FakeInstance, incarnation: str = "1"
) -> int:
    """As a server that registers in etcd itself; returns its lease."""
    lease = (await client.send(wire.grant(600))).lease
    key = f"/{prefix}/instances/127.0.0.1:{instance.port}"
    value = json.dumps(registration(instance, incarnation)).encode()
    await client.send(wire.put(key, value, lease))
    return lease


def test_two_services_agree(run: Any, etcd: EtcdServer) -> None:
    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            FakeInstance() as other,
            client_of(etcd) as client,
            replicas(2, settings(etcd, "agree")) as (first, second),
        ):
            status, lease = await first.admin("POST", "/v1/registrations", registration(one), JOIN)
            assert (status, lease["lease_s"]) == (200, 60)
            await put_instance(client, "agree", other)
            for replica in (first, second):
                await replica.until(**{p(one): State.READY, p(other): State.READY})
                assert await replica.complete() == 200
            # A heartbeat may go to either, and a restarted server register at the other one.
            beat = {"incarnation": "1", "load": {"num_running": 3}}
            assert (await second.admin("POST", path_of(one) + "/heartbeat", beat, JOIN))[0] == 200
            again = registration(one, "2")
            assert (await second.admin("POST", "/v1/registrations", again, JOIN))[0] == 200
            for replica in (first, second):
                async with asyncio.timeout(PATIENCE_S):
                    while replica.service.fleet.get(f"127.0.0.1:{one.port}") is None or (
                        replica.service.fleet.get(f"127.0.0.1:{one.port}").life.incarnation != "2"
                    ):
                        await asyncio.sleep(0.005)
            old = await first.admin("POST", path_of(one) + "/heartbeat", beat, JOIN)
            assert old[0] == 409
            # Who drains by hand at one service drains at all.
            drain = f"/v1/instances/127.0.0.1:{other.port}"
            assert (await first.admin("POST", drain + "/drain"))[1]["state"] == "draining"
            await second.until(**{p(other): State.DRAINING})
            await second.admin("POST", drain + "/undrain")
            await first.until(**{p(other): State.READY})
            # One that leaves drains first, and is then forgotten at once.
            beat = {"incarnation": "2", "is_draining": True}
            _, lease = await first.admin("POST", path_of(one) + "/heartbeat", beat, JOIN)
            assert lease["in_flight"] is None
            await second.until(**{p(one): State.DRAINING})
            away = path_of(one) + "?incarnation=2"
            assert (await second.admin("DELETE", away, None, JOIN))[0] == 200
            for replica in (first, second):
                await replica.until(**{p(one): None, p(other): State.READY})

    run(check_it())


def test_a_lease_is_told_as_it_was_given(run: Any, etcd: EtcdServer) -> None:
    """Settings that a reload has changed hold for leases that are given after it."""

    async def check_it() -> None:
        config = settings(etcd, "told")
        shorter = {**config.instances.model_dump(), "lease_s": 30}
        update = {"instances": type(config.instances).model_validate(shorter)}
        async with (
            FakeInstance() as one,
            FakeInstance() as other,
            replicas(1, config) as (replica,),
        ):
            _, lease = await replica.admin("POST", "/v1/registrations", registration(one), JOIN)
            assert lease["lease_s"] == 60
            replica.service._load = lambda: config.model_copy(update=update)
            replica.service.reload()
            beat = path_of(one) + "/heartbeat"
            _, lease = await replica.admin("POST", beat, {"incarnation": "1"}, JOIN)
            assert lease["lease_s"] == 60
            _, lease = await replica.admin("POST", "/v1/registrations", registration(one), JOIN)
            assert lease["lease_s"] == 60
            _, lease = await replica.admin("POST", "/v1/registrations", registration(other), JOIN)
            assert lease["lease_s"] == 30

    run(check_it())


def test_load_is_read_from_the_server_itself(run: Any, etcd: EtcdServer) -> None:
    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            client_of(etcd) as client,
            replicas(1, settings(etcd, "load")) as (replica,),
        ):
            one.heartbeat = {"incarnation": "other", "load": {"num_running": 9}}
            one.metrics = "vllm:num_requests_running 2\nprocess_start_time_seconds 17.5\n"
            await put_instance(client, "load", one)
            await replica.until(**{p(one): State.READY})
            (instance,) = replica.service.fleet
            async with asyncio.timeout(PATIENCE_S):
                while instance.foreign_requests != 2:  # a plain server: by its /metrics
                    await asyncio.sleep(0.005)
                assert instance.life.incarnation == "1"
                one.heartbeat = {"incarnation": "1", "load": {"num_running": 5, "num_waiting": 2}}
                while instance.foreign_requests != 7:
                    await asyncio.sleep(0.005)
            assert instance.load is not None

    run(check_it())


def test_a_lease_that_lapses(run: Any, etcd: EtcdServer) -> None:
    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            client_of(etcd) as client,
            replicas(1, settings(etcd, "lapse")) as (replica,),
        ):
            lease = await put_instance(client, "lapse", one)
            await replica.until(**{p(one): State.READY})
            await client.send(wire.revoke(lease))
            await replica.until(**{p(one): State.SUSPECT})
            assert await replica.complete() == 200  # better than nobody
            await put_instance(client, "lapse", one)
            await replica.until(**{p(one): State.READY})

    run(check_it())


def test_etcd_dies_and_comes_back(
    run: Any, etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            FakeInstance() as other,
            client_of(etcd) as client,
            replicas(2, settings(etcd, "away")) as (first, second),
        ):
            lease = await put_instance(client, "away", one)
            for replica in (first, second):
                await replica.until(**{p(one): State.READY})
            _, found = await first.admin("GET", "/v1/instances")
            assert found["registry"]["state"] == "connected"
            etcd.kill()
            for replica in (first, second):
                await replica.until_connected(False)
                assert await replica.complete() == 200
            _, found = await first.admin("GET", "/v1/instances")
            assert found["registry"]["state"] == "away"
            assert "ConnectError" in found["registry"]["problem"]
            assert (await first.admin("GET", "/health"))[1]["registry"] == "away"
            assert list(first.service.fleet.troubles) == ["etcd"]
            _, metrics = await first.admin("GET", "/metrics")
            assert "xllm_service_etcd_connected 0.0" in metrics
            assert "xllm_service_etcd_age_seconds " in metrics
            # What needs etcd says so; a drain holds here meanwhile.
            status, reply = await first.admin(
                "POST", "/v1/registrations", registration(other), JOIN
            )
            assert (status, "ConnectError" in str(reply)) == (503, True)
            drain = f"/v1/instances/127.0.0.1:{one.port}"
            status, reply = await first.admin("POST", drain + "/drain")
            assert (status, "here only" in str(reply)) == (503, True)
            assert first.states() == {f"127.0.0.1:{one.port}": State.DRAINING}
            assert second.states() == {f"127.0.0.1:{one.port}": State.READY}
            await first.admin("POST", drain + "/undrain")
            # Probes go on: an instance that dies is not used.
            await one.die()
            await second.until(**{p(one): State.SUSPECT})
            etcd.start()
            for replica in (first, second):
                await replica.until_connected(True)
            await client.send(wire.revoke(lease))
            status, _ = await first.admin("POST", "/v1/registrations", registration(other), JOIN)
            assert status == 200
            for replica in (first, second):
                await replica.until(**{p(other): State.READY})
                assert await replica.complete() == 200

    with caplog.at_level(logging.INFO, "xllm_plugin.service"):
        run(check_it())
    assert sum("etcd is away" in record.message for record in caplog.records) == 2


def test_an_etcd_that_has_lost_everything(run: Any, etcd: EtcdServer) -> None:
    """Nobody is sent away for it: servers are suspect, and used, until they register again."""

    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            client_of(etcd) as client,
            replicas(1, settings(etcd, "lost")) as (replica,),
        ):
            await put_instance(client, "lost", one)
            await replica.until(**{p(one): State.READY})
            for _ in range(5):
                await client.send(wire.put("/revisions", b""))
            etcd.kill()
            etcd.forget()
            etcd.start()
            await replica.until(**{p(one): State.SUSPECT})
            assert await replica.complete() == 200
            await put_instance(client, "lost", one)
            await replica.until(**{p(one): State.READY})

    run(check_it())


def test_a_watch_whose_past_is_compacted_goes_on_from_a_whole_read(
    run: Any, etcd: EtcdServer
) -> None:
    """A service that was cut off for long asks for revisions that are no more."""

    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            FakeInstance() as other,
            client_of(etcd) as client,
            replicas(1, settings(etcd, "compact", poll_s=3600)) as (replica,),
        ):
            await put_instance(client, "compact", one)
            await replica.until(**{p(one): State.READY})
            registry = replica.registry
            watch = registry._client.watch
            asked: list[int] = []

            def late(prefix: str, from_revision: int) -> Any:
                asked.append(from_revision)
                return watch(prefix, 1 if len(asked) == 1 else from_revision)

            registry._client.watch = late  # type: ignore[method-assign]
            revision = (await client.send(wire.read_all("/"))).revision
            body = {"revision": str(revision)}
            await client.send(wire.Call("/v3/kv/compaction", body, lambda answer: answer))
            etcd.kill()  # the watch breaks; the next one asks for revision 1
            etcd.start()
            async with asyncio.timeout(PATIENCE_S):
                while len(asked) < 2:
                    await asyncio.sleep(0.005)
            await put_instance(client, "compact", other)
            await replica.until(**{p(one): State.READY, p(other): State.READY})
            assert len(asked) == 2

    run(check_it())


def test_a_watch_that_says_nothing_is_found_out_by_reading(run: Any, etcd: EtcdServer) -> None:
    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            client_of(etcd) as client,
        ):
            service = Service(settings(etcd, "silent"))
            registry = service.registrations
            assert isinstance(registry, EtcdRegistry)
            num_watches = 0

            async def silent(prefix: str, from_revision: int) -> Any:
                nonlocal num_watches
                num_watches += 1
                await asyncio.Event().wait()
                yield ()

            registry._client.watch = silent  # type: ignore[method-assign, assignment]
            await service.start()
            async with aiohttp.ClientSession() as session:
                replica = Replica(service, session, ADMIN)
                await replica.until_connected(True)
                await put_instance(client, "silent", one)
                await replica.until(**{p(one): State.READY})
                async with asyncio.timeout(PATIENCE_S):
                    while num_watches < 2:  # it is not trusted any longer
                        await asyncio.sleep(0.005)
            await service.stop()

    run(check_it())


def test_an_etcd_that_answers_nobody_is_away(run: Any, etcd: EtcdServer) -> None:
    async def check_it() -> None:
        config = settings(etcd, "frozen", command_timeout_s=0.5, dial_timeout_s=0.5)
        async with (
            FakeInstance() as one,
            client_of(etcd) as client,
            replicas(1, config) as (replica,),
        ):
            await put_instance(client, "frozen", one)
            await replica.until(**{p(one): State.READY})
            etcd.freeze()
            try:
                await replica.until_connected(False)
                assert await replica.complete() == 200
                assert replica.states() == {f"127.0.0.1:{one.port}": State.READY}
            finally:
                etcd.thaw()
            await replica.until_connected(True)

    run(check_it())


def test_a_service_that_dies_costs_its_own_sockets_only(run: Any, etcd: EtcdServer) -> None:
    async def check_it() -> None:
        async with (
            FakeInstance() as one,
            replicas(2, settings(etcd, "dies")) as (first, second),
        ):
            await first.admin("POST", "/v1/registrations", registration(one), JOIN)
            for replica in (first, second):
                await replica.until(**{p(one): State.READY})
            one.script = stream(*[b"data: x\n\n"] * 50, pause_s=0.01)

            async def read(replica: Replica) -> int:
                url = f"http://127.0.0.1:{replica.service.port}/v1/completions"
                async with replica.session.post(url, json={"model": "fake"}) as reply:
                    return len(await reply.read())

            lost, kept = asyncio.create_task(read(first)), asyncio.create_task(read(second))
            async with asyncio.timeout(PATIENCE_S):
                while len(one.requests) < 2:
                    await asyncio.sleep(0.005)
            first.service.proxy.cut_off()  # as a killed process leaves its sockets
            with pytest.raises(aiohttp.ClientError):
                await lost
            assert await kept == 450
            # Its instance goes on at the other one.
            beat = {"incarnation": "1"}
            assert (await second.admin("POST", path_of(one) + "/heartbeat", beat, JOIN))[0] == 200
            assert second.states() == {f"127.0.0.1:{one.port}": State.READY}

    run(check_it())


def test_an_etcd_that_is_not_there_yet(
    run: Any, etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The service starts, says so, serves what it has, and joins when etcd comes."""

    async def check_it() -> None:
        async with FakeInstance() as one:
            etcd.kill()
            config = settings(etcd, "later")
            static = {**config.instances.model_dump(), "static": [one.url]}
            config = config.model_copy(
                update={"instances": type(config.instances).model_validate(static)}
            )
            try:
                async with replicas(1, config) as (replica,):
                    await replica.until(**{p(one): State.READY})
                    assert await replica.complete() == 200
                    etcd.start()
                    await replica.until_connected(True)
            finally:
                if etcd._process is None:
                    etcd.start()

    with caplog.at_level(logging.WARNING, "xllm_plugin.service"):
        run(check_it())
    assert sum("etcd is away" in record.message for record in caplog.records) == 1


def test_wrong_options_are_named_before_anything_starts(etcd: EtcdServer, tmp_path: Path) -> None:
    config = settings(etcd, "x", cacert=tmp_path / "absent.pem")
    with pytest.raises(ConfigError, match=r"absent.pem.*--cacert"):
        check(config)
