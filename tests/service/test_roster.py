"""The router before many instances: what changes is seen at once, whoever is asked."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.plugins import build_manager, routing_policies
from xllm_plugin.registration import Load
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.lifecycle import Alive, Drain, Timings
from xllm_plugin.service.policies import LeastLoadedRanking, least_loaded
from xllm_plugin.service.policy import Choice, RoutingPolicy
from xllm_plugin.service.replies import Refusal
from xllm_plugin.service.roster import MANY, Roster
from xllm_plugin.service.router import Router
from xllm_plugin.service.routes import Kind, route_of
from xllm_plugin.testing.fake_exchange import FakeExchange
from xllm_plugin.testing.fake_instance import FakeInstance
from xllm_plugin.testing.service_harness import make_pool, serving

pytestmark = pytest.mark.looks_inside

POLICIES = routing_policies(build_manager(""))


class Request(FakeExchange):
    """A request at random."""

    def __init__(self, draw: random.Random, model: str | None = "m") -> None:
        number = draw.getrandbits(64)
        super().__init__(model, b" " * 400, draw=number, session_key=draw.choice(("", "a", "b")))


class Site:
    """A fleet of many, and its router."""

    def __init__(self, count: int, policy: RoutingPolicy, seed: int = 0) -> None:
        self.now_s = 0.0
        self.draw = random.Random(seed)
        self.fleet = Fleet(Timings(lease_s=1e9), make_pool, clock=lambda: self.now_s)
        self.router = Router(
            self.fleet, policy, num_decisions=4, retry_after_s=1.0, clock=lambda: self.now_s
        )
        for number in range(count):
            self.join(f"i{number}")

    def join(self, name: str) -> Instance:
        entry = InstanceEntry(url=f"http://{name}:80", name=name)
        instance = self.fleet.register(entry, source="t", incarnation="1", leased=True)
        self.fleet.set_models(instance, {"m": {"id": "m"}})
        self.fleet.report(instance, Alive("1"))
        return instance

    def expected(self, request: Request) -> Instance:
        """Whom the policy's own function names."""
        candidates = list(self.fleet.candidates(request.model))
        if self.router.has_room is not None:
            candidates = list(filter(self.router.has_room, candidates)) or candidates
        sent = request.sent
        request.sequence = self.router._sequence
        asked = self.router._asked(request)  # type: ignore[arg-type]
        assert sent is request.sent
        return candidates[self.router.policy.choose(asked, candidates).index]

    def ask(self, request: Request | None = None) -> Instance:
        asked = request or Request(self.draw)
        instance = self.router.choose(asked)  # type: ignore[arg-type]
        self.fleet.book(instance, asked.cost_tokens)
        return instance


def changes(site: Site, running: list[tuple[Request, Instance]]) -> None:
    """Something happens between two requests."""
    draw, fleet = site.draw, site.fleet
    instances: list[Instance] = list(fleet)
    match draw.randrange(6):
        case 0 if running:
            request, instance = running.pop(draw.randrange(len(running)))
            site.router.left(request)  # type: ignore[arg-type]
            fleet.release(instance, request.cost_tokens)
        case 1:
            running_there, waiting = draw.randrange(20), draw.randrange(3)
            load = Load(num_running=running_there, num_waiting=waiting, kv_usage=0.5, tpot_s=0.03)
            fleet.set_load(draw.choice(instances), load)
        case 2:
            fleet.observe_ttft(draw.choice(instances), draw.randrange(1, 9000), draw.random())
            site.now_s += 1.0
            fleet.tick()
        case 3:
            site.join(f"new{len(instances)}")
        case 4 if len(instances) > MANY + 2:
            fleet.report(draw.choice(instances), Drain())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("limits", [False, True])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_the_router_chooses_as_the_policy_does(name: str, limits: bool, seed: int) -> None:
    site = Site(MANY + 6, POLICIES[name], seed)
    if limits:
        site.router.has_room = lambda instance: instance.in_flight < 2
    running: list[tuple[Request, Instance]] = []
    for _ in range(30):
        request = Request(site.draw)
        expected = site.expected(request)
        found = site.ask(request)
        assert found is expected, request.decision
        running.append((request, found))
        changes(site, running)


def test_when_none_has_room_all_are_candidates() -> None:
    site = Site(MANY, POLICIES["least-loaded"])
    site.router.has_room = lambda instance: instance.in_flight < 1
    assert len({site.ask().name for _ in range(MANY)}) == MANY
    request = Request(site.draw)
    assert site.ask(request) is not None
    assert request.decision is not None
    assert request.decision.num_candidates == MANY


def test_another_policy_or_another_limit_counts_at_once() -> None:
    site = Site(MANY, POLICIES["least-loaded"])
    first = site.ask()
    site.router.has_room = lambda instance: instance is first
    assert site.ask() is first
    site.router.has_room = None
    site.router.policy = POLICIES["round-robin"]
    assert len({site.ask().name for _ in range(MANY)}) == MANY
    assert site.fleet._watchers == [], "what nobody asks any more is not told"


def test_what_nobody_asks_any_more_is_let_go() -> None:
    """Else each instance that ever came would be kept as one that has changed."""
    site = Site(MANY, POLICIES["least-loaded"])
    site.ask()
    (changed,) = site.fleet._watchers
    for number in range(5):
        site.fleet.book(site.join(f"new{number}"), 1)
    assert len(changed) < 3
    site.ask()
    assert len(site.fleet._watchers) == 1


def test_of_many_models_those_asked_for_last_are_kept() -> None:
    site = Site(MANY, POLICIES["least-loaded"])
    names = [f"adapter{number}" for number in range(12)]
    for instance in site.fleet:
        site.fleet.set_models(instance, {name: {"id": name} for name in names})
    for name in (*names, "adapter4"):
        site.ask(Request(site.draw, name))
    assert list(site.router._rosters) == [*names[5:], "adapter4"]
    assert len(site.fleet._watchers) == 8


def test_a_ranking_that_has_failed_is_made_anew() -> None:
    is_broken = True

    class Fragile(LeastLoadedRanking):
        def put(self, index: int) -> None:
            if is_broken:
                raise ZeroDivisionError
            super().put(index)

    class Unmade(LeastLoadedRanking):
        def __init__(self, *_: Any) -> None:
            raise ZeroDivisionError

    site = Site(MANY, RoutingPolicy("p", "", least_loaded, ranking=Unmade))
    for ranking in (Unmade, Fragile):
        site.router.policy = RoutingPolicy("p", "", least_loaded, ranking=ranking)
        with pytest.raises(Refusal, match="Routing policy 'p' has failed"):
            site.ask()
        assert site.fleet._watchers == []
    is_broken = False
    assert len({site.ask().name for _ in range(MANY)}) == MANY


def test_new_limits_count_at_once() -> None:
    site = Site(MANY, POLICIES["round-robin"])
    limit = 1
    site.router.has_room = lambda instance: instance.in_flight < limit
    for _ in range(MANY - 1):
        site.ask()
    limit = 2
    site.router.forget_rosters()
    request = Request(site.draw)
    site.ask(request)
    assert request.decision is not None
    assert request.decision.num_candidates == MANY


def test_new_settings_let_all_rosters_go(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            proxy = harness.proxy
            fleet, policy = proxy.fleet, POLICIES["least-loaded"]
            roster = Roster(fleet.candidates("fake"), policy, None, fleet.watch())
            proxy.router._rosters["fake"] = roster
            proxy.reconfigure(proxy.config)
            assert (fleet._watchers, len(proxy.router._rosters)) == ([], 0)

    run(check())


def test_who_was_tried_is_not_asked_again() -> None:
    site = Site(MANY, POLICIES["cost"])
    request = Request(site.draw)
    for number in range(MANY):
        instance = site.router.choose(request)  # type: ignore[arg-type]
        assert instance not in request.tried
        assert request.decision is not None
        assert request.decision.attempt == number + 1
        site.router.left(request)  # type: ignore[arg-type]
        request.tried += (instance,)
    with pytest.raises(Refusal, match="every instance was tried"):
        site.router.choose(request)  # type: ignore[arg-type]
    site.fleet.check_integrity()


def test_a_plugins_policy_that_fails_is_said_before_many_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any) -> Choice:
        raise ZeroDivisionError

    site = Site(MANY, RoutingPolicy("p", "", fails))
    site.router.has_room = lambda _: True
    with pytest.raises(Refusal, match="Routing policy 'p' has failed"):
        site.ask()
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    "choice",
    [
        Choice("0", "why"),  # type: ignore[arg-type]
        Choice(0, "why", None),  # type: ignore[arg-type]
        Choice(10**6, "why"),
        Choice(-1, "why"),
        None,
    ],
)
@pytest.mark.parametrize("count", [2, MANY])
@pytest.mark.parametrize("ranks", [False, True])
def test_what_a_plugin_gives_is_looked_at(choice: Any, count: int, ranks: bool) -> None:
    class Junk(LeastLoadedRanking):
        def choose(self, request: Any) -> Choice:
            return choice

    site = Site(count, RoutingPolicy("p", "", lambda *_: choice, ranking=Junk if ranks else None))
    site.router.has_room = lambda _: True
    with pytest.raises(Refusal, match="Routing policy 'p' has failed"):
        site.ask()
    assert site.fleet._watchers == []


def test_the_owner_of_a_response_has_its_prompt_to_compute() -> None:
    """It is chosen by what it made; the prompt is work all the same."""
    site = Site(3, POLICIES["cost"])
    owner = site.fleet.get("i2")
    assert owner is not None
    site.router.remember_owner("resp_1", owner)
    request = Request(site.draw)
    request.response_id = "resp_1"
    request.route = route_of(b"/v1/responses")
    assert site.router.choose(request) is owner  # type: ignore[arg-type]
    assert owner.prefill_tokens == 100
    site.router.first_byte(request, is_measure=False)  # type: ignore[arg-type]
    assert owner.prefill_tokens == 0
    look = Request(site.draw)
    look.response_id, look.body = "resp_1", b""
    assert site.router.choose(look) is owner  # type: ignore[arg-type]
    assert (owner.prefill_tokens, look.route.kind) == (0, Kind.INFERENCE)


def test_names_that_nobody_serves_are_not_looked_for() -> None:
    """Clients may ask for any: the instances are walked through once, not once a request."""
    site = Site(3, POLICIES["cost"])
    one = site.fleet.get("i1")
    assert one is not None
    site.fleet.set_models(one, {"other": {"id": "other"}})
    assert [found.name for found in site.fleet.candidates("other")] == ["i1"]
    assert site.fleet.candidates("none") == []
    site.fleet.set_models(one, {"none": {"id": "none"}})
    assert [found.name for found in site.fleet.candidates("none")] == ["i1"]
    assert site.fleet.models().keys() == {"m", "none"}
