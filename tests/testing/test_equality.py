"""The checker: what it must find, what it must let pass, and what it must refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.errors import MisuseError
from xllm_plugin.testing.equality import (
    Completion,
    Kind,
    Spread,
    Verdict,
    check_bit_equal,
    check_near_ties,
    check_token_equal,
    measure,
    read_completions,
)

QUIET = Spread(
    num_prompts=4,
    num_tokens=100,
    num_differing=2,
    max_margin=0.1,
    max_gap_shift=0.2,
    max_abs_logprob_difference=0.2,
    mean_abs_logprob_difference=0.02,
)


def completion(
    tokens: Sequence[int], scores: Sequence[dict[int, float]] | None = None, name: str = "p"
) -> Completion:
    """A completion; without scores, every token leads token + 1 by half a nat."""
    scores = scores or [{token: -0.5, token + 1: -1.0} for token in tokens]
    chosen = tuple(at[token] for token, at in zip(tokens, scores, strict=True))
    return Completion(name, tuple(tokens), chosen, tuple(scores))


@st.composite
def completions(draw: st.DrawFn) -> tuple[Completion, ...]:
    """One to four sequences of one to eight tokens, each the likeliest of its candidates."""
    log_prob = st.floats(-20.0, 0.0, allow_nan=False)
    position = st.dictionaries(st.integers(0, 30), log_prob, min_size=2, max_size=5)
    sequences = draw(st.lists(st.lists(position, min_size=1, max_size=8), min_size=1, max_size=4))
    return tuple(
        completion([max(at, key=at.__getitem__) for at in sequence], sequence, f"p{number}")
        for number, sequence in enumerate(sequences)
    )


def with_token(a: Completion, position: int, token: int, log_prob: float) -> Completion:
    """`a` as an engine would report it that chose `token` at `position`."""
    candidates = [dict(at) for at in a.candidates]
    candidates[position][token] = log_prob
    tokens = [*a.token_ids]
    tokens[position] = token
    return completion(tokens, candidates, a.prompt_id)


@given(completions())
def test_everything_equals_itself(a: tuple[Completion, ...]) -> None:
    assert check_bit_equal(a, a).verdict is Verdict.BIT_EQUAL
    assert check_token_equal(a, a).verdict is Verdict.TOKEN_EQUAL
    assert check_near_ties(a, a, QUIET).verdict is Verdict.TOKEN_EQUAL
    assert measure(a, a).max_abs_logprob_difference == 0.0


@given(completions(), completions())
def test_bit_and_token_equality_are_symmetric(
    a: tuple[Completion, ...], b: tuple[Completion, ...]
) -> None:
    for check in (check_bit_equal, check_token_equal):
        forth, back = check(a, b), check(b, a)
        assert forth.verdict == back.verdict
        places = [{(d.prompt_id, d.position) for d in r.differences} for r in (forth, back)]
        assert places[0] == places[1]


@given(completions(), completions())
def test_a_spread_has_the_same_counts_and_differences_either_way(
    a: tuple[Completion, ...], b: tuple[Completion, ...]
) -> None:
    forth, back = measure(a, b), measure(b, a)
    assert dataclasses.replace(back, max_margin=0.0, max_gap_shift=0.0) == dataclasses.replace(
        forth, max_margin=0.0, max_gap_shift=0.0
    )


@given(completions(), st.data())
def test_a_planted_token_is_found_where_it_was_planted(
    a: tuple[Completion, ...], data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, len(a) - 1))
    position = data.draw(st.integers(0, len(a[which].token_ids) - 1))
    b = list(a)
    b[which] = with_token(a[which], position, 99, -0.1)
    for report in (check_bit_equal(a, b), check_token_equal(a, b), check_near_ties(a, b, QUIET)):
        assert report.verdict is Verdict.DIFFERENT
        assert [(d.prompt_id, d.position) for d in report.differences] == [(f"p{which}", position)]
        assert report.num_unexplained == 1


@given(completions(), st.data())
def test_one_flipped_bit_of_one_log_prob_is_found(
    a: tuple[Completion, ...], data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, len(a) - 1))
    position = data.draw(st.integers(0, len(a[which].token_ids) - 1))
    scores = [dict(at) for at in a[which].candidates]
    token = data.draw(st.sampled_from(sorted(scores[position])))
    scores[position][token] = math.nextafter(scores[position][token], -math.inf)
    b = list(a)
    b[which] = completion(a[which].token_ids, scores, a[which].prompt_id)
    (difference,) = check_bit_equal(a, b).differences
    assert (difference.prompt_id, difference.position) == (f"p{which}", position)
    assert difference.kind is Kind.LOG_PROB
    assert check_token_equal(a, b).equal


@given(completions())
def test_json_loses_no_bit(a: tuple[Completion, ...]) -> None:
    back = [Completion.from_dict(json.loads(json.dumps(c.to_dict()))) for c in a]
    assert check_bit_equal(a, back).equal


def test_only_the_first_difference_of_a_sequence_counts() -> None:
    a, b = completion([1, 2, 3, 4]), completion([1, 9, 8, 7])
    report = check_token_equal([a], [b])
    assert [d.position for d in report.differences] == [1]
    assert report.spread.num_tokens == 2


def tie(margin: float, chosen: int, tokens: int = 50, name: str = "p") -> Completion:
    """Token 1 repeated, then token 1 or 2 with token 1 ahead by `margin`."""
    scores = [{1: -0.5, 2: -1.5}] * (tokens - 1) + [{1: -0.5, 2: -0.5 - margin}]
    return completion([1] * (tokens - 1) + [chosen], scores, name)


def test_a_difference_within_the_noise_is_a_near_tie() -> None:
    report = check_near_ties([tie(0.1, 1)], [tie(0.1, 2)], QUIET)
    assert report.verdict is Verdict.NEAR_TIES
    assert report.num_unexplained == 0
    assert report.differences[0].margin == pytest.approx(0.1)


def test_the_margin_is_measured_under_the_reference() -> None:
    """The other side may be sure of its token: that is the error, not the excuse."""
    report = check_near_ties([tie(3.0, 1)], [tie(0.0, 2)], QUIET)
    assert report.verdict is Verdict.DIFFERENT
    assert report.differences[0].margin == pytest.approx(3.0)


def test_a_gap_shift_seen_in_the_yardstick_widens_the_margin_but_no_more() -> None:
    assert check_near_ties([tie(0.19, 1)], [tie(0.19, 2)], QUIET).equal
    assert not check_near_ties([tie(0.21, 1)], [tie(0.21, 2)], QUIET).equal


def test_near_ties_that_are_too_frequent_fail() -> None:
    names = [f"p{number}" for number in range(20)]
    a = [tie(0.05, 1, 5, name) for name in names]
    b = [tie(0.05, 2, 5, name) for name in names]
    report = check_near_ties(a, b, QUIET)
    assert report.num_unexplained == 0
    assert report.verdict is Verdict.DIFFERENT
    assert "too many" in report.problems[0]


def test_a_drift_of_all_log_probs_fails_without_any_flip() -> None:
    b = completion([1] * 20, [{1: -0.6, 2: -1.1}] * 20)
    report = check_near_ties([completion([1] * 20)], [b], QUIET)
    assert not report.differences
    assert report.verdict is Verdict.DIFFERENT
    assert "drift" in report.problems[0]


def test_a_yardstick_without_noise_allows_exact_ties_only() -> None:
    silent = measure([completion([1, 1])], [completion([1, 1])])
    assert check_near_ties([tie(0.0, 1, 2)], [tie(0.0, 2, 2)], silent).equal
    assert not check_near_ties([tie(1e-6, 1, 2)], [tie(1e-6, 2, 2)], silent).equal


def test_an_early_end_is_no_near_tie() -> None:
    report = check_near_ties([completion([1, 1])], [completion([1])], QUIET)
    assert [d.kind for d in report.differences] == [Kind.LENGTH]
    assert report.verdict is Verdict.DIFFERENT


def test_a_missing_prompt_is_a_difference_for_every_check() -> None:
    a = [completion([1]), completion([1], name="q")]
    for report in (
        check_bit_equal(a, a[:1]),
        check_token_equal(a[:1], a),
        check_near_ties(a, a[:1], QUIET),
    ):
        assert [d.kind for d in report.differences] == [Kind.MISSING]
        assert not report.equal


def test_not_a_number_never_passes() -> None:
    bad = completion([1, 1], [{1: math.nan, 2: -1.0}] * 2)
    assert not check_bit_equal([completion([1, 1])], [bad]).equal
    assert not check_near_ties([completion([1, 1])], [bad], QUIET).equal
    with pytest.raises(MisuseError, match="not a number"):
        check_near_ties([bad], [bad], measure([completion([1, 1])], [bad]))


def test_forbidden_tokens_at_minus_infinity_are_no_difference() -> None:
    masked = completion([1], [{1: 0.0, 2: -math.inf}])
    assert check_near_ties([masked], [masked], QUIET).equal
    assert measure([masked], [masked]).max_abs_logprob_difference == 0.0


def test_an_empty_comparison_is_refused() -> None:
    with pytest.raises(MisuseError, match="always pass"):
        check_bit_equal([], [])


def test_two_completions_of_one_prompt_are_refused() -> None:
    with pytest.raises(MisuseError, match="own id"):
        check_bit_equal([completion([1])] * 2, [completion([1])])


def test_a_chosen_token_without_a_score_is_refused() -> None:
    with pytest.raises(MisuseError, match="not among its candidates"):
        Completion("p", (1,), (-0.1,), ({2: -0.1},))
    with pytest.raises(MisuseError, match="one of each"):
        Completion("p", (1,), (), ({1: -0.1},))


def test_a_report_explains_itself() -> None:
    a = [completion([1, 2], name=f"p{number}") for number in range(12)]
    b = [completion([1, 3], name=f"p{number}") for number in range(12)]
    report = check_token_equal(a, b)
    summary = report.summary()
    assert "12 sequences differ" in summary
    assert "p0 at 1: 2 -> 3 (margin 0.5; token)" in summary
    assert "... and 2 more" in summary
    assert json.loads(json.dumps(report.to_dict()))["num_unexplained"] == 12


def test_completions_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text(json.dumps({"completions": [completion([1, 2]).to_dict()]}))
    assert check_bit_equal(read_completions(file), [completion([1, 2])]).equal
