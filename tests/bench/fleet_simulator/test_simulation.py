"""The whole simulator: known answers, nothing lost, late news, and what breaks policies."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.bench.fleet_simulator.cache_aware import CacheAware
from xllm_plugin.bench.fleet_simulator.engine import Engine
from xllm_plugin.bench.fleet_simulator.profile import StepProfile
from xllm_plugin.bench.fleet_simulator.simulation import Delays, InstanceSpec, Run, simulate
from xllm_plugin.bench.fleet_simulator.summary import quantile
from xllm_plugin.bench.fleet_simulator.workload import Arrival
from xllm_plugin.errors import ConfigError
from xllm_plugin.plugins import build_manager, routing_policies
from xllm_plugin.registration import Load
from xllm_plugin.service.policy import Choice, InstanceView, RequestView, RoutingPolicy

MakeProfile = Callable[..., StepProfile]
BLOCK = 10
USUAL = Delays()
AT_ONCE = Delays(network_s=0.0, kv_event_s=0.0)
POLICIES = routing_policies(build_manager(""))
COST = POLICIES["cost"]


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    draw, now_s, found = random.Random(seed), 0.0, []
    while (now_s := now_s + draw.expovariate(rate)) < seconds:
        found.append(now_s)
    return found


def asked(at_s: float, blocks: Sequence[int], output: int = 1) -> Arrival:
    return Arrival(at_s, len(blocks) * BLOCK, output, tuple(blocks))


def alone(times: Sequence[float], num_blocks: int, output: int = 1) -> list[Arrival]:
    """Prompts that share nothing."""
    return [
        asked(at_s, range(n * num_blocks, (n + 1) * num_blocks), output)
        for n, at_s in enumerate(times)
    ]


def where(run: Run) -> Counter[int]:
    return Counter(one.instance for one in run.served)


def p90(run: Run) -> float:
    return quantile([one.ttft_s for one in run.served], 0.9)


def go(
    policy: RoutingPolicy,
    traffic: Sequence[Arrival],
    profile: StepProfile,
    instances: Sequence[InstanceSpec] = (InstanceSpec(),) * 4,
    delays: Delays = USUAL,
) -> Run:
    return simulate(policy, traffic, profile, instances, block_tokens=BLOCK, delays=delays)


# -- known answers ------------------------------------------------------------------------------


def test_one_request_on_one_instance(make_profile: MakeProfile) -> None:
    delays = Delays(network_s=0.002)
    run = go(COST, [asked(1.0, range(5), 3)], make_profile(), [InstanceSpec()], delays)
    (one,) = run.served
    assert one.ttft_s == pytest.approx(0.010 + 0.050 + 2 * 0.002)
    assert one.done_s == pytest.approx(1.0 + 0.060 + 2 * 0.010 + 2 * 0.002)
    assert one.tpot_s == pytest.approx(0.010)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_one_instance_is_the_queue_of_the_textbook(make_profile: MakeProfile, share: float) -> None:
    """M/D/1: the mean wait is share / (2 (1 - share)) services (Pollaczek and Khinchine)."""
    service_s = 0.1
    profile = make_profile(base_ms=0.0, max_requests=1)
    traffic = alone(poisson(share / service_s, 1500, seed=1), 10)
    run = go(POLICIES["round-robin"], traffic, profile, [InstanceSpec()], AT_ONCE)
    wait_s = statistics.mean(one.ttft_s for one in run.served) - service_s
    assert wait_s == pytest.approx(service_s * share / (2 * (1 - share)), rel=0.1)
    assert run.busy_s[0] / run.end_s == pytest.approx(share, rel=0.03)


def test_a_slow_instance_takes_as_many_times_as_long(make_profile: MakeProfile) -> None:
    run = go(COST, [asked(0, [1])], make_profile(), [InstanceSpec(slowness=3.0)], AT_ONCE)
    assert run.served[0].ttft_s == pytest.approx(0.060)


def test_a_run_can_be_repeated(make_profile: MakeProfile) -> None:
    traffic = alone(poisson(40, 20), 8, output=5)
    runs = [go(POLICIES["power-of-two"], traffic, make_profile()) for _ in range(2)]
    assert runs[0].served == runs[1].served


# -- what the policy knows ----------------------------------------------------------------------


class Watcher:
    """A policy that writes down what it is shown, and sends everything to the first."""

    def __init__(self) -> None:
        self.cached: list[dict[str, float]] = []
        self.foreign: list[int] = []
        self.policy = RoutingPolicy("watcher", "", self.choose, uses_prefixes=True)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
        self.cached.append(dict(request.cached_tokens))
        self.foreign.append(candidates[0].foreign_requests)
        return Choice(0, "")


def test_a_cached_block_is_known_when_its_event_has_come(make_profile: MakeProfile) -> None:
    watcher = Watcher()
    times = (0.0, 0.05, 0.10, 0.20)  # the first prompt is computed at 0.06
    traffic = [asked(at_s, range(5)) for at_s in times]
    go(watcher.policy, traffic, make_profile(), delays=Delays(kv_event_s=0.08))
    assert watcher.cached == [{}, {}, {}, {"i0": 40.0}]


def test_what_was_evicted_is_unknown_when_its_event_has_come(make_profile: MakeProfile) -> None:
    watcher = Watcher()
    traffic = [asked(0, range(5)), asked(1, range(10, 18)), asked(2, range(5))]
    go(watcher.policy, traffic, make_profile(kv_tokens=100))
    assert watcher.cached[2] == {"i0": 20.0}


def test_policies_without_prefixes_cost_no_lookup(make_profile: MakeProfile) -> None:
    watcher = Watcher()
    policy = replace(watcher.policy, uses_prefixes=False)
    go(policy, [asked(at_s, range(5)) for at_s in (0.0, 1.0)], make_profile())
    assert watcher.cached == [{}, {}]


def test_load_is_known_from_heartbeats(make_profile: MakeProfile) -> None:
    """An instance that claims seven more than it has shows seven of somebody else."""
    watcher = Watcher()

    def lie(load: Load) -> Load:
        return load.model_copy(update={"num_waiting": load.num_waiting + 7})

    go(
        watcher.policy,
        [asked(0.0, [1]), asked(9.0, [2])],
        make_profile(),
        [InstanceSpec(reports=lie)] * 2,
    )
    assert watcher.foreign == [0, 7]


# -- nothing is lost ----------------------------------------------------------------------------


@st.composite
def _traffic(draw: st.DrawFn) -> list[Arrival]:
    found = []
    at_s = 0.0
    for number in range(draw(st.integers(1, 40))):
        at_s += draw(st.floats(0, 0.2))
        root = draw(st.integers(0, 2)) * 1000
        blocks = [root + depth for depth in range(draw(st.integers(0, 5)))]
        blocks.append(100_000 + number)
        found.append(asked(at_s, blocks, draw(st.integers(1, 20))))
    return found


@settings(deadline=None, max_examples=30)
@given(
    traffic=_traffic(),
    name=st.sampled_from([*POLICIES, "cache-aware"]),
    count=st.integers(1, 5),
    kv_tokens=st.integers(100, 500),
    late_s=st.floats(0, 3),
)
def test_every_request_ends_once(  # noqa: PLR0917 - hypothesis names them
    make_profile: MakeProfile,
    traffic: list[Arrival],
    name: str,
    count: int,
    kv_tokens: int,
    late_s: float,
) -> None:
    policy = POLICIES.get(name)
    if policy is None:
        policy = CacheAware(lambda number: traffic[number].blocks, BLOCK).policy(name)
    run = simulate(
        policy,
        traffic,
        make_profile(kv_tokens=kv_tokens, max_step_tokens=60),
        [InstanceSpec(slowness=1 + n) for n in range(count)],
        block_tokens=BLOCK,
        delays=Delays(network_s=late_s / 10, kv_event_s=late_s),
        watch=Engine.check_integrity,
    )
    assert [one.number for one in run.served] == list(range(len(traffic)))
    for one, arrival in zip(run.served, traffic, strict=True):
        assert one.at_s == arrival.at_s
        assert one.ttft_s >= 0.010
        assert one.done_s >= one.at_s + one.ttft_s - 1e-9
        assert 0 <= one.cached_tokens < one.prompt_tokens
        assert 0 <= one.instance < count


def test_no_instance_and_too_long_a_request_are_refused(make_profile: MakeProfile) -> None:
    with pytest.raises(ConfigError, match="0 instances"):
        go(COST, [asked(0, [1])], make_profile(), [])
    with pytest.raises(ConfigError, match="does not fit"):
        go(COST, [asked(0, range(9), 20)], make_profile(kv_tokens=100))


# -- what breaks policies -----------------------------------------------------------------------


def test_a_hot_prefix_makes_no_hot_instance(make_profile: MakeProfile) -> None:
    """Everybody's system prompt, at a rate that one instance cannot serve even from its cache."""
    traffic = [
        asked(at_s, (*range(40), 1000 + n), 5) for n, at_s in enumerate(poisson(60, 30, seed=2))
    ]
    run = go(COST, traffic, make_profile())
    counts = where(run)
    assert max(counts.values()) < 0.4 * len(traffic)
    assert sum(one.cached_tokens for one in run.served) > 0.9 * 400 * len(traffic)
    assert p90(run) < 0.2


def test_conversations_stay_where_they_are_cached(make_profile: MakeProfile) -> None:
    """At half load turns return to their instance: no flapping between equals."""
    draw = random.Random(3)
    turns = dict.fromkeys(range(24), 10)
    traffic = []
    for at_s in poisson(8, 60, seed=3):
        session = draw.randrange(24)
        turns[session] = min(60, turns[session] + 2)
        first = session * 100
        traffic.append(asked(at_s, range(first, first + turns[session]), 10))
    run = go(COST, traffic, make_profile())
    homes: dict[int, list[int]] = {}
    for one, arrival in zip(run.served, traffic, strict=True):
        homes.setdefault(arrival.blocks[0], []).append(one.instance)
    moves = sum(a != b for home in homes.values() for a, b in pairwise(home))
    assert moves < 0.1 * len(traffic)


def test_a_slow_instance_is_found_out(make_profile: MakeProfile) -> None:
    traffic = alone(poisson(12, 90, seed=4), 20, output=10)
    fleet = [InstanceSpec(slowness=4.0), *[InstanceSpec()] * 3]
    run = go(COST, traffic, make_profile(), fleet)
    counts = where(run)
    assert counts[0] < 0.5 * statistics.mean(counts[n] for n in (1, 2, 3))
    assert p90(run) < 0.5 * p90(go(POLICIES["round-robin"], traffic, make_profile(), fleet))


@pytest.mark.parametrize("claimed", [0, 50])
def test_a_lie_about_load_costs_no_queue(make_profile: MakeProfile, claimed: int) -> None:
    """One claims to be idle, or to be busy with others' requests; ours are counted by us."""

    def lie(load: Load) -> Load:
        return load.model_copy(update={"num_running": claimed, "num_waiting": 0})

    traffic = alone(poisson(10, 60, seed=5), 20, output=10)
    honest = go(COST, traffic, make_profile())
    lied = go(COST, traffic, make_profile(), [InstanceSpec(reports=lie), *[InstanceSpec()] * 3])
    assert p90(lied) < 2 * p90(honest)
    if not claimed:
        assert where(lied)[0] < 0.4 * len(traffic)


def test_late_news_of_caches_cost_hits_and_nothing_else(make_profile: MakeProfile) -> None:
    draw = random.Random(6)
    traffic = [
        asked(at_s, (*(range(p := draw.randrange(12) * 100, p + 20)), 5000 + n), 5)
        for n, at_s in enumerate(poisson(10, 40, seed=6))
    ]
    soon, late = (go(COST, traffic, make_profile(), delays=Delays(kv_event_s=s)) for s in (0, 2))
    hits = [sum(one.cached_tokens for one in run.served) for run in (soon, late)]
    assert hits[1] <= hits[0]
    assert p90(late) < 2 * p90(soon)
