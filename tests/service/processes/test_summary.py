"""What the admin port shows of several workers: counters of all, gauges of the living."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from xllm_plugin.service import lifecycle
from xllm_plugin.service.carrier import Carrier
from xllm_plugin.service.config import FlowConfig, InstanceEntry, ServiceConfig
from xllm_plugin.service.dashboard.overview import degradations, overview
from xllm_plugin.service.decision import Decision
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.flow.metrics import describe_keys, describe_queue
from xllm_plugin.service.flow.stats import FlowStats
from xllm_plugin.service.key_file import KeyRecord, hash_of, write
from xllm_plugin.service.measured import Measured, Outcome
from xllm_plugin.service.metrics import ServiceCollector
from xllm_plugin.service.processes.limits import IN_FLIGHT as KEY_IN_FLIGHT
from xllm_plugin.service.processes.limits import ControlKeyRing
from xllm_plugin.service.processes.messages import KeyUse, QueuePart, Report
from xllm_plugin.service.processes.mirror import MirrorFleet
from xllm_plugin.service.processes.news import IN_FLIGHT, LOAD_WORDS, ControlFleet
from xllm_plugin.service.processes.reports import Reporter
from xllm_plugin.service.processes.shared import SharedMemory
from xllm_plugin.service.processes.slots import Ledger, Slots
from xllm_plugin.service.processes.summary import ControlProxy
from xllm_plugin.service.processes.worker_proxy import WorkerFlow, part_of
from xllm_plugin.service.stats import Stats


def nothing(*_: Any) -> None:
    """Nobody is told."""


class Desk:
    """A control process's view of two workers that only say what the test says."""

    def __init__(self, keys: Path) -> None:
        write(keys, [KeyRecord(name="ann", sha256=hash_of("k"), max_concurrency=9)])
        config = ServiceConfig(flow={"enabled": True}, keys={"file": keys})  # type: ignore[arg-type]
        self.memory = SharedMemory(2)
        self.carrier = Carrier(config, make_fleet=self.make_fleet, make_proxy=self.make_proxy)
        proxy = self.carrier.proxy
        assert isinstance(proxy, ControlProxy)
        self.proxy = proxy
        self.instance = self.carrier.fleet.register(InstanceEntry(url="http://a:1"), source="t")
        self.carrier.fleet.report(self.instance, lifecycle.Alive(""))

    def make_fleet(self, timings: lifecycle.Timings, make_pool: Callable[..., Any]) -> Fleet:
        loads = self.memory.instances
        slots = Slots(8, lambda slot: loads.is_idle(slot, LOAD_WORDS), "instances", Ledger())
        return ControlFleet(timings, make_pool, loads=loads, slots=slots, changed=nothing)

    def make_keys(self, path: Path, num_replicas: int) -> ControlKeyRing:
        slots = Slots(8, lambda _: True, "API keys", Ledger())
        table = self.memory.keys
        return ControlKeyRing(
            path, num_replicas, lambda: 0.0, table=table, slots=slots, changed=nothing
        )

    def make_proxy(self, *parts: Any) -> ControlProxy:
        return ControlProxy(*parts, num_workers=2, make_keys=self.make_keys, cut_off=nothing)

    def sample(self, name: str, **labels: str) -> float | None:
        registry = CollectorRegistry()
        registry.register(ServiceCollector(self.proxy))
        return registry.get_sample_value(f"xllm_service_{name}", labels)


def report_of(number: int) -> Report:
    """`number` requests, all alike."""
    stats, measured, flow = (
        Stats(answered={200: number}, output_tokens=number),
        Measured(),
        FlowStats(),
    )
    for _ in range(number):
        stats.duration.observe(0.5)
        measured.ttft.observe(0.25)
    flow.outcomes["sent"] = number
    measured.num_requests, measured.outcomes = number, {Outcome.KEPT: number}
    return Report(
        instances={"a:1": stats, "gone": Stats()},
        measured=measured,
        refusals={429: number},
        decisions=[Decision(1.0, "m", "a:1", "cost", "why", 2, 1, "load")] * number,
        causes=[("cost", "load", number)],
        flow=flow,
        keys={"ann": KeyUse(number, 10 * number, {"tokens": number}), "removed": KeyUse(1, 1, {})},
        num_prompts_unread=number,
        num_chats_misread=number,
        ttfts=[("a:1", 100.0, 0.2)],
        num_clients=number,
        queue=[QueuePart(True, 0, "ann", number, 10), QueuePart(False, 0, "ann", 1, 5)],
        idle_connections={"a:1": number},
        cpu_s=1.5,
        resident_bytes=1000,
    )


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_counters_are_summed_and_survive_their_worker(run: Any, keys: Path) -> None:
    async def check() -> None:
        desk = Desk(keys)
        proxy = desk.proxy
        for worker, number in ((0, 3), (1, 4), (0, 2)):
            proxy.take(worker, report_of(number))
        assert desk.sample("requests_total", server="a:1", status="200") == 9
        assert desk.sample("output_tokens_total", server="a:1") == 9
        assert desk.sample("duration_seconds_count", server="a:1") == 9
        assert desk.sample("duration_seconds_sum", server="a:1") == 4.5
        assert desk.sample("refusals_total", status="429") == 9
        assert desk.sample("decisions_total", policy="cost", cause="load") == 9
        assert desk.sample("slo_requests_total", outcome="kept") == 9
        assert desk.sample("queue_outcomes_total", outcome="sent") == 9
        assert desk.sample("key_tokens_total", key="ann") == 90
        assert desk.sample("key_refusals_total", key="ann", limit="tokens") == 9
        assert desk.sample("prompts_unread_total") == 9
        assert desk.sample("chats_misread_total") == 9
        assert len(proxy.router.decisions) == 9
        proxy.telemetry.take_sample()
        assert proxy.telemetry.samples[-1].ttft_p50_ms is not None
        assert desk.sample("client_connections") == 2 + 4, "what each said last"
        assert desk.sample("worker_client_connections", worker="1") == 4
        assert desk.sample("worker_cpu_seconds_total", worker="1") == 1.5
        assert desk.sample("queued_requests", **{"class": "offline"}) == 2 + 4
        assert desk.sample("queued_bytes") == 30
        assert [one["num_requests"] for one in describe_queue(proxy.flow)] == [2, 6]
        assert desk.instance.num_idle_connections == 6
        proxy.lose(1)
        assert desk.sample("client_connections") == 2
        assert desk.sample("worker_up", worker="1") == 0
        assert desk.sample("requests_total", server="a:1", status="200") == 9
        assert overview(proxy, 0)["clients"] == 2
        desk.memory.close()

    run(check())


def test_causes_of_workers_are_a_bounded_number_too(run: Any, keys: Path) -> None:
    async def check() -> None:
        desk = Desk(keys)
        for number in range(1000):
            desk.proxy.take(number % 2, Report(causes=[("mine", f"cause {number}", 2)]))
        causes = desk.proxy.router.causes
        assert len(causes) < 300
        assert sum(causes.values()) == 2000
        assert causes["mine", ""] > 1000
        desk.memory.close()

    run(check())


def test_what_runs_is_read_from_shared_memory(run: Any, keys: Path) -> None:
    async def check() -> None:
        desk = Desk(keys)
        for writer in (0, 1):
            memory = SharedMemory(2, descriptor=desk.memory.descriptor, writer=writer)
            memory.instances.add(desk.instance.slot, IN_FLIGHT, writer + 1)
            memory.keys.add(0, KEY_IN_FLIGHT, writer + 1)
        assert desk.sample("in_flight", server="a:1") == 3
        assert desk.sample("key_in_flight", key="ann") == 3
        (key,) = describe_keys(desk.proxy)
        assert key["in_flight"] == 3
        desk.memory.close()

    run(check())


def test_of_ranks_that_workers_know_unequally_the_worst_is_shown(run: Any, keys: Path) -> None:
    def rank(number: int, state: str) -> dict[str, Any]:
        return {"dp_rank": number, "state": state, "reason": "why", "num_blocks": 7}

    async def check() -> None:
        desk = Desk(keys)
        directory = desk.proxy.directory
        assert directory is not None
        desk.proxy.take(0, Report(kv_index={"a:1": [rank(0, "live"), rank(1, "live")]}))
        assert directory.is_exact(desk.instance)
        desk.proxy.take(1, Report(kv_index={"a:1": [rank(1, "degraded"), rank(0, "live")]}))
        assert not directory.is_exact(desk.instance)
        shown = directory.describe(desk.instance)
        assert [(one["dp_rank"], one["state"]) for one in shown] == [(0, "live"), (1, "degraded")]
        assert [one["part"] for one in degradations(desk.proxy)] == ["kv_index"]
        desk.memory.close()

    run(check())


def test_a_reporter_gives_everything_once(run: Any) -> None:
    async def check() -> None:
        memory = SharedMemory(1, writer=0)

        def make_fleet(timings: lifecycle.Timings, make_pool: Any) -> Fleet:
            return MirrorFleet(
                timings, make_pool, loads=memory.instances, tell=nothing, clock=lambda: 0.0
            )

        carrier = Carrier(ServiceConfig(), make_fleet=make_fleet)
        fleet, proxy = carrier.fleet, carrier.proxy
        assert isinstance(fleet, MirrorFleet)
        one = fleet._instances["a"] = Instance(
            InstanceEntry(url="http://a:1", name="a"),
            "t",
            lifecycle.begin(lifecycle.Registered(""), 0.0),
            carrier._make_pool(InstanceEntry(url="http://a:1")),
        )
        one.stats.count_error("broken")
        proxy.count_refusal(503)
        proxy.telemetry.first_token(one, 0.5)
        fleet.observe_ttft(one, 10.0, 0.5)
        reporter = Reporter(proxy, fleet)
        first, second = reporter.report(), reporter.report()
        assert first.instances["a"].errors == {"broken": 1}
        assert sum(first.instances["a"].ttft.counts) == sum(first.measured.ttft.counts) == 1
        assert (first.refusals, first.ttfts) == ({503: 1}, [("a", 10.0, 0.5)])
        assert (second.instances, second.refusals, second.ttfts) == ({}, {}, [])
        assert not any(second.measured.ttft.counts)
        assert second.cpu_s > 0
        assert second.resident_bytes > 2**20
        # An instance that this one has replaced shares its counters, for streams that it still has.
        shared = one.stats
        shared.count_error("broken")
        assert reporter.report().instances["a"].errors == {"broken": 1}
        shared.count_error("late")
        assert reporter.report().instances["a"].errors == {"late": 1}
        assert one.stats is shared
        assert reporter.report().instances == {}
        memory.close()

    run(check())


def test_parts_of_the_queue_are_no_more_than_the_whole() -> None:
    whole = FlowConfig(
        enabled=True, max_queued_requests=10, max_queued_bytes=10_000, num_replicas=2
    )
    part = part_of(whole, 3)
    assert (part.max_queued_requests, part.max_queued_bytes, part.num_replicas) == (3, 3333, 6)
    assert part.max_wait_s == whole.max_wait_s


def test_a_workers_room_is_its_part_of_an_instances(run: Any) -> None:
    async def check() -> None:
        memory = SharedMemory(2)
        ours, others = (
            SharedMemory(2, descriptor=memory.descriptor, writer=writer).instances
            for writer in (0, 1)
        )
        carrier = Carrier(ServiceConfig())
        instance = carrier.fleet.register(InstanceEntry(url="http://a:1"), source="t")
        instance.slot = 0
        config = part_of(FlowConfig(enabled=True, max_in_flight=5), 2)
        flow = WorkerFlow(config, carrier.fleet, nothing, 1.0, loads=ours)
        others.add(0, IN_FLIGHT, 2)
        found = []
        for _ in range(3):
            found.append(flow.has_room(instance))
            ours.add(0, IN_FLIGHT, 1)
        assert found == [True, True, False]
        memory.close()

    run(check())
