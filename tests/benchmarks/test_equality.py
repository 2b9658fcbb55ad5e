"""The equality benchmark's judgement, with completions made up instead of engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.bench import readme, schema
from xllm_plugin.testing.equality import Completion, Verdict

FOLDER = Path(__file__).parents[2] / "benchmarks" / "equality"


def completions(*, flips: int = 0, gap: float = 0.0, num: int = 20) -> list[Completion]:
    """Twenty sequences of thirty tokens; in the first `flips` the last token is the other one."""
    found = []
    for number in range(num):
        last = 2 if number < flips else 1
        scores = [*[{1: -0.5, 2: -2.0}] * 29, {1: -0.5, 2: -0.5 - gap}]
        tokens = (*[1] * 29, last)
        chosen = tuple(at[token] for token, at in zip(tokens, scores, strict=True))
        found.append(Completion(f"p{number}", tokens, chosen, tuple(scores)))
    return found


def outcomes(
    bench: ModuleType, answers: dict[tuple[str, int], Sequence[Completion]], **options: Any
) -> dict[str, Any]:
    case = replace(bench.CASES[0], **options)
    found = bench.run_case(case, lambda side, max_num_seqs: answers[side, max_num_seqs])
    return {outcome.comparison: outcome for outcome in found}


def test_an_equal_engine_passes_with_its_own_rounding_at_other_batches(bench: ModuleType) -> None:
    same, flipped = completions(), completions(flips=3)
    answers = {("stock", 64): same, ("xllm", 64): same}
    answers |= {("stock", 1): flipped, ("xllm", 1): flipped}
    found = outcomes(bench, answers)
    assert found["same batches"].report.verdict is Verdict.BIT_EQUAL
    assert found["other batches"].report.verdict is Verdict.NEAR_TIES
    assert not found["stock itself"].judged
    assert all(bench.check(outcome).passed for outcome in found.values() if outcome.judged)


def test_a_wrong_token_fails(bench: ModuleType) -> None:
    same, wrong = completions(gap=3.0), completions(flips=1, gap=3.0)
    answers = {("stock", 64): same, ("xllm", 64): wrong}
    answers |= {("stock", 1): same, ("xllm", 1): wrong}
    found = outcomes(bench, answers)
    for comparison in ("same batches", "same batches, narrow", "other batches"):
        assert not bench.check(found[comparison]).passed
        assert found[comparison].report.num_unexplained == 1


def test_in_float32_even_an_exact_tie_fails(bench: ModuleType) -> None:
    same, flipped = completions(), completions(flips=1)
    answers = {("stock", 64): same, ("xllm", 64): same, ("stock", 1): same, ("xllm", 1): flipped}
    found = outcomes(bench, answers, dtype="float32")
    assert not bench.check(found["other batches"]).passed


def test_native_layers_may_differ_as_stock_does_from_itself(bench: ModuleType) -> None:
    same, flipped = completions(), completions(flips=3)
    answers = {("stock", 64): same, ("stock", 1): flipped, ("xllm", 64): flipped}
    found = outcomes(bench, answers, native_layers=True)
    assert set(found) == {"native layers", "stock itself"}
    assert found["native layers"].report.verdict is Verdict.NEAR_TIES
    sure, wrong = completions(gap=3.0), completions(flips=1, gap=3.0)
    answers = {("stock", 64): sure, ("stock", 1): sure, ("xllm", 64): wrong}
    found = outcomes(bench, answers, native_layers=True)
    assert not bench.check(found["native layers"]).passed


def test_only_native_layers_leave_stock_s_form(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "prepare", Path)
    for case in bench.CASES:
        stock, xllm = (
            case.settings(side, max_num_seqs=1, num_prompts=1) for side in ("stock", "xllm")
        )
        assert (stock.eager == xllm.eager) is not case.native_layers


def test_the_table_can_be_rendered(bench: ModuleType) -> None:
    same = completions()
    found = outcomes(bench, {("stock", 64): same, ("xllm", 64): same}, other_batches=False)
    run = schema.begin("equality", question=bench.QUESTION, command="xllm bench equality")
    result = run.finish(
        peers=bench.PEERS,
        rows=[bench.row(outcome) for outcome in found.values()],
        checks=[bench.check(outcome) for outcome in found.values()],
    )
    assert result.passed
    assert "| smollm2 | dense | same batches | bit-equal | 20 | 600 | 0 | 0 |" in readme.render(
        result
    )


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "equality")
