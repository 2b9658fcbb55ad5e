"""The queue: nobody lost, nobody served twice, no starvation, no domination, bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_plugin.errors import InternalError
from xllm_plugin.service.flow.queue import Band, FairQueue, Ticket

ONLINE, OFFLINE = Band(is_offline=False, priority=0), Band(is_offline=True, priority=0)
BANDS = (Band(is_offline=False, priority=-1), ONLINE, Band(is_offline=False, priority=2), OFFLINE)
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
POOLS = ("x", "y", None)


def ticket(
    tenant: str = "a",
    band: Band = ONLINE,
    *,
    pool: str | None = "x",
    cost: float = 1.0,
    num_bytes: int = 1,
) -> Ticket[Any]:
    return Ticket(None, band, tenant, pool, cost, num_bytes)


def queue_of(max_tickets: int = 100, max_bytes: int = 1000) -> FairQueue[Any]:
    return FairQueue(max_tickets, max_bytes, lambda tenant: WEIGHTS.get(tenant, 1.0))


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, services and departures, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue_of(max_tickets=7, max_bytes=40)
        self.waiting: list[Ticket[Any]] = []

    @rule(
        tenant=st.sampled_from("abcde"),
        band=st.sampled_from(BANDS),
        pool=st.sampled_from(POOLS),
        cost=st.floats(0.1, 100),
        num_bytes=st.integers(0, 45),
    )
    def push(self, tenant: str, band: Band, pool: str | None, cost: float, num_bytes: int) -> None:
        new = ticket(tenant, band, pool=pool, cost=cost, num_bytes=num_bytes)
        left = self.queue.push(new)
        assert len(set(left)) == len(left)
        if new in left:
            assert left == [new]
            return
        for victim in left:
            self.waiting.remove(victim)
            assert victim.band >= band
        self.waiting.append(new)

    @rule(pools=st.sets(st.sampled_from(POOLS)))
    def pop(self, pools: set[str | None]) -> None:
        served = self.queue.pop(pools)
        able = [one for one in self.waiting if one.pool in pools]
        if served is None:
            assert not able
            return
        self.waiting.remove(served)
        assert served.band == min(one.band for one in able)
        same = [one for one in able if (one.band, one.tenant) == (served.band, served.tenant)]
        assert served is same[0]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(one)
        assert self.queue.remove(one)
        assert not self.queue.remove(one)

    @invariant()
    def holds_what_it_should(self) -> None:
        self.queue.check_integrity()
        assert sorted(self.queue, key=id) == sorted(self.waiting, key=id)
        assert len(self.queue) == len(self.waiting)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@given(
    costs=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.5, 20)), min_size=30, max_size=120)
)
@settings(max_examples=60, deadline=None)
def test_tenants_that_all_wait_are_served_by_their_weights(costs: list[tuple[str, float]]) -> None:
    """The bound of start-time fair queueing: two tenants differ by their largest requests."""
    queue = queue_of()
    for tenant, cost in costs[:100]:
        queue.push(ticket(tenant, cost=cost))
    served = dict.fromkeys("abc", 0.0)
    largest = max(cost for _, cost in costs)
    while {one.tenant for one in queue} == set("abc"):
        one = queue.pop({"x"})
        assert one is not None
        served[one.tenant] += one.cost
        for first in "abc":
            for second in "abc":
                apart = served[first] / WEIGHTS[first] - served[second] / WEIGHTS[second]
                assert apart <= largest * (1 / WEIGHTS[first] + 1 / WEIGHTS[second]) + 1e-6


def test_a_flood_of_new_tenants_starves_nobody() -> None:
    """Not even one that has just had much more than its share."""
    queue = queue_of()
    queue.push(ticket("a", cost=5))
    queue.push(mine := ticket("a", cost=5))
    queue.push(ticket("other"))
    assert queue.pop({"x"}).tenant == "a"  # type: ignore[union-attr]
    for number in range(20):
        queue.push(ticket(f"new {number}"))
        if queue.pop({"x"}) is mine:
            break
    else:
        pytest.fail("it was never served")


def test_who_comes_back_after_a_large_request_waits_for_the_others() -> None:
    queue = queue_of()
    for _ in range(4):
        queue.push(ticket("b2"))
    queue.push(ticket("a", cost=3.5))
    order = [queue.pop({"x"}).tenant for _ in range(2)]  # type: ignore[union-attr]
    assert sorted(order) == ["a", "b2"]
    queue.push(ticket("a"))
    assert [queue.pop({"x"}).tenant for _ in range(3)] == ["b2", "b2", "b2"]  # type: ignore[union-attr]


def test_one_tenant_cannot_fill_the_queue() -> None:
    queue = queue_of(max_tickets=10)
    flood = [ticket("flood") for _ in range(30)]
    assert [bool(queue.push(one)) for one in flood] == [False] * 10 + [True] * 20
    left = [queue.push(ticket("quiet")) for _ in range(5)]
    assert [one.tenant for [one] in left] == ["flood"] * 5
    assert left[0] == [flood[9]], "the newest goes"
    assert len(queue.push(ticket("quiet"))) == 1
    assert len([one for one in queue if one.tenant == "quiet"]) == 5


def test_by_its_weight_a_tenant_may_have_more_of_a_full_queue() -> None:
    queue = queue_of(max_tickets=9)
    for _ in range(30):
        queue.push(ticket("b"))
        queue.push(ticket("a"))
    tenants = [one.tenant for one in queue]
    assert (tenants.count("b"), tenants.count("a")) == (6, 3)


def test_offline_requests_go_first_when_there_is_no_place() -> None:
    queue = queue_of(max_tickets=2)
    assert not queue.push(offline := ticket(band=OFFLINE))
    assert not queue.push(ticket())
    assert queue.push(ticket("b")) == [offline]
    assert queue.push(late := ticket("c", OFFLINE)) == [late]


def test_a_large_request_that_finds_no_place_pushes_nobody_out() -> None:
    queue = queue_of(max_bytes=100)
    small = [ticket("a", num_bytes=30) for _ in range(3)]
    for one in small:
        queue.push(one)
    large = ticket("c", num_bytes=95)
    assert queue.push(large) == [large]
    assert queue.push(huge := ticket("c", num_bytes=101)) == [huge]
    assert [queue.pop({"x"}) for _ in small] == small


def test_who_waits_for_a_full_pool_holds_nobody_up() -> None:
    queue = queue_of()
    for pool in ("x", "x", "y"):
        queue.push(ticket("a", pool=pool))
    assert queue.pop({"y"}).pool == "y"  # type: ignore[union-attr]
    assert queue.pop({"y"}) is None
    assert queue.pools == {"x": 2}


def test_what_was_pushed_past_its_share_is_not_remembered_for_ever() -> None:
    """Tenants are named by clients: what is kept of them is bounded."""
    queue = queue_of()
    for number in range(20):
        queue.push(ticket(f"first {number}"))
    state = queue._bands[ONLINE]
    for number in range(2_000):
        queue.push(ticket(f"tenant {number}", cost=1 + number % 7))
        queue.pop({"x"})
        assert len(state.finished) < 300
    for _ in range(1_000):
        queue.push(mine := ticket("comes and goes"))
        queue.remove(mine)
    assert len(state.turns) < 300


def test_statistics_and_a_broken_counter() -> None:
    queue = queue_of()
    queue.push(ticket("b", OFFLINE))
    queue.push(ticket("a", num_bytes=5))
    assert queue.statistics() == [(ONLINE, "a", 1, 5), (OFFLINE, "b", 1, 1)]
    queue.num_bytes += 1
    with pytest.raises(InternalError, match="the queue counts"):
        queue.check_integrity()
