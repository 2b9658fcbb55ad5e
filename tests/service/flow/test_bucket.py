"""A rate a minute: bursts up to a minute's worth, never more over time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.service.flow.bucket import Bucket


def test_a_minutes_worth_at_once_and_then_at_the_rate() -> None:
    bucket = Bucket(60, 0.0)
    for _ in range(60):
        assert bucket.wait_s(1, 0.0) == 0
        bucket.take(1, 0.0)
    assert bucket.wait_s(1, 0.0) == 1.0
    assert bucket.wait_s(2, 0.5) == 1.5
    assert bucket.left(0.5) == (0.5, 59.5)
    assert bucket.level(1000.0) == 60, "what is not used is kept for a minute"


def test_what_was_used_beyond_the_estimate_is_paid_for() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(10, 0.0)
    bucket.take(170, 0.0)
    assert bucket.level(0.0) == -120
    assert bucket.wait_s(1, 0.0) == 121
    bucket.take(-500, 0.0)
    assert bucket.level(0.0) == 60, "what is given back makes it no larger"


def test_more_than_a_minutes_worth_passes_when_nothing_was_used() -> None:
    bucket = Bucket(0.5, 0.0)
    assert bucket.wait_s(1, 0.0) == 0
    bucket.take(1, 0.0)
    assert bucket.wait_s(1, 0.0) == 120


@given(
    steps=st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 20)), max_size=60),
    per_minute=st.floats(1, 1000),
)
def test_over_any_time_no_more_than_the_rate_and_one_burst(
    steps: list[tuple[float, float]], per_minute: float
) -> None:
    bucket, now_s, taken, largest = Bucket(per_minute, 0.0), 0.0, 0.0, 0.0
    for pause_s, amount in steps:
        now_s += pause_s
        if bucket.wait_s(amount, now_s) == 0:
            bucket.take(amount, now_s)
            taken += amount
            largest = max(largest, amount)
    assert taken <= per_minute * (1 + now_s / 60) + largest + 1e-6
