"""Policies are pure: the same view gives the same choice, and the choice is the right one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.plugins import build_manager, routing_policies
from xllm_plugin.service.cost_choice import cost_in_seconds
from xllm_plugin.service.decision import Asked
from xllm_plugin.service.policies import (
    least_loaded,
    power_of_two,
    round_robin,
    session_affinity,
    work_tokens,
)
from xllm_plugin.service.policy import Choice
from xllm_plugin.testing.fake_view import FakeView

REQUEST = Asked(
    sequence=0,
    draw=0,
    session_key="",
    cost_tokens=10,
    prompt_tokens=8,
    output_tokens=2,
    cached_tokens={"a": 4.0},
)


def asked(**changes: Any) -> Asked:
    return msgspec.structs.replace(REQUEST, **changes)


THERE = st.builds(
    FakeView,
    name=st.just("a"),
    name_hash=st.integers(0, 2**64 - 1),
    capacity=st.floats(0.1, 10),
    outstanding_tokens=st.integers(0, 10**6),
    foreign_requests=st.integers(0, 100),
    prefill_tokens=st.floats(0, 1e6),
)
ASKED = st.builds(
    asked,
    sequence=st.integers(0, 2**40),
    draw=st.integers(0, 2**64 - 1),
    session_key=st.text(max_size=8),
)
POLICIES = [policy.choose for policy in routing_policies(build_manager("")).values()]


@pytest.mark.parametrize("choose", POLICIES)
@given(request=ASKED, there=st.lists(THERE, min_size=1, max_size=9))
def test_every_policy_chooses_a_candidate_and_the_same_again(
    choose: Callable[..., Choice], request: Asked, there: list[FakeView]
) -> None:
    before = copy.deepcopy((request, there))
    choice = choose(request, there)
    assert 0 <= choice.index < len(there)
    assert str(choice.reason)
    assert choose(request, there) == choice
    assert (request, there) == before
    assert choice.cause


@pytest.mark.parametrize(
    ("cached", "cause"),
    [({}, "load"), ({"a": 8.0}, "prefix"), ({"a": 4.0, "b": 4.0}, "prefix"), ({"b": 8.0}, "load")],
)
def test_the_cause_says_what_the_cache_had_to_do_with_it(
    cached: dict[str, float], cause: str
) -> None:
    """The second instance is too busy for any prefix."""
    there = [FakeView("a"), FakeView("b", prefill_tokens=1e6)]
    choice = cost_in_seconds(asked(cached_tokens=cached), there)
    assert choice.index == 0
    assert choice.cause == cause + (" over prefix" if cached == {"b": 8.0} else "")


@given(request=ASKED, there=st.lists(THERE, min_size=1, max_size=9))
def test_least_loaded_has_no_less_loaded_one(request: Asked, there: list[FakeView]) -> None:
    chosen = there[least_loaded(request, there).index]
    assert work_tokens(chosen) == min(map(work_tokens, there))


def test_equally_loaded_ones_take_turns() -> None:
    there = [FakeView("a")] * 3
    assert [least_loaded(asked(sequence=n), there).index for n in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [round_robin(asked(sequence=n), there).index for n in range(4)] == [0, 1, 2, 0]


def test_capacity_and_requests_of_others_count() -> None:
    busy = FakeView("a", outstanding_tokens=100)
    fast = FakeView("b", outstanding_tokens=150, capacity=2)
    assert least_loaded(asked(), [busy, fast]).index == 1
    assert least_loaded(asked(), [busy, FakeView("a", foreign_requests=1)]).index == 0


@given(draw=st.integers(0, 2**64 - 1), there=st.lists(THERE, min_size=2, max_size=9))
def test_power_of_two_never_takes_the_worst_alone(draw: int, there: list[FakeView]) -> None:
    worst = max(range(len(there)), key=lambda index: work_tokens(there[index]))
    chosen = power_of_two(asked(draw=draw), there).index
    assert (
        chosen != worst or [work_tokens(one) for one in there].count(work_tokens(there[worst])) > 1
    )


def places(there: list[FakeView], num_sessions: int = 2000) -> list[int]:
    return [
        there[session_affinity(asked(session_key=f"s{n}"), there).index].name_hash
        for n in range(num_sessions)
    ]


def test_sessions_are_spread_and_stay_when_instances_come_and_go() -> None:
    hashes = [0x9E3779B97F4A7C15 * n % 2**64 for n in range(1, 9)]
    there = [FakeView("a", name_hash=one) for one in hashes]
    before = places(there)
    assert min(Counter(before).values()) > 2000 / 8 * 0.75
    assert places(list(reversed(there))) == before
    for lost in hashes:
        moved = places([one for one in there if one.name_hash != lost])
        assert all(a == b for a, b in zip(before, moved, strict=True) if a != lost)


def test_a_request_without_a_session_goes_to_the_least_loaded() -> None:
    there = [FakeView("a", outstanding_tokens=5), FakeView("a")]
    choice = session_affinity(asked(), there)
    assert choice.index == 1
    assert "no session key" in str(choice.reason)
