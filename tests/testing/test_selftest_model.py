"""How the self-test judges a model's answers, on made-up ones."""

from __future__ import annotations

import pytest

from xllm_plugin.testing.collect import Collection, Settings
from xllm_plugin.testing.equality import Completion
from xllm_plugin.testing.selftest import Check
from xllm_plugin.testing.selftest_model import judge


def completion(last: int, *, other: float = -0.7, shift: float = 0.0) -> Completion:
    """Two tokens; the second is 1 (-0.6), 2 (`other`) or one that the other side does not list."""
    scores = ({1: -0.5 + shift}, {1: -0.6 + shift, 2: other + shift})
    scores[1].setdefault(last, other + shift)
    return Completion("p", (1, last), (scores[0][1], scores[1][last]), scores)


def judged(found: Completion, expected: Completion) -> list[Check]:
    collection = Collection(
        (found,), Settings("a model"), "a platform", "0.32", 1, 0, start_s=1.0, generate_s=0.5
    )
    return list(judge((expected,), collection))


def test_a_near_tie_passes_and_the_time_of_a_token_is_told() -> None:
    tokens, scores = judged(completion(2), completion(1))
    assert tokens.passed
    assert scores.passed
    assert tokens.what.startswith("1 of 2 tokens as in float32")
    assert tokens.error == pytest.approx(0.1)
    assert tokens.time_us == 0.25e6


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(completion(2), completion(1, other=-2.0), id="likelier by far"),
        pytest.param(completion(3), completion(1), id="not among the candidates"),
    ],
)
def test_another_token_fails(found: Completion, expected: Completion) -> None:
    tokens, _ = judged(found, expected)
    assert not tokens.passed


def test_log_probs_that_have_moved_fail() -> None:
    tokens, scores = judged(completion(1, shift=0.3), completion(1))
    assert tokens.passed
    assert not scores.passed
