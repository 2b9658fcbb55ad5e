"""The states of an instance, driven by a machine that also keeps its own, simpler account."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_plugin.service.lifecycle import (
    Alive,
    Drain,
    Event,
    Failed,
    Lapsed,
    Life,
    Registered,
    State,
    Tick,
    Timings,
    Undrain,
    Withdrawn,
    begin,
    next_life,
)

TIMINGS = Timings(lease_s=5, suspect_s=20, joining_s=60, drain_s=30, num_failures=2)


def after(*events: Event, leased: bool = False, at_s: float = 0.0) -> Life:
    life = begin(Registered("a", leased), 0.0)
    for event in events:
        life = next_life(life, event, at_s, TIMINGS)
    return life


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], State.JOINING),
        ([Alive("a")], State.READY),
        ([Alive("a", ready=False)], State.JOINING),
        ([Alive("b")], State.JOINING),
        ([Alive("a"), Failed("x")], State.READY),
        ([Alive("a"), Failed("x"), Failed("x")], State.SUSPECT),
        ([Alive("a"), Failed("x"), Alive("a"), Failed("x")], State.READY),
        ([Alive("a"), Failed("x", certain=True)], State.SUSPECT),
        ([Alive("a"), Failed("x", certain=True), Alive("a")], State.READY),
        ([Alive("a"), Drain()], State.DRAINING),
        ([Alive("a"), Drain(), Alive("a"), Failed("x", certain=True)], State.DRAINING),
        ([Alive("a"), Drain(), Undrain()], State.JOINING),
        ([Alive("a"), Undrain()], State.READY),
        ([Alive("a"), Withdrawn("x"), Alive("a")], State.GONE),
        ([Alive("a"), Registered("b")], State.JOINING),
        ([Alive("a"), Registered("a")], State.READY),
        ([Withdrawn("x"), Registered("b")], State.JOINING),
        ([Alive("a"), Lapsed("x")], State.SUSPECT),
        ([Alive("a"), Lapsed("x"), Alive("a", renews=False)], State.SUSPECT),
        ([Alive("a"), Lapsed("x"), Registered("a"), Alive("a", renews=False)], State.READY),
        ([Alive("a"), Drain(), Lapsed("x")], State.DRAINING),
    ],
)
def test_what_follows_what(events: list[Event], state: State) -> None:
    assert after(*events).state is state


def test_a_lease_lapses_and_is_forgotten() -> None:
    life = after(Alive("a"), leased=True)
    assert next_life(life, Tick(), 5.0, TIMINGS).state is State.READY
    suspect = next_life(life, Tick(), 5.1, TIMINGS)
    assert suspect.state is State.SUSPECT
    probed = next_life(suspect, Alive("a", renews=False), 6.0, TIMINGS)
    assert probed.state is State.SUSPECT
    beaten = next_life(suspect, Alive("a", ready=False), 6.0, TIMINGS)
    assert next_life(beaten, Alive("a", renews=False), 6.1, TIMINGS).state is State.READY
    assert next_life(suspect, Tick(), 25.0, TIMINGS).state is State.SUSPECT
    assert next_life(suspect, Tick(), 25.2, TIMINGS).state is State.GONE


def test_without_a_lease_nothing_goes_by_itself() -> None:
    for life in (after(), after(Alive("a")), after(Alive("a"), Failed("x", certain=True))):
        assert next_life(life, Tick(), 1e9, TIMINGS) is life


def test_a_leased_instance_that_is_drained_stays_so_until_it_is_silent() -> None:
    """Forgotten while it sends heartbeats, it would register again and be used again."""
    life = after(Drain(), leased=True)
    beaten = next_life(life, Alive("a", ready=False), 4.0, TIMINGS)
    assert next_life(beaten, Tick(in_flight=0), 8.0, TIMINGS).state is State.DRAINING
    assert next_life(beaten, Tick(in_flight=1), 10.0, TIMINGS).state is State.DRAINING
    assert next_life(beaten, Tick(in_flight=0), 10.0, TIMINGS).state is State.GONE
    assert next_life(beaten, Tick(in_flight=1), 30.1, TIMINGS).state is State.GONE


def test_a_lease_that_somebody_else_keeps_lapses_when_he_says_so() -> None:
    life = after(Alive("a"))
    assert next_life(life, Tick(), 1e6, TIMINGS) is life
    lapsed = next_life(life, Lapsed("etcd says so"), 100.0, TIMINGS)
    assert (lapsed.state, lapsed.reason) == (State.SUSPECT, "etcd says so")
    assert next_life(lapsed, Tick(), 119.0, TIMINGS).state is State.SUSPECT
    assert next_life(lapsed, Tick(), 120.1, TIMINGS).state is State.GONE
    drained = next_life(after(Drain()), Lapsed("x"), 100.0, TIMINGS)
    assert next_life(drained, Tick(in_flight=0), 100.0, TIMINGS).state is State.GONE


class Lives(RuleBasedStateMachine):
    """Any events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.life = begin(Registered("0", leased=True), 0.0)
        self.leased = True
        self.number = 0
        self.renewed_s = 0.0
        self.ticked = False

    def send(self, event: Event) -> Life:
        before, self.life = self.life, next_life(self.life, event, self.now_s, TIMINGS)
        self.ticked = isinstance(event, Tick)
        assert self.life.since_s <= self.now_s
        assert self.life.seen_s <= self.now_s
        if self.life.state is not before.state:
            assert self.life.since_s == self.now_s
            assert self.life.reason
        if not isinstance(event, Registered):
            assert self.life.incarnation == before.incarnation
            if before.state is State.GONE:
                assert self.life is before
        if self.life.state is State.READY and before.state is not State.READY:
            assert isinstance(event, Alive)
            assert event.ready
            assert before.state in (State.JOINING, State.SUSPECT)
        return before

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.ticked = False

    @rule(leased=st.booleans())
    def restart(self, leased: bool) -> None:
        self.number += 1
        self.leased, self.renewed_s = leased, self.now_s
        self.send(Registered(str(self.number), leased))
        assert self.life.state is State.JOINING

    @rule(old=st.booleans(), ready=st.booleans(), renews=st.booleans())
    def alive(self, old: bool, ready: bool, renews: bool) -> None:
        is_ours = not old
        if is_ours and renews and self.life.state is not State.GONE:
            self.renewed_s = self.now_s
        before = self.send(Alive("old" if old else str(self.number), ready, renews))
        if old:
            assert self.life is before

    @rule(certain=st.booleans())
    def fail(self, certain: bool) -> None:
        self.send(Failed("failed", certain))
        if certain:
            assert self.life.state is not State.READY

    @rule()
    def lapse(self) -> None:
        self.send(Lapsed("lapsed"))
        assert self.life.state is not State.READY
        if self.life.state is not State.GONE:
            self.leased = True
            self.renewed_s = min(self.renewed_s, self.now_s - TIMINGS.lease_s)

    @rule()
    def drain(self) -> None:
        self.send(Drain())
        assert self.life.state in (State.DRAINING, State.GONE)

    @rule()
    def undrain(self) -> None:
        self.send(Undrain())
        assert self.life.state is not State.DRAINING

    @precondition(lambda self: self.number % 3 == 0)
    @rule()
    def withdraw(self) -> None:
        self.send(Withdrawn("withdrawn"))
        assert self.life.state is State.GONE

    @rule(in_flight=st.integers(0, 2))
    def tick(self, in_flight: int) -> None:
        before = self.send(Tick(in_flight))
        if not self.leased:
            assert self.life is before

    @invariant()
    def a_silent_lease_is_not_ready(self) -> None:
        silent_s = self.now_s - self.renewed_s
        if self.ticked and self.leased and silent_s > TIMINGS.lease_s:
            assert self.life.state is not State.READY

    @invariant()
    def failures_within_their_bound(self) -> None:
        if self.life.state is State.READY:
            assert self.life.failures < TIMINGS.num_failures


TestLives: Any = Lives.TestCase
TestLives.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
