"""The queue: its orders are those of a sort, however requests came and went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_plugin.scheduler.waiting_queue import Waiting, WaitingQueue

# Few values, so that many are equal.
VALUES: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    is_online=st.booleans(),
    deadline_s=st.sampled_from([0.5, 1.0, 2.0]),
    arrival_s=st.sampled_from([0.0, 1.0, 2.0]),
    priority=st.integers(-1, 1),
    todo_tokens=st.sampled_from([1, 10, 100]),
    computed_tokens=st.sampled_from([0, 50]),
    is_lost=st.booleans(),
)


def waiting(name: str, **changes: Any) -> Waiting:
    values = {"is_online": True, "deadline_s": 1.0, "tpot_ms": 50.0, "arrival_s": 0.0}
    values |= {"priority": 0, "todo_tokens": 10}
    return Waiting(request_id=name, **{**values, **changes})


def least_s(todo_tokens: Any, computed_tokens: Any) -> Any:
    return todo_tokens * (0.01 + 1e-4 * computed_tokens)


def names(requests: list[Waiting]) -> list[str]:
    return [request.request_id for request in requests]


class AnyQueue(RuleBasedStateMachine):
    """Requests come and go; a list in order of arrival says what is to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.there: list[Waiting] = []
        self.num = 0

    @rule(values=VALUES, copies=st.sampled_from([1, 1, 40]))
    def come(self, values: dict[str, Any], copies: int) -> None:
        for _ in range(copies):
            self.num += 1
            made = waiting(f"r{self.num}", **values)
            self.there.append(made)
            self.queue.add(made)

    @precondition(lambda self: self.there)
    @rule(index=st.integers(0, 10**6))
    def go(self, index: int) -> None:
        gone = self.there.pop(index % len(self.there))
        self.queue.remove(gone.request_id)
        assert gone.request_id not in self.queue

    @rule()
    def begin_anew(self) -> None:
        self.queue = WaitingQueue(self.there)

    @invariant()
    def the_orders_are_right(self) -> None:
        online = [r for r in self.there if r.is_online]
        offline = [r for r in self.there if not r.is_online]
        online.sort(key=lambda r: (r.priority, r.deadline_s))
        offline.sort(key=lambda r: (r.priority, r.arrival_s))
        assert names(list(self.queue)) == names([*online, *offline])
        assert all(self.queue[r.request_id] is r for r in self.there)
        assert (len(self.queue), self.queue.num_online) == (len(self.there), len(online))
        assert names(self.queue.offline(3)) == names(offline[:3])
        oldest = min(
            (r for r in self.there if r.is_online), key=lambda r: r.arrival_s, default=None
        )
        assert self.queue.oldest_online() is oldest

    @rule(now_s=st.sampled_from([0.0, 0.9, 5.0]), most=st.integers(1, 6))
    def sift(self, now_s: float, most: int) -> None:
        online = [r for r in self.there if r.is_online]
        needed = {r.request_id: least_s(r.todo_tokens, r.computed_tokens) for r in online}
        in_time = [
            r for r in online if not r.is_lost and now_s + needed[r.request_id] <= r.deadline_s
        ]
        late = [r for r in online if r not in in_time]
        in_time.sort(key=lambda r: (r.priority, r.deadline_s, needed[r.request_id]))
        late.sort(key=lambda r: (r.priority, needed[r.request_id]))
        sifted = self.queue.sift(now_s, least_s)
        assert sifted.num_late == len(late)
        for found, expected in ((sifted.in_time(most), in_time), (sifted.late(most), late)):
            assert len(found) >= min(most, len(expected))
            first = [sifted.request(number) for *_, number in sorted(found)[:most]]
            assert names(first) == names(expected[:most])


AnyQueue.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyQueue = AnyQueue.TestCase


def test_a_request_waits_once() -> None:
    queue = WaitingQueue([waiting("a")])
    with pytest.raises(AssertionError, match="twice"):
        queue.add(waiting("a"))
    queue.remove("a")
    with pytest.raises(KeyError):
        queue.remove("a")


def test_the_least_time_is_computed_of_columns_as_of_numbers() -> None:
    """Bit by bit: what a plan decides must not depend on which was used."""
    queue = WaitingQueue([waiting(f"r{i}", todo_tokens=3 * i + 1) for i in range(50)])
    found = queue.sift(0.0, lambda todo, computed: todo * (0.1 + 1e-7 * (computed + todo / 2)))
    for _, _, needed_s, number in found.late(50):
        todo = found.request(number).todo_tokens
        assert needed_s == todo * (0.1 + 1e-7 * (0 + todo / 2))
    assert isinstance(found.num_late, int)
    assert not np.isnan(found.num_late)
