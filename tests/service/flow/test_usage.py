"""Tokens that an answer has used: said, counted, or estimated."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_plugin.service.decision import Sent
from xllm_plugin.service.flow.usage import UsageMeter

pytestmark = pytest.mark.looks_inside


class Ended:
    """What a meter reads of an exchange that has ended."""

    def __init__(self, status: int = 200, sent_s: float = 1.0, counted: int = 0) -> None:
        self.status = status
        self.sent_s = sent_s
        self.sent = Sent(counted or 9999, is_exact=bool(counted))
        self.stream: Any = None


def used(ended: Ended, *parts: bytes, prompt_tokens: int = 100) -> int:
    meter = UsageMeter()
    for part in parts:
        meter.observe(part)
    return meter.num_tokens(ended, prompt_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "tokens"),
    [
        ((b'{"choices":[],"usage":{"prompt_tokens":5,"total_tokens":7,"x":{}}}',), 7),
        ((b'{"usage":{"prompt_tokens":5,"total', b'_tokens" : 19, "x":1}}'), 19),
        ((b'data: {"usage":{"total_tokens":8}}\n\n', b'data: {"usage":{"total_tokens":9}}\n\n'), 9),
        ((b'{"usage":{"input_tokens":3,"output_tokens":4}}',), 7),
        ((b'{"usage":{"total_tokens":7},"prompt_token_ids":[' + b"1," * 3000, b"1]}"), 7),
        ((b'{"text":"\\"total_tokens\\": 1"}',), 100),
        ((b"data: a\n\n", b"data: b\n\ndata: [DONE]\n\n"), 103),
        ((), 100),
    ],
)
def test_what_an_answer_says_counts_and_else_its_events(
    parts: tuple[bytes, ...], tokens: int
) -> None:
    assert used(Ended(), *parts) == tokens


def test_a_prompt_that_was_counted_is_not_estimated() -> None:
    assert used(Ended(counted=12), b"data: a\n\n") == 13


def test_errors_use_nothing_and_who_leaves_early_pays_for_the_prompt() -> None:
    assert used(Ended(503), b"{}") == 0
    assert used(Ended(400), b'{"total_tokens":5}') == 0
    assert used(Ended(499)) == 100
    assert used(Ended(499, sent_s=0.0)) == 0
