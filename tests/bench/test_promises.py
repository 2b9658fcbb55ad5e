"""A request keeps its promise with both bounds, and every other end is a violation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.bench.promises import (
    Attainment,
    Outcome,
    Promise,
    Verdict,
    judge,
    parse_promises,
    whole_check,
)
from xllm_plugin.errors import ConfigError

PROMISE = Promise(1000, 50)


def outcome(**changes: object) -> Outcome:
    """Due at 2 s, first token at 3 s, the other ten at 50 ms each."""
    fields = {
        "trace": "t",
        "due_s": 2.0,
        "prompt_tokens": 5,
        "output_tokens": 11,
        "sent_s": 2.0,
        "first_s": 3.0,
        "last_s": 3.5,
        "received_tokens": 11,
        "status": 200,
    }
    return Outcome.model_validate({**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.MET),
        ({"first_s": 3.001}, Verdict.LATE),
        ({"due_s": 1.9}, Verdict.LATE),  # from when it was due, though it was sent later
        ({"last_s": 3.502}, Verdict.SLOW),
        ({"first_s": 3.2, "last_s": 9.0}, Verdict.LATE),
        ({"status": 429, "first_s": None, "last_s": None, "error": "HTTP 429"}, Verdict.REFUSED),
        ({"status": 503, "first_s": None, "last_s": None, "error": "HTTP 503"}, Verdict.REFUSED),
        ({"status": 500, "first_s": None, "last_s": None, "error": "HTTP 500"}, Verdict.FAILED),
        ({"error": "the stream ended without [DONE]"}, Verdict.FAILED),
        ({"received_tokens": 10}, Verdict.FAILED),
        ({"received_tokens": 12}, Verdict.FAILED),
        ({"status": 0, "sent_s": None, "first_s": None, "last_s": None}, Verdict.FAILED),
        ({"was_cut": True, "received_tokens": 3}, Verdict.CUT),
    ],
)
def test_verdicts(changes: dict[str, object], verdict: Verdict) -> None:
    assert judge(outcome(**changes), PROMISE) is verdict


def test_all_are_answered_with_all_their_tokens() -> None:
    whole = outcome()
    assert whole_check([whole] * 3).passed
    for other in (outcome(received_tokens=10), outcome(received_tokens=12), outcome(error="x")):
        found = whole_check([whole, other])
        assert (found.passed, found.detail) == (False, "1 of 2")


def test_a_single_token_has_no_pace() -> None:
    one = outcome(output_tokens=1, received_tokens=1, last_s=3.0)
    assert one.tpot_ms == 0
    assert judge(one, PROMISE) is Verdict.MET


def test_attainment_counts_all() -> None:
    found = Attainment.of([outcome(), outcome(first_s=4.0), outcome(status=429)], PROMISE)
    assert (found.total, found.share) == (3, pytest.approx(1 / 3))
    assert found.violations == pytest.approx(2 / 3)
    assert str(found) == "33% of 3 (1 late, 1 refused)"
    with pytest.raises(ConfigError, match="without requests"):
        Attainment.of([], PROMISE)


@settings(deadline=None)
@given(st.floats(0, 9), st.floats(0, 9), st.integers(1, 50), st.floats(1, 5000), st.floats(1, 500))
def test_what_is_met_was_over_before_the_latest_end(
    wait_s: float, pace_s: float, tokens: int, ttft_ms: float, tpot_ms: float
) -> None:
    """So a request that is ended behind it has broken the promise."""
    first_s = 2 + wait_s
    one = outcome(
        first_s=first_s,
        last_s=first_s + pace_s * (tokens - 1),
        output_tokens=tokens,
        received_tokens=tokens,
    )
    promise = Promise(ttft_ms, tpot_ms)
    if judge(one, promise) is Verdict.MET:
        assert one.last_s is not None
        assert one.last_s <= one.due_s + promise.latest_end_s(tokens) + 1e-6


@settings(deadline=None)
@given(st.floats(1, 5000), st.floats(1, 500), st.floats(1, 3), st.floats(0, 9), st.floats(0, 9))
def test_a_looser_promise_is_kept_too(
    ttft_ms: float, tpot_ms: float, factor: float, wait_s: float, pace_s: float
) -> None:
    one = outcome(first_s=2 + wait_s, last_s=2 + wait_s + 10 * pace_s)
    if judge(one, Promise(ttft_ms, tpot_ms)) is Verdict.MET:
        assert judge(one, Promise(ttft_ms * factor, tpot_ms * factor)) is Verdict.MET


def test_promises_from_text() -> None:
    assert parse_promises("1000/50, 500/35,1000/50") == (PROMISE, Promise(500, 35))
    assert str(PROMISE) == "1000/50"


@pytest.mark.parametrize("text", ["", ",", "1000", "1000/50/1", "a/b", "0/50", "1000/-1", "inf/50"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"1000/50|above 0"):
        parse_promises(text)
