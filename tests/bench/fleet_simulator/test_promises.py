"""Promises are drawn, told to the service, and judged by what each request was promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from xllm_plugin.bench.fleet_simulator.profile import StepProfile
from xllm_plugin.bench.fleet_simulator.promises import Share, by_share, with_promises
from xllm_plugin.bench.fleet_simulator.simulation import InstanceSpec, simulate
from xllm_plugin.bench.fleet_simulator.summary import Served
from xllm_plugin.bench.fleet_simulator.workload import Arrival
from xllm_plugin.service.policy import Choice, InstanceView, RequestView, RoutingPolicy, Slo

SHARES = (
    Share("tight", Slo(1.0, 0.1)),
    Share("loose", Slo(5.0, 0.5)),
    Share("offline", Slo(is_offline=True)),
)


def traffic(count: int) -> list[Arrival]:
    return [Arrival(n / 10, 10, 2, (n,)) for n in range(count)]


def test_every_share_is_as_likely_and_nothing_else_changes() -> None:
    plain = traffic(3000)
    told = with_promises(plain, SHARES, seed=1)
    assert told == with_promises(plain, SHARES, seed=1) != with_promises(plain, SHARES, seed=2)
    assert [(one.at_s, one.blocks) for one in told] == [(one.at_s, one.blocks) for one in plain]
    counts = Counter(one.slo for one in told)
    assert counts.keys() == {share.slo for share in SHARES}
    assert min(counts.values()) > 900


def test_each_share_is_judged_by_its_own_promise() -> None:
    slos = (SHARES[0].slo, SHARES[0].slo, SHARES[1].slo, SHARES[2].slo)
    told = [Arrival(0.0, 1, 11, (), slo) for slo in slos]
    served = [
        Served(0, 0.0, 1, 11, ttft_s=0.5, done_s=1.0),
        Served(1, 0.0, 1, 11, ttft_s=2.0, done_s=2.5),
        Served(2, 0.0, 1, 11, ttft_s=2.0, done_s=2.5),
        Served(3, 1.0, 1, 11, ttft_s=90.0, done_s=101.0),
    ]
    found = by_share(served, told, SHARES)
    assert {name: (one.num_kept, one.num_requests) for name, one in found.items()} == {
        "tight": (1, 2),
        "loose": (1, 1),
        "offline": (1, 1),
    }
    assert found["tight"].ttft_p90_s == 2.0
    assert found["loose"].tpot_p90_s == pytest.approx(0.05)
    assert found["offline"].mean_s == 100.0


def test_the_policy_is_told_of_them(make_profile: Callable[..., StepProfile]) -> None:
    seen: list[Slo | None] = []

    def choose(request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
        del candidates
        seen.append(request.slo)
        return Choice(0, "")

    told = [*with_promises(traffic(5), SHARES, seed=0), Arrival(1.0, 10, 2, (9,))]
    policy = RoutingPolicy("watcher", "", choose)
    simulate(policy, told, make_profile(), [InstanceSpec()], block_tokens=10)
    assert seen == [one.slo for one in told]
    assert seen[-1] is None
