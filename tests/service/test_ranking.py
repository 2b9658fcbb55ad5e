"""Rankings give what the policies' own functions give, whatever has changed in between."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from xllm_plugin.plugins import build_manager, routing_policies
from xllm_plugin.service.cached import CachedTokens, most_cached
from xllm_plugin.service.cost import STALL_WEIGHT
from xllm_plugin.service.cost_choice import cost_in_seconds
from xllm_plugin.service.cost_ranking import CostRanking
from xllm_plugin.service.decision import Asked
from xllm_plugin.service.policy import InstanceView, RequestView, RoutingPolicy, Slo
from xllm_plugin.service.ranking import ListRanking
from xllm_plugin.service.speed import Speed
from xllm_plugin.testing.fake_view import FAST, FakeView

POLICIES = routing_policies(build_manager(""))


class World:
    """Candidates, which are open, and what a request finds; few values, so that some tie."""

    def __init__(self, seed: int, count: int, speeds: str) -> None:
        self.draw = random.Random(seed)
        self.speeds = speeds
        self.views = [FakeView(f"i{n}", self.draw.getrandbits(64)) for n in range(count)]
        for view in self.views:
            view.speed = self.speed()
        self.open: list[int] = []

    def speed(self) -> Speed:
        draw = self.draw
        if self.speeds == "equal":
            return FAST
        if self.speeds == "some":
            return Speed(0.01, draw.choice((1e-4, 2e-4)), 0.02, draw.choice((4e-4, 5e-4)))
        slow, late = draw.uniform(0.7, 1.4), draw.uniform(0.7, 1.4)
        return Speed(0.01 * slow, 2e-4 * slow, 0.02 * late, 4e-4 * late)

    def change(self, view: FakeView) -> None:
        draw = self.draw
        view.in_flight = draw.choice((0, 0, 1, 2, 30))
        view.offline_requests = draw.choice((0, 0, view.in_flight // 2, view.in_flight))
        view.foreign_requests = draw.choice((0, 0, 1))
        view.outstanding_tokens = draw.choice((0, 100, 5000))
        view.prefill_tokens = draw.choice((0, 0, 7, 4000, draw.randrange(100_000)))

    def request(self) -> Asked:
        draw = self.draw
        prompt, output = draw.choice((1, 30, 1000, 60_000)), draw.choice((1, 128))
        names = [view.name for view in self.views]
        few = {
            name: float(draw.choice((0, 16, prompt // 2, prompt)))
            for name in draw.sample(names, draw.randrange(min(6, len(names)) + 1))
        }
        cached: Any = few
        if draw.random() < 0.5:
            cached = CachedTokens(float(prompt // 3 + 1), few, names)
        return Asked(
            draw.randrange(1000),
            draw.getrandbits(64),
            draw.choice(("", "a", "b", "c")),
            prompt + output,
            prompt,
            output,
            cached,
            self.slo(),
        )

    def slo(self) -> Slo | None:
        draw = self.draw
        if draw.random() < 0.4:
            return None
        if draw.random() < 0.3:
            return Slo(is_offline=True)
        never = float("inf")
        return Slo(draw.choice((never, -1.0, 0.02, 0.5, 8.0)), draw.choice((never, 0.021, 0.03)))

    def steps(self, ranking: Any, num_steps: int) -> Iterator[Asked]:
        """Change this and that, tell the ranking, and ask."""
        draw = self.draw
        for index in range(len(self.views)):
            self.put(ranking, index)
        for _ in range(num_steps):
            yield self.request()
            if draw.random() < 0.2:  # a second has passed
                for index, view in enumerate(self.views):
                    view.speed = self.speed()
                    if index in self.open:
                        ranking.put(index)
            for index in draw.sample(range(len(self.views)), min(5, len(self.views))):
                self.change(self.views[index])
                if draw.random() < 0.3 and (len(self.open) > 1 or index not in self.open):
                    ranking.drop(index)
                    self.open = [one for one in self.open if one != index]
                else:
                    self.put(ranking, index)

    def put(self, ranking: Any, index: int) -> None:
        ranking.put(index)
        self.open = sorted({*self.open, index})


def made(policy: RoutingPolicy, views: Sequence[FakeView]) -> Any:
    return (policy.ranking or partial(ListRanking, choose=policy.choose))(views)


@pytest.mark.parametrize("name", POLICIES)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 90),
    speeds=st.sampled_from(["equal", "some", "any"]),
)
@settings(max_examples=40)
def test_a_ranking_chooses_as_its_policy_does(
    name: str, seed: int, count: int, speeds: str
) -> None:
    """The same candidate among equals too, for the same reason, to the last digit shown."""
    policy, world = POLICIES[name], World(seed, count, speeds)
    ranking = made(policy, world.views)
    for asked in world.steps(ranking, 8):
        among = [world.views[index] for index in world.open]
        expected = policy.choose(asked, among)
        found = ranking.choose(asked)
        assert ranking.num_open == len(among)
        assert world.views[found.index] is among[expected.index]
        assert (str(found.reason), found.cause) == (str(expected.reason), expected.cause)


def old_totals(request: RequestView, candidates: Sequence[InstanceView]) -> list[float]:
    """The cost as it was first written down: record by record, `sum` over all of them."""
    own = []
    for one in candidates:
        uncached = max(1.0, request.prompt_tokens - request.cached_tokens.get(one.name, 0.0))
        running = one.in_flight + one.foreign_requests + 1
        tpot_s = one.speed.tpot_base_s + one.speed.tpot_s_per_request * running
        own.append(
            (
                one.speed.prefill_s_per_token * one.prefill_tokens,
                one.speed.ttft_base_s + one.speed.prefill_s_per_token * uncached,
                tpot_s * request.output_tokens,
            )
        )
    others = [one.in_flight + one.foreign_requests for one in candidates]
    stay_s = sum(map(sum, own))
    crowding = 5.0 * sum(others) / stay_s if stay_s > 0 else 0.0
    return [
        queue_s
        + prefill_s
        + decode_s
        + prefill_s * (STALL_WEIGHT * num + crowding * (queue_s + prefill_s / 2))
        for (queue_s, prefill_s, decode_s), num in zip(own, others, strict=True)
    ]


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 60),
    speeds=st.sampled_from(["equal", "some", "any"]),
)
def test_the_choice_is_what_it_was_before_anything_was_made_fast(
    seed: int, count: int, speeds: str
) -> None:
    """But where two costs differ by less than the rounding of the crowding."""
    world = World(seed, count, speeds)
    for view in world.views:
        world.change(view)
    asked = replace(world.request(), slo=None)
    choice, totals = cost_in_seconds(asked, world.views), old_totals(asked, world.views)
    least = min(totals)
    assert totals[choice.index] <= least * (1 + 1e-4)
    near = [index for index, total in enumerate(totals) if total <= least * (1 + 1e-4)]
    if len({totals[index] for index in near}) == 1:
        begin = asked.sequence % count
        expected = next((index for index in near if index >= begin), near[0])
        assert choice.index == expected


def test_an_idle_fleet_of_equals_takes_turns() -> None:
    views = [FakeView(f"i{n}") for n in range(100)]
    ranking = CostRanking(views)
    for index in range(100):
        ranking.put(index)
    asked = replace(World(0, 1, "equal").request(), cached_tokens={}, slo=None)
    chosen = [ranking.choose(replace(asked, sequence=n)).index for n in range(250)]
    assert chosen == [n % 100 for n in range(250)]


@pytest.mark.parametrize("slo", [None, Slo(0.4, 0.024), Slo(is_offline=True)])
def test_few_candidates_are_looked_at_of_many(slo: Slo | None) -> None:
    """What it is for: a thousand at work, each with its own speed and load."""
    seen = 0

    class Counted(FakeView):
        def __getattribute__(self, name: str) -> Any:
            nonlocal seen
            seen += name == "in_flight"
            return super().__getattribute__(name)

    world = World(3, 1, "any")
    views = [Counted(f"i{n}", speed=world.speed()) for n in range(1000)]
    for view in views:
        view.in_flight = world.draw.randrange(8, 14)
        view.prefill_tokens = world.draw.choice((0, 0, 0, 500, 9000))
    ranking = CostRanking(views)
    for index in range(1000):
        ranking.put(index)
    asked = replace(world.request(), prompt_tokens=1000, cached_tokens={}, slo=slo)
    ranking.choose(asked)
    seen = 0
    for number in range(20):
        ranking.choose(replace(asked, sequence=number))
    assert seen < 20 * 150


def test_a_session_goes_on_elsewhere_when_all_its_places_are_full() -> None:
    views = [FakeView(f"i{n}", random.Random(n).getrandbits(64)) for n in range(50)]
    ranking = made(POLICIES["session"], views)
    asked = replace(World(0, 1, "equal").request(), session_key="s")
    for index in range(50):
        ranking.put(index)
    for num_open in range(50, 1, -1):
        index = ranking.choose(asked).index
        expected = POLICIES["session"].choose(
            asked, [views[one] for one in range(50) if ranking._by_load.is_open(one)]
        )
        assert ranking.num_open == num_open
        assert expected.cause == "session"
        ranking.drop(index)
        assert ranking.choose(asked).index != index


def test_what_most_hold_is_said_once() -> None:
    cached = CachedTokens(8.0, {"b": 0.0, "c": 16.0}, ["a", "b", "c"])
    assert dict(cached) == {"a": 8.0, "b": 0.0, "c": 16.0}
    assert (len(cached), cached.get("a"), cached.get("b", 5.0)) == (3, 8.0, 0.0)
    assert [most_cached(one) for one in (cached, {}, {"a": 3.0})] == [16.0, 0.0, 3.0]
