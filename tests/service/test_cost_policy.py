"""The cost policy on what breaks others: hot spots, flapping, one cache against many queues.

A small discrete-event simulation: instances compute prompts one after the other, decode together,
and keep prefixes in an LRU cache; the policy is the one in production, and learns as it does there.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.service.cost import (
    LATE_WEIGHT,
    OFFLINE_WEIGHT,
    Cost,
    cost_from,
    crowding_of,
    due_of,
    parts_of,
)
from xllm_plugin.service.cost_choice import cost_in_seconds
from xllm_plugin.service.cost_reason import CostReason
from xllm_plugin.service.decision import Asked
from xllm_plugin.service.policies import least_loaded, round_robin
from xllm_plugin.service.policy import Choice, Slo
from xllm_plugin.service.speed import Speed, SpeedMeter
from xllm_plugin.testing.fake_view import FAST, FakeView

PREFILL_S = FAST.prefill_s_per_token
TPOT_S = FAST.tpot_base_s
TPOT_MORE_S = FAST.tpot_s_per_request


def asked(
    prompt: int = 1000,
    output: int = 100,
    sequence: int = 0,
    slo: Slo | None = None,
    **cached: float,
) -> Asked:
    return Asked(sequence, 0, "", prompt + output, prompt, output, cached, slo)


def costs_of(request: Asked, views: Sequence[FakeView]) -> list[Cost]:
    own = [parts_of(request, view) for view in views]
    num_others = sum(view.in_flight + view.foreign_requests for view in views)
    crowding = crowding_of(num_others, sum(sum(parts[:3]) for parts in own))
    return [cost_from(parts, crowding, due_of(request)) for parts in own]


def test_the_cost_is_seconds_of_each_part() -> None:
    one = FakeView("a", in_flight=4, prefill_tokens=500)
    own = Cost(0.1, 0.01 + 400 * PREFILL_S, 100 * (TPOT_S + 5 * TPOT_MORE_S))
    assert Cost(*parts_of(asked(a=600), one)[:3]) == pytest.approx(own)
    # Four streams stand still, at 0.3; four arrivals in its stay wait, five times over.
    delay_s = 0.3 * 4 * 0.09 + 5 * 4 / own.total_s * (0.1 * 0.09 + 0.09**2 / 2)
    (cost,) = costs_of(asked(a=600), [one])
    assert cost == pytest.approx(own._replace(delay_s=delay_s))
    assert cost.total_s == pytest.approx(own.total_s + delay_s)
    choice = cost_in_seconds(asked(a=600), [one])
    assert "queue 0.100 + prefill 0.090 (600 of 1000 tokens cached)" in str(choice.reason)
    assert f"delay of others {delay_s:.3f}" in str(choice.reason)


def test_a_cache_is_worth_its_prefill_and_no_more() -> None:
    """At the point where its queue costs what the cache saves, the choice turns: no threshold."""
    for queue, expected in ((0, 0), (799, 0), (801, 1), (5000, 1)):
        views = [FakeView("a", prefill_tokens=queue), FakeView("b")]
        assert cost_in_seconds(asked(a=800), views).index == expected


def test_a_cache_is_worth_more_where_computing_delays_others() -> None:
    """The same queue that an idle fleet would leave is worth waiting for in a crowded one."""
    views = [FakeView("a", prefill_tokens=2000), FakeView("b")]
    assert cost_in_seconds(asked(a=800), views).index == 1
    for view in views:
        view.in_flight = 20
    assert cost_in_seconds(asked(a=800), views).index == 0
    views[0].prefill_tokens = 100_000
    assert cost_in_seconds(asked(a=800), views).index == 1


@given(
    st.integers(0, 500),
    st.floats(0, 1e6),
    st.integers(1, 100_000),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_more_to_compute_never_costs_less(
    in_flight: int, queue: float, prompt: int, held: float, less: float
) -> None:
    """Whatever the queues: of two equal instances, the one that holds more of the prompt."""
    views = [FakeView(name, in_flight=in_flight, prefill_tokens=queue) for name in "ab"]
    request = asked(prompt, a=less * held * prompt, b=held * prompt)
    little, much = costs_of(request, views)
    assert little.total_s >= much.total_s - 1e-9 * (1 + much.total_s)
    assert min(*little, *much) >= 0


def test_equals_take_turns_and_the_faster_wins() -> None:
    views = [FakeView("a"), FakeView("b"), FakeView("c")]
    assert [cost_in_seconds(asked(sequence=n), views).index for n in range(4)] == [0, 1, 2, 0]
    views[1].speed = Speed(0.01, PREFILL_S / 2, TPOT_S, TPOT_MORE_S)
    assert {cost_in_seconds(asked(sequence=n), views).index for n in range(4)} == {1}


def test_foreign_requests_count_as_ours_do() -> None:
    views = [FakeView("a", foreign_requests=5), FakeView("b", in_flight=4)]
    assert cost_in_seconds(asked(), views).index == 1


# -- promises -----------------------------------------------------------------------------------


def test_what_would_be_late_is_counted_on_top() -> None:
    """Of the first token, and of all later ones together."""
    one = FakeView("a", in_flight=4, prefill_tokens=500)
    (plain,) = costs_of(asked(a=600), [one])
    assert plain.queue_s + plain.prefill_s == pytest.approx(0.19)
    assert plain.decode_s == pytest.approx(2.2)
    slo = Slo(ttft_s=0.15, tpot_s=0.021)
    (cost,) = costs_of(asked(a=600, slo=slo), [one])
    assert cost == pytest.approx(plain._replace(late_s=0.04 + 0.1))
    assert cost.total_s == pytest.approx(plain.total_s + LATE_WEIGHT * 0.14)
    text = str(cost_in_seconds(asked(a=600, slo=slo), [one]).reason)
    assert text.startswith(f"{cost.total_s:.3f} s = queue 0.100 + prefill 0.090 (600 of 1000")
    assert f"{LATE_WEIGHT:g} x late 0.140;" in text


def test_without_a_promise_nothing_is_said_of_it() -> None:
    text = str(cost_in_seconds(asked(), [FakeView("a")]).reason)
    assert "late" not in text
    assert " x " not in text


def test_a_request_that_would_be_late_goes_where_it_is_in_time() -> None:
    """Others would lose less by it at the instance that holds its prompt."""
    views = [FakeView("a", in_flight=1, prefill_tokens=1280), FakeView("b", in_flight=1)]
    chosen = {
        slo: cost_in_seconds(asked(a=900, slo=slo), views).index
        for slo in (None, Slo(ttft_s=2.0), Slo(ttft_s=0.22))
    }
    assert list(chosen.values()) == [0, 0, 1]


def test_a_tight_pace_goes_where_few_run() -> None:
    views = [FakeView("a", in_flight=24), FakeView("b", in_flight=5)]
    chosen = [
        cost_in_seconds(asked(a=900, slo=slo), views).index
        for slo in (Slo(tpot_s=0.1), Slo(tpot_s=0.0225))
    ]
    assert chosen == [0, 1]


def test_an_offline_request_waits_where_others_lose_least() -> None:
    """Its own seconds count little, those of others in full."""
    views = [FakeView("a", in_flight=2, prefill_tokens=2000), FakeView("b", in_flight=2)]
    assert cost_in_seconds(asked(a=800), views).index == 1
    choice = cost_in_seconds(asked(a=800, slo=Slo(is_offline=True)), views)
    assert choice.index == 0
    assert f"= {OFFLINE_WEIGHT:g} x (queue 0.400 + prefill 0.050 (800 of" in str(choice.reason)
    assert isinstance(choice.reason, CostReason)
    cost = choice.reason.cost
    own_s = OFFLINE_WEIGHT * (cost.queue_s + cost.prefill_s + cost.decode_s)
    assert cost.total_s == pytest.approx(own_s + cost.delay_s)
    assert cost.delay_s > 100 * TPOT_MORE_S * 2, "its decoding slows them too"


def test_offline_requests_gather_and_others_keep_away_from_none() -> None:
    """What those lose who are offline themselves counts little, for who has a promise."""
    views = [FakeView("a", in_flight=20, offline_requests=20), FakeView("b", in_flight=18)]
    chosen = [
        cost_in_seconds(asked(slo=slo), views).index
        for slo in (None, Slo(ttft_s=9.0), Slo(is_offline=True))
    ]
    assert chosen == [1, 0, 0]
    views[0].in_flight = views[0].offline_requests = 200
    assert cost_in_seconds(asked(slo=Slo(ttft_s=9.0)), views).index == 1
    assert cost_in_seconds(asked(slo=Slo(is_offline=True)), views).index == 1


def test_who_has_no_promise_does_not_look_at_who_is_offline() -> None:
    views = [FakeView("a", in_flight=20, prefill_tokens=70), FakeView("b", in_flight=18)]
    before = cost_in_seconds(asked(a=500), views)
    views[0].offline_requests = 20
    assert str(cost_in_seconds(asked(a=500), views).reason) == str(before.reason)


SLOS = (None, Slo(0.1, 0.02), Slo(ttft_s=-1.0), Slo(is_offline=True))


@pytest.mark.parametrize("slo", SLOS)
def test_the_cost_that_is_shown_is_the_one_that_decided(slo: Slo | None) -> None:
    """Of two equals the other's is the next best."""
    views = [
        FakeView(name, in_flight=9, offline_requests=4, foreign_requests=1, prefill_tokens=700)
        for name in "ab"
    ]
    reason = cost_in_seconds(asked(slo=slo), views).reason
    assert isinstance(reason, CostReason)
    assert reason.cost.total_s == pytest.approx(reason.next_s)


TIMES = st.floats(0, 1e4)


@given(st.integers(0, 500), st.floats(0, 1e6), st.integers(1, 100_000), TIMES, TIMES, TIMES, TIMES)
def test_a_little_less_of_a_promise_is_a_little_more_of_a_cost(  # noqa: PLR0917
    in_flight: int, queue: float, prompt: int, ttft: float, tpot: float, less: float, pace: float
) -> None:
    """No threshold: what a cost grows by is bounded by what the promise shrinks by."""
    view = FakeView("a", in_flight=in_flight, prefill_tokens=queue)
    loose, tight = Slo(ttft + less, tpot + pace), Slo(ttft, tpot)
    (before,), (after,) = (costs_of(asked(prompt, slo=slo), [view]) for slo in (loose, tight))
    grown_s = after.total_s - before.total_s
    slack = 1e-9 * (1 + after.total_s)
    assert -slack <= grown_s <= LATE_WEIGHT * (less + 100 * pace) + slack


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1e5)), min_size=1, max_size=8))
def test_a_promise_that_is_kept_anywhere_changes_nothing(loads: list[tuple[int, float]]) -> None:
    """To the last bit."""
    views = [
        FakeView(str(number), in_flight=num, prefill_tokens=tokens)
        for number, (num, tokens) in enumerate(loads)
    ]
    with_one = cost_in_seconds(asked(slo=Slo(1e6, 1e6)), views)
    without = cost_in_seconds(asked(), views)
    assert with_one.index == without.index
    assert isinstance(with_one.reason, CostReason)
    assert isinstance(without.reason, CostReason)
    assert with_one.reason.cost.total_s == without.reason.cost.total_s
    assert with_one.reason.next_s == without.reason.next_s


# -- simulation ---------------------------------------------------------------------------------


@dataclass
class Request:
    at_s: float
    prefix: int
    prefix_tokens: int
    own_tokens: int
    output: int = 60


@dataclass
class Sim(FakeView):
    """A simulated instance; what a policy sees are its `FakeView` fields."""

    cache_tokens: int = 20_000
    slowness: float = 1.0
    busy_until_s: float = 0.0
    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)
    meter: SpeedMeter = field(default_factory=SpeedMeter)

    def hit(self, request: Request) -> int:
        return min(self.cache.get(request.prefix, 0), request.prefix_tokens)

    def run(self, request: Request, now_s: float) -> tuple[float, float]:
        """Take a request; when its first token comes, and when it is done."""
        uncached = request.prefix_tokens + request.own_tokens - self.hit(request)
        start_s = max(now_s, self.busy_until_s)
        self.busy_until_s = start_s + (0.01 + PREFILL_S * uncached) * self.slowness
        self.cache[request.prefix] = request.prefix_tokens
        self.cache.move_to_end(request.prefix)
        while sum(self.cache.values()) > self.cache_tokens:
            self.cache.popitem(last=False)
        tpot_s = (TPOT_S + TPOT_MORE_S * (self.in_flight + 1)) * self.slowness
        return self.busy_until_s, self.busy_until_s + request.output * tpot_s


Policy = Callable[[Any, Sequence[Any]], Choice]


def simulate(policy: Policy, requests: Sequence[Request], sims: Sequence[Sim]) -> list[float]:
    """Times to first token, in the order of arrival."""
    events: list[tuple[float, int, Callable[[], None]]] = []
    ttfts: list[float] = []
    number = 0

    def at(time_s: float, action: Callable[[], None]) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (time_s, number, action))

    def arrive(sequence: int, request: Request) -> None:
        prompt = request.prefix_tokens + request.own_tokens
        cached = {sim.name: float(hit) for sim in sims if (hit := sim.hit(request))}
        view = Asked(
            sequence,
            random.Random(sequence).getrandbits(64),
            "",
            prompt + request.output,
            prompt,
            request.output,
            cached,
        )
        sim = sims[policy(view, sims).index]
        uncached, ahead = prompt - cached.get(sim.name, 0.0), sim.prefill_tokens
        first_s, done_s = sim.run(request, request.at_s)
        ttfts.append(first_s - request.at_s)
        sim.prefill_tokens += uncached
        sim.in_flight += 1
        sim.outstanding_tokens += view.cost_tokens

        def computed() -> None:
            sim.prefill_tokens -= uncached
            sim.meter.observe_ttft(ahead + uncached, first_s - request.at_s)
            sim.speed = sim.meter.speed(Speed())

        def done() -> None:
            tpot_s = (done_s - first_s) / request.output
            sim.meter.observe_tpot(sim.in_flight, tpot_s)
            sim.in_flight -= 1
            sim.outstanding_tokens -= view.cost_tokens

        at(first_s, computed)
        at(done_s, done)

    for sequence, request in enumerate(requests):
        at(request.at_s, lambda sequence=sequence, request=request: arrive(sequence, request))
    while events:
        heapq.heappop(events)[2]()
    return ttfts


def sims(count: int = 4, **fields: Any) -> list[Sim]:
    return [Sim(str(number), speed=Speed(), **fields) for number in range(count)]


def arrivals(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    draw, now_s = random.Random(seed), 0.0
    while (now_s := now_s + draw.expovariate(rate)) < seconds:
        yield now_s


def p90(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


def counted(policy: Policy, into: Counter[int]) -> Policy:
    def choose(request: Any, candidates: Sequence[Any]) -> Choice:
        choice = policy(request, candidates)
        into[choice.index] += 1
        return choice

    return choose


def test_one_hot_prefix_makes_no_hot_instance() -> None:
    """Everybody's system prompt: pure affinity sends all to one (the death spiral of sglang)."""
    requests = [Request(at_s, 0, 2000, 300) for at_s in arrivals(30, 60)]
    where: Counter[int] = Counter()
    ttfts = simulate(counted(cost_in_seconds, where), requests, sims())
    assert max(where.values()) < 0.4 * len(requests)
    assert p90(ttfts) < 0.5


def test_many_prefixes_stay_where_they_are_cached() -> None:
    """40 prefixes of 2000 tokens, caches for 10 of them each: together they hold them all."""
    draw = random.Random(2)
    requests = [Request(at_s, draw.randrange(40), 2000, 100) for at_s in arrivals(16, 120)]
    found = {
        policy.__name__: p90(simulate(policy, requests, sims())[200:])
        for policy in (cost_in_seconds, least_loaded, round_robin)
    }
    assert found["cost_in_seconds"] < 0.5 * min(found["least_loaded"], found["round_robin"]), found


def test_sessions_do_not_flap() -> None:
    """At moderate load a conversation stays: it changes place for a queue, not for noise."""
    draw = random.Random(3)
    requests = [Request(at_s, draw.randrange(16), 1500, 100) for at_s in arrivals(8, 120)]
    homes: dict[int, list[int]] = {}

    def policy(request: Any, candidates: Sequence[Any]) -> Choice:
        choice = cost_in_seconds(request, candidates)
        homes.setdefault(requests[request.sequence].prefix, []).append(choice.index)
        return choice

    simulate(policy, requests, sims())
    moves = sum(a != b for home in homes.values() for a, b in pairwise(home))
    assert moves < 0.15 * len(requests)


def test_a_slow_instance_gets_less_and_is_found_out_by_measuring() -> None:
    fleet = sims()
    fleet[0].slowness = 4.0
    requests = [Request(at_s, number, 500, 500) for number, at_s in enumerate(arrivals(10, 120))]
    where: Counter[int] = Counter()
    ttfts = simulate(counted(cost_in_seconds, where), requests, fleet)
    assert where[0] < 0.5 * statistics.mean(where[index] for index in (1, 2, 3))
    others = sims()
    others[0].slowness = 4.0
    assert p90(ttfts) < 0.7 * p90(simulate(round_robin, requests, others))


def test_a_burst_on_an_idle_fleet_is_spread_at_once() -> None:
    """Load is booked at dispatch: 64 equal requests in one instant do not meet in one place."""
    requests = [Request(0.0, 0, 1000, 10) for _ in range(64)]
    where: Counter[int] = Counter()
    simulate(counted(cost_in_seconds, where), requests, sims())
    assert max(where.values()) - min(where.values()) <= 8
