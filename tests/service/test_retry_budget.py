"""Retries are a share of the requests, with a burst of what was not taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.service.retry_budget import RetryBudget


def test_a_new_service_has_a_burst_and_then_a_share() -> None:
    budget = RetryBudget(0.2)
    assert [budget.take(0) for _ in range(101)] == [True] * 100 + [False]
    assert [budget.take(number) for number in range(1, 11)] == 2 * ([False] * 4 + [True])


def test_a_small_share_is_one_retry_in_time() -> None:
    budget = RetryBudget(0.001)
    assert [budget.take(number) for number in (0, 1, 900, 1100)] == [True, False, False, True]


def test_without_a_share_there_is_none() -> None:
    assert not RetryBudget(0.0).take(10_000)


@given(
    st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), max_size=20),
)
def test_no_more_is_taken_than_was_earned(share: float, turns: list[tuple[int, int]]) -> None:
    budget, num_requests, taken = RetryBudget(share), 0, 0
    for more, wanted in turns:
        num_requests += more
        taken += sum(budget.take(num_requests) for _ in range(wanted))
        assert taken <= share * (500 + num_requests) + 1e-6
