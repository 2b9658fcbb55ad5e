"""A server's registration: against a scripted service, and against the real one."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram

from xllm_plugin.channel.messages import EngineIdentity, EngineLoad, Reading, Snapshot
from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.instance.latency import LatencyMeter
from xllm_plugin.instance.registrar import (
    Registrar,
    advertised_url,
    kv_event_sources,
    leaves_first,
    load_of,
)
from xllm_plugin.instance.registry_clients import ServiceRegistry, make_client, registry_client
from xllm_plugin.registration import (
    Heartbeat,
    Lease,
    Load,
    Registration,
    RegistrationConfig,
    Role,
)
from xllm_plugin.service.app import Service
from xllm_plugin.service.config import (
    AdminConfig,
    InstancesConfig,
    ListenConfig,
    ServiceConfig,
)
from xllm_plugin.service.lifecycle import State
from xllm_plugin.testing.fake_instance import FakeInstance

CONFIG = RegistrationConfig(url="http://service:8001", token="join", drain_s=1.0)
LEASE = {"name": "here:8000", "lease_s": 6.0, "in_flight": 0}


class Scripted:
    """A service that answers from a list, and keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, Any]] = []
        self.tokens: set[str] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        self.asked.append((request.method, request.url.raw_path.decode(), body))
        self.tokens.add(request.headers.get("authorization", ""))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer, json={"error": {"message": "because"}})
        return httpx.Response(200, json=answer)


def scripted_client(
    config: RegistrationConfig, answer: Callable[[httpx.Request], httpx.Response]
) -> httpx.Client:
    headers = make_client(config, ssl.create_default_context()).headers
    return httpx.Client(transport=httpx.MockTransport(answer), headers=headers)


class Server:
    """A registrar with its boundary in hand."""

    def __init__(self, *answers: Any, config: RegistrationConfig = CONFIG) -> None:
        self.service = Scripted(*answers)
        self.num_unfinished = 0
        self.load: Load | None = Load(num_running=2)
        self.draw = 0.5
        self.registrar = Registrar(
            config,
            Registration(url="http://here:8000", incarnation="i1", models=("m",)),
            lambda: self.load,
            lambda: self.num_unfinished,
            registry=ServiceRegistry(config, scripted_client(config, self.service)),
            draw=lambda: self.draw,
        )


REFUSED = httpx.ConnectError("refused")


def test_it_registers_once_and_beats_thrice_a_lease() -> None:
    server = Server(LEASE, LEASE, {**LEASE, "lease_s": 3.0})
    assert [server.registrar.step() for _ in range(3)] == [2.0, 2.0, 1.0]
    (post, path, body), (_, beat_path, beat), _ = server.service.asked
    assert (post, path, body["url"], body["models"]) == (
        "POST",
        "/v1/registrations",
        "http://here:8000",
        ["m"],
    )
    assert beat_path == "/v1/registrations/here%3A8000/heartbeat"
    assert (beat["incarnation"], beat["load"]["num_running"]) == ("i1", 2)
    assert server.service.tokens == {"Bearer join"}


def test_a_service_that_was_restarted_is_registered_at_again() -> None:
    server = Server(LEASE, 409, LEASE)
    assert [server.registrar.step() for _ in range(3)] == [2.0, 0.0, 2.0]
    assert [path for _, path, _ in server.service.asked][2] == "/v1/registrations"


def test_a_service_that_is_away_is_said_once_and_asked_ever_less(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server(*[REFUSED] * 9, LEASE)
    with caplog.at_level(logging.INFO):
        waits = [server.registrar.step() for _ in range(10)]
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 2.0]
    ours = [record.levelname for record in caplog.records if record.name.startswith("vllm")]
    assert ours == ["WARNING", "INFO"]
    assert "refused" in caplog.text


def test_retries_are_spread() -> None:
    waits = []
    for draw in (0.0, 0.999):
        server = Server(REFUSED)
        server.draw = draw
        waits.append(server.registrar.step())
    assert waits[0] == 0.125
    assert waits[1] > 0.37


def test_what_the_service_says_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    for answer, said in ((401, "refuses the token"), (409, "because"), ({"x": 1}, "no lease")):
        caplog.clear()
        assert Server(answer).registrar.step() == 0.25
        assert said in caplog.text
        assert "join" not in caplog.text


def test_an_outage_in_mid_life_keeps_the_lease() -> None:
    """The service may still know us: a heartbeat comes first, not a registration."""
    server = Server(LEASE, REFUSED, LEASE)
    for _ in range(3):
        server.registrar.step()
    assert server.service.asked[2][1].endswith("/heartbeat")


def test_a_lease_that_is_held_is_not_given_up_for_long() -> None:
    server = Server(LEASE, *[REFUSED] * 9)
    waits = [server.registrar.step() for _ in range(10)]
    assert waits == [2.0, 0.25, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_of_several_services_the_next_is_asked_when_one_is_away() -> None:
    config = CONFIG.model_copy(update={"url": "http://one:1, http://two:2/"})
    hosts: list[str] = []
    server = Server(LEASE, LEASE, config=config)

    def answer(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        if request.url.host == "one":
            raise REFUSED
        return server.service(request)

    server.registrar._registry = ServiceRegistry(config, scripted_client(config, answer))
    assert [server.registrar.step() for _ in range(3)] == [0.25, 2.0, 2.0]
    assert hosts == ["one", "two", "two"]


def test_leaving_drains_and_then_deregisters() -> None:
    busy = {**LEASE, "in_flight": 1}
    server = Server(LEASE, busy, LEASE, LEASE)
    server.registrar.step()
    server.registrar.leave(drain=True)
    beats = [body for _, path, body in server.service.asked if path.endswith("/heartbeat")]
    assert [beat["is_draining"] for beat in beats] == [True, True]
    assert server.service.asked[-1][:2] == (
        "DELETE",
        "/v1/registrations/here%3A8000?incarnation=i1",
    )
    server.registrar.leave(drain=True)  # vLLM shuts a client down twice
    server.registrar.step()  # the thread's, which waited for its turn
    assert len(server.service.asked) == 4


def test_leaving_waits_for_requests_of_others_too() -> None:
    server = Server(LEASE, 409, REFUSED, 409)
    server.num_unfinished = 1

    def answer(request: httpx.Request) -> httpx.Response:
        if len(server.service.asked) == 2:
            server.num_unfinished = 0
        return server.service(request)

    server.registrar._registry = ServiceRegistry(CONFIG, scripted_client(CONFIG, answer))
    server.registrar.step()
    server.registrar.leave(drain=True)
    assert server.num_unfinished == 0
    assert not server.service.answers


def test_leaving_gives_up_after_its_time(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(LEASE, LEASE, LEASE, config=CONFIG.model_copy(update={"drain_s": 0.01}))
    server.num_unfinished = 3
    server.registrar.step()
    server.registrar.leave(drain=True)
    assert "3 requests are cut off" in caplog.text


def test_who_never_registered_leaves_without_a_word() -> None:
    server = Server()
    server.registrar.leave(drain=True)
    assert not server.service.asked


def test_the_engine_is_stopped_after_leaving_and_drained_only_off_the_loop() -> None:
    calls: list[Any] = []
    registrar: Any = SimpleNamespace(leave=lambda *, drain: calls.append(drain))

    def stop(timeout: float | None = None) -> None:
        calls.append(timeout)

    shutdown = leaves_first(stop, registrar)
    shutdown(timeout=7)

    async def on_the_loop() -> None:
        shutdown()

    asyncio.run(on_the_loop())
    assert calls == [True, 7, False, None]


def args(**given: Any) -> Namespace:
    defaults = {"host": None, "port": 8000, "uds": None, "ssl_keyfile": None, "ssl_certfile": None}
    return Namespace(**{**defaults, **given})


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({"host": "10.1.2.3"}, "http://10.1.2.3:8000"),
        ({"host": "fe80::1", "port": 1}, "http://[fe80::1]:1"),
        ({"host": "h", "ssl_keyfile": "k", "ssl_certfile": "c"}, "https://h:8000"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8000"),
        ({}, "http://127.0.0.1:8000"),
    ],
)
def test_the_address_that_is_registered(given: dict[str, Any], url: str) -> None:
    assert advertised_url(RegistrationConfig(url="http://127.0.0.1:9"), args(**given)) == url


def test_an_address_can_be_given_and_a_unix_socket_has_none() -> None:
    config = RegistrationConfig(url="http://127.0.0.1:9", advertise_url="https://front/")
    assert advertised_url(config, args(uds="/x")) == "https://front"
    with pytest.raises(ConfigError, match="--register with --uds /x"):
        advertised_url(RegistrationConfig(url="http://127.0.0.1:9"), args(uds="/x"))
    with pytest.raises(ConfigError, match="no way there"):
        advertised_url(RegistrationConfig(url="http://no-such-host.invalid"), args())
    with pytest.raises(ValueError, match="write http://host:port"):
        RegistrationConfig(url="service:8001")


def test_event_endpoints_are_reachable_from_elsewhere() -> None:
    def publisher(endpoint: str, replay: str | None) -> Any:
        return SimpleNamespace(endpoint=endpoint, replay_endpoint=replay, topic="kv")

    found = {1: publisher("tcp://10.0.0.9:41", None), 0: publisher("tcp://*:5557", "tcp://*:5558")}
    first, second = kv_event_sources(found, "http://h:1")
    assert (first.dp_rank, first.endpoint, first.replay_endpoint, first.topic) == (
        0,
        "tcp://h:5557",
        "tcp://h:5558",
        "kv",
    )
    assert (second.endpoint, second.replay_endpoint) == ("tcp://10.0.0.9:41", None)


def reading(rank: int, **load: int) -> Reading:
    identity = EngineIdentity(instance_id="i", model="m", platform="xllm", device="cpu", pid=1)
    return Reading(
        dp_rank=rank,
        snapshot=Snapshot(
            sequence=1, monotonic_s=0, wall_time_s=0, engine=identity, load=EngineLoad(**load)
        ),
    )


def test_the_load_of_all_ranks_and_the_latencies_since_the_last_heartbeat() -> None:
    registry = CollectorRegistry(auto_describe=True)
    ttft, tpot = (
        Histogram(name, "", ["engine"], registry=registry)
        for name in ("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds")
    )
    meter = LatencyMeter(registry)
    readings = (
        reading(0, num_running=2, num_waiting=1, num_blocks_total=10, num_blocks_free=5),
        Reading(dp_rank=1, error="gone"),
        reading(2, num_running=1, num_blocks_total=30, num_blocks_free=5),
    )
    ttft.labels("0").observe(1.0)
    ttft.labels("1").observe(3.0)
    load = load_of(readings, meter)
    assert load is not None
    assert (load.num_running, load.num_waiting, load.kv_usage) == (3, 1, 0.75)
    assert (load.ttft_s, load.tpot_s) == (2.0, None)
    tpot.labels("0").observe(0.05)
    again = load_of(readings, meter)
    assert again is not None
    assert (again.ttft_s, again.tpot_s) == (None, 0.05)
    assert load_of((Reading(dp_rank=1, error="gone"),), meter) is None


# -- with the real service ---------------------------------------------------------------------


def service_config(port: int = 0) -> ServiceConfig:
    return ServiceConfig(
        listen=ListenConfig(host="127.0.0.1", port=0),
        admin=AdminConfig(port=port, token="admin"),
        instances=InstancesConfig(registration_token="join", probe_interval_s=0.02),
    )


@pytest.fixture
def loop_thread() -> Iterator[Callable[[Any], Any]]:
    """An event loop for the service, beside this thread, on which the registrar works."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_server_joins_outlives_its_service_and_leaves(
    loop_thread: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def begin(port: int = 0) -> Service:
        service = Service(service_config(port))
        await service.start()
        return service

    async def until(service: Service, state: State | None) -> None:
        async with asyncio.timeout(30):
            while [one.life.state for one in service.fleet] != ([state] if state else []):
                await asyncio.sleep(0.005)

    server = FakeInstance()
    loop_thread(server.__aenter__())
    service = loop_thread(begin())
    config = RegistrationConfig(url=f"http://127.0.0.1:{service.admin_port}", token="join")
    registration = Registration(
        url=server.url, incarnation="i1", models=("fake", "lora"), role=Role.DECODE, capacity=2.0
    )
    registrar = Registrar(
        config,
        registration,
        lambda: Load(num_running=3, num_waiting=2, kv_usage=0.5, tpot_s=0.04),
        lambda: 0,
        registry=registry_client(config),
    )
    assert registrar.step() == 2.0
    assert registrar.step() == 2.0
    loop_thread(until(service, State.READY))
    (instance,) = service.fleet
    assert (instance.entry.role, instance.capacity) == (Role.DECODE, 2.0)
    assert (instance.foreign_requests, instance.load.tpot_s) == (5, 0.04)
    assert instance.reported == {}  # its heartbeat says more than its /metrics
    # The service is started anew, on the same port, and knows nobody.
    port = service.admin_port
    loop_thread(service.stop())
    assert registrar.step() < 1.0
    service = loop_thread(begin(port))
    assert registrar.step() == 0.0
    assert registrar.step() == 2.0
    loop_thread(until(service, State.READY))
    (instance,) = service.fleet
    service.fleet.book(instance, 1)
    loop_thread(asyncio.sleep(0))
    leaving = threading.Thread(target=registrar.leave, kwargs={"drain": True})
    leaving.start()
    loop_thread(until(service, State.DRAINING))
    assert leaving.is_alive()
    service.fleet.release(instance, 1)
    leaving.join(30)
    loop_thread(until(service, None))
    loop_thread(service.stop())
    loop_thread(server.die())
    assert "join" not in caplog.text.replace("joining", "")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile is given without ssl_certfile"),
        ({"url": "etcd://one:2379/x", "ssl_ca_certs": "ca.pem"}, "give etcd.cacert"),
    ],
)
def test_certificates_that_would_be_of_no_use_are_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RegistrationConfig.model_validate({"url": "https://one:8001", **given})


def test_certificates_are_read_again_when_a_service_cannot_be_asked() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("certificate has expired", request=request)

    renewed: list[int] = []
    client = httpx.Client(transport=httpx.MockTransport(away))
    registry = ServiceRegistry(CONFIG, client, lambda: renewed.append(1))
    with pytest.raises(NotNowError, match="certificate has expired"):
        registry.beat(Lease(name="a", lease_s=6.0), Heartbeat(incarnation="1"))
    assert renewed == [1]
