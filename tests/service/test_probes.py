"""What a probe makes of its answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from xllm_plugin.registration import Load
from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import InstanceEntry, InstancesConfig
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.lifecycle import Timings
from xllm_plugin.service.probes import Prober
from xllm_plugin.testing.service_harness import make_pool


class ScriptedProber(Prober):
    """Answers are at hand; a heartbeat comes while /metrics is asked."""

    def __init__(self, fleet: Fleet, beat: Load | None) -> None:
        super().__init__(fleet, None, InstancesConfig())  # type: ignore[arg-type]
        self.beat = beat
        self.statuses: dict[str, int] = {}

    async def _status(self, instance: Instance, path: str) -> int:
        return self.statuses.get(path, 404)

    async def _get(self, instance: Instance, path: str) -> bytes:
        if path == "/metrics" and self.beat is not None:
            instance.load = self.beat
            self._fleet.set_load(instance, self.beat)
        return {
            "/metrics": b"vllm:num_requests_running 1\n",
            "/v1/models": b'{"data": [{"id": "m"}]}',
        }.get(path, b"{}")


def foreign_requests(run: Any, beat: Load | None) -> int:
    fleet = Fleet(Timings(lease_s=1e9), make_pool, clock=lambda: 0.0)
    instance = fleet.register(InstanceEntry(url="http://i:80", name="i"), source="registered")
    run(ScriptedProber(fleet, beat).probe(instance, models=True, metrics=True))
    return instance.foreign_requests


def test_metrics_are_read_where_no_heartbeat_says_more(run: Any) -> None:
    assert foreign_requests(run, None) == 1


def test_a_heartbeat_that_comes_while_metrics_are_asked_is_newer(run: Any) -> None:
    assert foreign_requests(run, Load(num_running=3, num_waiting=2)) == 5


GENERATE, DERENDER = "/inference/v1/generate", "/v1/completions/derender"


@pytest.mark.parametrize(
    ("statuses", "has_plugin", "scales_out"),
    [
        ({GENERATE: 400, DERENDER: 400}, False, True),
        ({GENERATE: 422, DERENDER: 400}, False, True),
        ({GENERATE: 403, DERENDER: 403}, False, False),  # vLLM 0.32 without the flag
        ({GENERATE: 400, DERENDER: 404}, False, False),  # an older one
        ({GENERATE: 200, DERENDER: 200}, False, None),  # some other server, that takes anything
        ({GENERATE: 503, DERENDER: 400}, False, None),  # asked again
        ({GENERATE: 400, DERENDER: 400}, True, None),  # has a better way, and is not asked
    ],
)
def test_a_plain_server_is_asked_for_its_scale_out_routes(
    run: Any, statuses: dict[str, int], has_plugin: bool, scales_out: bool | None
) -> None:
    fleet = Fleet(Timings(lease_s=1e9), make_pool, clock=lambda: 0.0)
    incarnation = "one" if has_plugin else ""
    entry = InstanceEntry(url="http://i:80", name="i")
    instance = fleet.register(entry, source="test", incarnation=incarnation)
    prober = ScriptedProber(fleet, None)
    prober.statuses = statuses
    run(prober.probe(instance, models=True, metrics=False))
    assert instance.scales_out is scales_out
    fleet.report(instance, lifecycle.Registered("another"))
    assert instance.scales_out is None, "what is known of a server that was restarted"


class RestartedProber(ScriptedProber):
    """Its server has this plugin, is away for some probes, and comes back as another."""

    def __init__(self, fleet: Fleet, away: range) -> None:
        super().__init__(fleet, None)
        self.config = InstancesConfig(probe_interval_s=1e-6)
        self.statuses = {GENERATE: 400, DERENDER: 400}
        self.away = away
        self.num_probes = 0

    async def _get(self, instance: Instance, path: str) -> bytes:
        if path == "/health":
            self.num_probes += 1
        if self.num_probes in self.away:
            raise OSError("refused")
        if path != "/metrics":
            return await super()._get(instance, path)
        if self.num_probes < self.away.start:
            return b"process_start_time_seconds 1\nxllm:engine_up 1\n"
        return b"process_start_time_seconds 2\n"


@pytest.mark.parametrize("num_away", [2, 3, 4])
def test_a_server_that_comes_back_is_known_before_it_gets_requests(run: Any, num_away: int) -> None:
    """Whatever was due with its first probe: it may be another, which can do less."""

    async def states() -> list[tuple[str, str]]:
        fleet = Fleet(Timings(lease_s=1e9), make_pool, clock=lambda: 0.0)
        instance = fleet.register(InstanceEntry(url="http://i:80", name="i"), source="test")
        prober = RestartedProber(fleet, range(8, 8 + num_away))
        seen: list[tuple[str, str]] = []
        following = asyncio.create_task(prober._follow(instance))
        while prober.num_probes < 8 + num_away + 4:
            now = (instance.life.state.value, instance.continues)
            if now != (seen or [None])[-1]:
                seen.append(now)
            await asyncio.sleep(0)
        following.cancel()
        return seen

    assert [how for state, how in run(states()) if state == "ready"] == ["plugin", "scale-out"]


class FiguresProber(ScriptedProber):
    """Its server answers /metrics with a body, or with a status that is none of success."""

    def __init__(self, fleet: Fleet, answer: str | int) -> None:
        super().__init__(fleet, None)
        self.answer = answer

    async def _get(self, instance: Instance, path: str) -> bytes:
        if path != "/metrics":
            return await super()._get(instance, path)
        if isinstance(self.answer, int):
            raise ValueError(f"/metrics answers {self.answer}")  # noqa: TRY004 - its status
        return self.answer.encode()


@pytest.mark.parametrize("answer", [404, 500, "", "vllm:num_requests_running 1e999\n"])
def test_a_server_without_figures_is_well(
    run: Any, caplog: pytest.LogCaptureFixture, answer: str | int
) -> None:
    """Always, also with the first probe and after each other one: they are due with these."""
    fleet = Fleet(Timings(lease_s=1e9), make_pool, clock=lambda: 0.0)
    instance = fleet.register(InstanceEntry(url="http://i:80", name="i"), source="test")
    prober = FiguresProber(fleet, answer)
    for _ in range(3):
        assert run(prober.probe(instance, models=True, metrics=True))
        assert instance.life.state is lifecycle.State.READY
    assert instance.foreign_requests == 0
    assert instance.queue is None
    said = [record.getMessage() for record in caplog.records if "alone" in record.getMessage()]
    assert len(said) == (answer != ""), "said once, and that it is so"
    prober.answer = "vllm:num_requests_running 4\n"
    assert run(prober.probe(instance, models=True, metrics=True))
    assert instance.foreign_requests == 4
    assert ("has figures now" in caplog.text) is (answer != "")
