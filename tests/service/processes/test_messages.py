"""What one process says is what the other one reads, secrets and histograms included."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
import pytest

from xllm_plugin.registration import KvEventSource, Role
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry, ServiceConfig
from xllm_plugin.service.decision import Decision
from xllm_plugin.service.flow.stats import FlowStats
from xllm_plugin.service.key_file import KeyRecord
from xllm_plugin.service.measured import Measured, Outcome
from xllm_plugin.service.processes import messages
from xllm_plugin.service.processes.channel import Channel
from xllm_plugin.service.processes.messages import (
    BucketView,
    Figures,
    FleetNews,
    InstanceNews,
    KeyNews,
    Keys,
    KeyUse,
    QueuePart,
    Report,
    Settings,
    Start,
    decoder,
    encode,
    sections_of,
    settings_from,
)
from xllm_plugin.service.speed import Speed
from xllm_plugin.service.stats import Stats


def through(message: Any, kind: Any) -> Any:
    return decoder(kind).decode(encode(message))


def test_settings_arrive_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {
        "instances": {
            "static": [
                "http://a:1",
                {"url": "https://b", "kv_events": [{"endpoint": "tcp://h:1"}]},
            ],
            "api_key": "secret one",
        },
        "admin": {"token": "secret two"},
        "flow": {"enabled": True, "tenant_weights": {"ann": 2.0}},
        "keys": {"file": "/somewhere/keys.yaml"},
        "etcd": {"url": "etcd://h:2379/p", "password": "secret three", "user": "u"},
    }
    config = ServiceConfig(**sections)
    monkeypatch.setenv("XLLM_SERVICE_ROUTING__POLICY", "session")
    settings = through(Settings(sections_of(config), None), messages.FromControl)
    found = settings_from(settings.sections)
    assert found == config
    assert found.routing.policy == "cost", "nothing is read from a worker's environment"
    assert found.instances.api_key is not None
    assert found.instances.api_key.get_secret_value() == "secret one"


def test_a_start_arrives_whole() -> None:
    entry = InstanceEntry(
        url="http://a:1",
        name="one",
        role=Role.PREFILL,
        kv_events=(KvEventSource(endpoint="tcp://h:1", dp_rank=1),),
    )
    life = lifecycle.begin(lifecycle.Registered("7", leased=True), 3.0)
    news = FleetNews(
        5,
        [InstanceNews(entry, "etcd", 2, life, {"m": {"id": "m", "n": [1]}}, (), resumes=True)],
        [Figures("one", 1, 2, Speed(0.5))],
        {"two": life},
    )
    record = KeyRecord(name="ann", sha256="0" * 64, tokens_per_minute=3.5)
    keys = Keys(2, [KeyNews(record, 1, None, BucketView(3.5, -1.5, 9.0, 10, 5))])
    start = Start(1, 3, 8000, Settings(sections_of(ServiceConfig()), keys), news)
    found = through(start, messages.FromControl)
    assert found.fleet == news
    assert found.settings.keys == keys
    assert (found.index, found.num_workers, found.port) == (1, 3, 8000)


def test_a_report_arrives_whole() -> None:
    stats = Stats(answered={200: 3}, errors={"refused": 1}, hedges={"won": 2})
    measured, flow = Measured(), FlowStats()
    for histogram in (stats.ttft, stats.duration, measured.tpot, flow.waits):
        for seconds in (0.0, 0.01, 0.5, 1e6):
            histogram.observe(seconds)
    measured.outcomes = {Outcome.KEPT: 2}
    decision = Decision(1.5, None, "one", "cost", "because", 2, 1, "load")
    report = Report(
        instances={"one": stats},
        measured=measured,
        refusals={429: 2},
        decisions=[decision],
        causes=[("cost", "load", 1)],
        flow=flow,
        keys={"ann": KeyUse(1, 2, {"tokens": 3})},
        ttfts=[("one", 100.0, 0.25)],
        queue=[QueuePart(True, 3, "ann", 1, 10)],
        kv_index={"one": [{"dp_rank": 0, "state": "live"}]},
        idle_connections={"one": 2},
    )
    found = through(report, messages.FromWorker)
    assert encode(found) == encode(report)
    assert found.decisions == [decision]
    assert found.instances["one"].ttft.counts == stats.ttft.counts
    assert found.instances["one"].ttft.quantile_s(0.5) == stats.ttft.quantile_s(0.5)
    assert found.instances["one"].hedges == {"won": 2}
    assert found.measured.outcomes == {Outcome.KEPT: 2}


def test_what_has_no_form_is_our_mistake() -> None:
    with pytest.raises(NotImplementedError, match="Path2"):
        encode(type("Path2", (), {})())


def test_a_channel_keeps_messages_whole_and_says_when_the_other_end_goes(run: Any) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        got: list[Any] = []
        gone = asyncio.Event()
        reader = Channel(decoder(messages.FromWorker), got.append, gone.set)
        await loop.create_unix_connection(lambda: reader, sock=theirs)
        sent = [messages.Ready(), messages.Owner("r", "x" * 300_000), messages.Ready()]
        stream = b"".join(
            len(payload).to_bytes(4, "little") + payload for payload in map(encode, sent)
        )
        ours.setblocking(False)
        await loop.sock_sendall(ours, stream[:7])
        await asyncio.sleep(0.01)
        await loop.sock_sendall(ours, stream[7:])
        while len(got) < 3:
            await asyncio.sleep(0.001)
        assert got == sent
        ours.close()
        await gone.wait()
        reader.send(b"nobody reads this")

    run(check())


def test_nonsense_closes_the_channel(run: Any) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        told: list[Any] = []
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        ours, theirs = socket.socketpair()
        gone = asyncio.Event()
        reader = Channel(decoder(messages.FromWorker), told.append, gone.set)
        await loop.create_unix_connection(lambda: reader, sock=theirs)
        ours.sendall((3).to_bytes(4, "little") + b"abc")
        await gone.wait()
        assert isinstance(told[0], msgspec.DecodeError)
        ours.close()

    run(check())
