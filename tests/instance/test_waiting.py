"""The list of waiting requests, against a plain model of vLLM's own account."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm_plugin.instance.waiting import WaitingList, WaitingRequest
from xllm_plugin.scheduler.promise import Promise, ServiceClass

ONLINE = Promise(ttft_ms=1000)
OFFLINE = Promise(service_class=ServiceClass.OFFLINE)


def test_a_request_finds_its_class_and_its_tenant() -> None:
    waiting = WaitingList({"a": 3.0}, by_deadline=False)
    waiting.add("1", Promise(tenant="a"), 10, 0.0)
    waiting.add("2", Promise(tenant="a"), 20, 0.0)
    waiting.add("3", Promise(tenant="unknown"), 40, 0.0)
    waiting.add("4", OFFLINE, 80, 0.0)
    view = waiting.look(Promise(tenant="a"), 0.0)
    assert (view.num_requests, view.num_tokens) == (3, 70)
    assert (view.tenant_requests, view.tenant_tokens) == (2, 30)
    assert view.tenant_share == 0.75
    assert view.ahead_tokens == 150
    other = waiting.look(Promise(tenant="another unknown"), 0.0)
    assert (other.tenant_requests, other.tenant_tokens, other.tenant_share) == (1, 40, 0.25)


def test_without_weights_there_are_no_shares() -> None:
    waiting = WaitingList({}, by_deadline=False)
    waiting.add("1", Promise(tenant="a"), 10, 0.0)
    assert waiting.look(Promise(tenant="b"), 0.0).tenant_share == 1.0


def test_a_tenant_alone_has_all_and_shares_for_a_while_with_one_that_asked() -> None:
    waiting = WaitingList({"a": 1.0, "b": 1.0}, by_deadline=False)
    assert waiting.look(Promise(tenant="a"), 0.0).tenant_share == 1.0
    waiting.look(Promise(tenant="b"), 1.0)
    assert waiting.look(Promise(tenant="a"), 2.0).tenant_share == 0.5
    assert waiting.look(Promise(tenant="a"), 100.0).tenant_share == 1.0


def test_by_deadline_only_earlier_online_requests_are_ahead() -> None:
    waiting = WaitingList({}, by_deadline=True)
    waiting.add("urgent", Promise(ttft_ms=100), 1, 0.0)
    waiting.add("later", Promise(ttft_ms=5000), 2, 0.0)
    waiting.add("offline", OFFLINE, 4, 0.0)
    assert waiting.look(ONLINE, 0.0).ahead_tokens == 1
    assert waiting.look(ONLINE, 4.5).ahead_tokens == 3
    assert waiting.look(OFFLINE, 0.0).ahead_tokens == 7


@pytest.mark.parametrize("seen_first", [True, False])
def test_a_request_leaves_with_its_first_token(*, seen_first: bool) -> None:
    waiting = WaitingList({}, by_deadline=False)
    waiting.add("1", ONLINE, 10, 0.0)
    if seen_first:
        waiting.sweep({"1": True}.get, 0.0)
        assert len(waiting) == 1
    waiting.sweep({"1": False}.get, 0.0)
    assert len(waiting) == 0


def test_a_request_that_vllm_does_not_know_yet_stays_and_one_it_knew_leaves() -> None:
    waiting = WaitingList({}, by_deadline=False)
    waiting.add("1", ONLINE, 10, 0.0)
    waiting.sweep({}.get, 0.0)
    assert len(waiting) == 1
    waiting.sweep({"1": True}.get, 0.0)
    waiting.sweep({}.get, 0.0)
    assert len(waiting) == 0


def test_a_request_that_never_reached_vllm_leaves_after_a_while() -> None:
    waiting = WaitingList({}, by_deadline=False)
    waiting.add("1", ONLINE, 10, 0.0)
    waiting.sweep({}.get, 0.9)
    assert len(waiting) == 1
    waiting.sweep({}.get, 1.1)
    assert len(waiting) == 0


class Account(RuleBasedStateMachine):
    """Arrivals, hand-overs, first tokens and departures in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = WaitingList({"a": 1.0, "b": 2.0}, by_deadline=True)
        self.present: list[WaitingRequest] = []
        self.phases: dict[str, bool] = {}

    @rule(
        request_id=st.sampled_from("uvwxyz"),
        kind=st.sampled_from(ServiceClass),
        tenant=st.sampled_from(["a", "b", "c"]),
        num_tokens=st.integers(0, 1000),
    )
    def arrive(self, request_id: str, kind: ServiceClass, tenant: str, num_tokens: int) -> None:
        promise = Promise(service_class=kind, tenant=tenant)
        self.present.append(self.waiting.add(request_id, promise, num_tokens, 0.0))

    @rule(request_id=st.sampled_from("uvwxyz"), waits=st.booleans())
    def change(self, request_id: str, waits: bool) -> None:
        self.phases[request_id] = waits
        self.waiting.sweep(self.phases.get, 0.0)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.present:
            request = data.draw(st.sampled_from(self.present))
            self.waiting.discard(request)
            self.waiting.discard(request)

    @invariant()
    def sums_are_right_and_views_within(self) -> None:
        self.waiting.check_integrity()
        for tenant in ("a", "b", "c"):
            view = self.waiting.look(Promise(tenant=tenant), 0.0)
            assert 0 <= view.tenant_requests <= view.num_requests <= len(self.waiting)
            assert 0 <= view.tenant_tokens <= view.num_tokens
            assert 0 < view.tenant_share <= 1

    def teardown(self) -> None:
        for request in self.present:
            self.waiting.discard(request)
        assert len(self.waiting) == 0
        self.waiting.check_integrity()


TestAccount = Account.TestCase
TestAccount.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
