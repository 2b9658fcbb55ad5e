"""What a probe makes of its answers."""

from __future__ import annotations

from typing import Any

from xllm_plugin.registration import Load
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
