"""The NPU family's answers against the CPU family's.

The judgement, on made-up answers; and (full) the real thing, one engine and one server a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.bench import readme, schema
from xllm_plugin.testing.cann import Emulator
from xllm_plugin.testing.equality import Completion, Verdict
from xllm_plugin.testing.float32 import InFloat32, without_expert_ties

FOLDER = Path(__file__).parents[2] / "benchmarks" / "npu_agreement"


def completions(*, flips: int = 0, gap: float = 0.25, shift: float = 0.0) -> list[Completion]:
    """Eight sequences of sixteen tokens; in the first `flips` the last is the second best one."""
    found = []
    for number in range(8):
        last = 2 if number < flips else 1
        scores = [*[{1: -0.5 + shift, 2: -2.0}] * 15, {1: -0.5 + shift, 2: -0.5 - gap}]
        tokens = (*[1] * 15, last)
        chosen = tuple(at[token] for token, at in zip(tokens, scores, strict=True))
        found.append(Completion(f"p{number}", tokens, chosen, tuple(scores)))
    return found


class MadeUp:
    """Answers without an engine."""

    def __init__(self, npu: Sequence[Completion]) -> None:
        self.npu = npu

    def in_float32(self, case: Any) -> InFloat32:
        return InFloat32(tuple(completions()), {})

    def on_cpu(self, case: Any) -> Sequence[Completion]:
        return completions(flips=1, shift=0.25)

    def served(
        self, case: Any, *, graphs: bool
    ) -> tuple[Sequence[Completion], Sequence[Completion]]:
        return (completions() if graphs else self.npu), completions()


def outcomes(bench: ModuleType, npu: Sequence[Completion]) -> dict[str, Any]:
    return {one.run: one for one in bench.run_case(bench.CASES[0], MadeUp(npu))}


def test_bfloat16_may_decide_as_often_as_it_does_on_the_cpu(bench: ModuleType) -> None:
    found = outcomes(bench, completions(flips=1, shift=0.1))
    assert found["eager"].report.verdict is Verdict.NEAR_TIES
    assert list(found) == ["CPU, bfloat16", "eager", "eager, cached", "graphs", "graphs, cached"]
    for run in ("eager, cached", "graphs", "graphs, cached"):
        assert found[run].report.verdict is Verdict.TOKEN_EQUAL
    assert found["CPU, bfloat16"].report is None
    figures = {one.name: one.median for one in bench.row(found["eager"]).figures}
    assert (figures["positions"], figures["agree"]) == (128, 127)


@pytest.mark.parametrize(
    ("npu", "gap"), [(completions(flips=1, gap=1.4), 1.4), (completions(shift=0.9), 0.25)]
)
def test_more_than_rounding_fails(bench: ModuleType, npu: list[Completion], gap: float) -> None:
    sides = MadeUp(npu)
    sides.in_float32 = lambda case: InFloat32(  # type: ignore[method-assign]
        tuple(completions(gap=gap)), {}
    )
    sides.on_cpu = lambda case: completions(gap=gap, shift=0.25)  # type: ignore[method-assign]
    found = {one.run: one for one in bench.run_case(bench.CASES[0], sides)}
    outcome = found["eager"]
    assert not bench.check(outcome, outcome.report).passed


def test_a_sequence_is_cut_where_experts_tie_and_nowhere_else() -> None:
    truth = completions(gap=9.0)
    flipped = completions(flips=2, gap=9.0)
    reference = InFloat32(tuple(truth), {"p0": frozenset({15}), "p1": frozenset({3})})
    expected, found, num_cut = without_expert_ties(reference, flipped)
    assert num_cut == 1
    assert [len(one.token_ids) for one in expected[:3]] == [15, 16, 16]
    assert [one.token_ids for one in expected] == [
        one.token_ids if at != 1 else truth[1].token_ids for at, one in enumerate(found)
    ]


def test_a_chats_log_probs_become_a_completion(bench: ModuleType) -> None:
    def entry(token: int, logprob: float, **more: Any) -> dict[str, Any]:
        return {"token": f"token_id:{token}", "logprob": logprob, **more}

    top = [entry(7, -0.1), entry(9, -3.0)]
    content = [entry(7, -0.1, top_logprobs=top), entry(5, -4.0, top_logprobs=top)]
    found = bench.completion_of_chat("p", {"logprobs": {"content": content}})
    assert found.token_ids == (7, 5)
    assert found.candidates == ({7: -0.1, 9: -3.0}, {7: -0.1, 9: -3.0, 5: -4.0})


def test_the_table_can_be_rendered(bench: ModuleType) -> None:
    found = outcomes(bench, completions()).values()
    run = schema.begin("npu_agreement", question=bench.QUESTION, command="xllm bench npu_agreement")
    result = run.finish(
        peers=bench.PEERS,
        rows=[bench.row(one) for one in found],
        checks=[bench.check(one, one.report) for one in found if one.report is not None],
    )
    assert result.passed
    assert "| tiny-llama | dense | graphs | token-equal | 128 | 128 | 0 |" in readme.render(result)


@pytest.mark.npu
@pytest.mark.e2e
@pytest.mark.full
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3-moe", "tiny-deepseek-v3", "smollm2"])
def test_models_answer_as_on_the_cpu(
    bench: ModuleType, emulator: Emulator, model: str, tmp_path: Path
) -> None:
    (case,) = [case for case in bench.CASES if case.name == model]
    sides = bench.RealSides(bench.device_environment(), tmp_path)
    for outcome in bench.run_case(case, sides):
        sys.stdout.write(f"\n{model}, {outcome.run}: {outcome.spread}\n")
        if outcome.report is not None:
            assert outcome.report.equal, outcome.report.summary()
