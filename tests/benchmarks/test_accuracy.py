"""The accuracy benchmark without an engine: its tasks load, and its comparison tells apart."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from xllm_plugin.bench.commands import beside

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"

bench, compare, sides = (beside(FOLDER, name) for name in ("bench", "compare", "sides"))
Kind = compare.Kind


def position(first: float = -0.5, second: float = -2.0, token: int = 7) -> dict[str, Any]:
    return {"token": token, "candidates": {"7": first, "8": second}}


def choice_item(number: int, logliks: list[float]) -> dict[str, Any]:
    """A question with as many choices as log-likelihoods, each of the same length."""
    return {
        "id": number,
        "answers": [[loglik, False] for loglik in logliks],
        "continuations": [" abcd"] * len(logliks),
        "positions": [[position()] for _ in logliks],
    }


def text_item(number: int, text: str, positions: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": number, "answers": [text], "continuations": ["{}"], "positions": [positions]}


def judge(
    reference: list[dict[str, Any]], other: list[dict[str, Any]], noisy: list[dict[str, Any]]
) -> Any:
    """Compare by the yardstick of `reference` against `noisy`."""
    native, xllm, again = (compare.read_items(items) for items in (reference, other, noisy))
    return compare.compare(native, xllm, compare.Noise.measure(native, again))


CHOICES = [choice_item(0, [-4.0, -6.0, -8.0]), choice_item(1, [-5.0, -5.05, -9.0])]


def moved(items: list[dict[str, Any]], number: int, choice: int, by: float) -> list[dict[str, Any]]:
    items = copy.deepcopy(items)
    items[number]["answers"][choice][0] += by
    return items


NOISY = moved(CHOICES, 0, 0, 0.1)


def test_the_same_answers_are_identical() -> None:
    outcome = judge(CHOICES, copy.deepcopy(CHOICES), NOISY)
    assert outcome.count(Kind.IDENTICAL) == 2
    assert outcome.problems == ()


def test_one_bit_is_not_identical() -> None:
    outcome = judge(CHOICES, moved(CHOICES, 0, 2, 1e-15), NOISY)
    assert [finding.kind for finding in outcome.findings] == [Kind.ROUNDING, Kind.IDENTICAL]


def test_a_larger_move_than_stock_makes_is_unexplained() -> None:
    outcome = judge(CHOICES, moved(CHOICES, 0, 0, -0.5), NOISY)
    assert outcome.findings[0].kind is Kind.UNEXPLAINED
    assert "moved by 0.5 nats" in outcome.problems[0]


def test_another_choice_at_a_small_margin_is_a_near_tie() -> None:
    outcome = judge(CHOICES, moved(CHOICES, 1, 1, 0.1), NOISY)
    assert outcome.findings[1].kind is Kind.NEAR_TIE
    assert "acc 0 -> 1" in outcome.findings[1].why
    assert outcome.problems == ()


def test_another_choice_at_a_large_margin_is_unexplained() -> None:
    outcome = judge(CHOICES, moved(CHOICES, 0, 1, 2.5), NOISY)
    assert outcome.findings[0].kind is Kind.UNEXPLAINED


def test_nothing_may_move_where_stock_does_not() -> None:
    outcome = judge(CHOICES, moved(CHOICES, 0, 0, 1e-6), copy.deepcopy(CHOICES))
    assert outcome.findings[0].kind is Kind.UNEXPLAINED


def test_not_a_number_is_unexplained() -> None:
    outcome = judge(CHOICES, moved(CHOICES, 0, 0, float("nan")), NOISY)
    assert outcome.findings[0].kind is Kind.UNEXPLAINED


def test_a_length_normalised_winner_is_judged_by_its_own_margin() -> None:
    item = choice_item(0, [-4.0, -9.0])
    item["continuations"] = [" ab", " abcdefgh"]  # -2.0 and -1.125 per character: 1 wins acc_norm
    other = moved([item], 0, 0, 1.8)  # -1.1: 0 wins, and acc is as before
    outcome = judge([item], other, moved([item], 0, 0, 0.95))
    assert outcome.findings[0].kind is Kind.UNEXPLAINED
    assert "acc_norm 1 -> 0" in outcome.findings[0].why


def test_a_greedy_flag_flips_only_at_a_near_tie() -> None:
    """LAMBADA: one choice, and the answer is whether the word is the likeliest."""
    sure = {**choice_item(0, [-0.5]), "answers": [[-0.5, True]], "positions": [[position()]]}
    lost = {
        **choice_item(0, [-0.6]),
        "answers": [[-0.6, False]],
        "positions": [[position(-0.6, -0.55, token=8)]],
    }
    noisy = {**sure, "answers": [[-0.6, True]], "positions": [[position(-0.6, -2.0)]]}
    assert judge([sure], [lost], [noisy]).findings[0].kind is Kind.UNEXPLAINED

    near = {**sure, "positions": [[position(-0.5, -0.55)]]}
    noisy = {**near, "answers": [[-0.6, True]], "positions": [[position(-0.6, -0.62)]]}
    shifted = {**noisy, "positions": [[position(-0.6, -0.4)]]}
    outcome = judge([near], [{**lost, "positions": [[position(-0.52, -0.5, token=8)]]}], [shifted])
    assert outcome.findings[0].kind is Kind.NEAR_TIE


def test_generated_text_differs_only_at_a_near_tie() -> None:
    reference = [text_item(0, "ab", [position(), position(-0.7, -0.71)])]
    noisy = [text_item(0, "ab", [position(), position(-0.7, -0.75)])]
    near = [text_item(0, "ac", [position(), position(-0.71, -0.7, token=8)])]
    far = [text_item(0, "cb", [position(-2.0, -0.5, token=8), position()])]
    assert judge(reference, copy.deepcopy(reference), noisy).count(Kind.IDENTICAL) == 1
    assert judge(reference, near, noisy).findings[0].kind is Kind.NEAR_TIE
    outcome = judge(reference, far, noisy)
    assert outcome.findings[0].kind is Kind.UNEXPLAINED
    assert "7 -> 8" in outcome.findings[0].why


def test_a_text_that_ends_early_is_unexplained() -> None:
    reference = [text_item(0, "ab", [position(), position()])]
    noisy = [text_item(0, "ab", [position(), position(-0.6, -2.0)])]
    outcome = judge(reference, [text_item(0, "a", [position()])], noisy)
    assert outcome.findings[0].kind is Kind.UNEXPLAINED


def test_runs_of_different_items_are_refused() -> None:
    with pytest.raises(compare.InternalError, match="different items"):
        judge(CHOICES, CHOICES[:1], NOISY)


def test_another_form_of_stock_is_asked_once_and_keeps_its_own_files() -> None:
    plan = sides.Plan(Path("/m"), {"xl_lambada": 1}, "bfloat16", eager=False, folder=Path())
    other = plan.other_form()
    assert other.eager
    assert other.passes("offline", "native") == {"main": 8}
    assert plan.title("offline", "native") == "offline-native"
    assert other.title("offline", "native") == "offline-native-other-form"


def passes(
    xllm: list[dict[str, Any]], native_eager: list[dict[str, Any]] | None = None
) -> list[Any]:
    """Both sides of one path, as `sides.run` returns them, compared."""

    def found(items: list[dict[str, Any]], acc: float) -> dict[str, Any]:
        return {"xl_arc_easy": {"scores": {"acc": acc}, "items": items}}

    native = {
        "main": found(CHOICES, 0.5),
        "repeat": found(CHOICES, 0.5),
        "other": found(NOISY, 0.5),
    }
    eager = {"main": found(native_eager, 0.5)} if native_eager else None
    results: list[Any] = bench.compare_path("offline", native, {"main": found(xllm, 0.25)}, eager)
    return results


def test_the_tables_show_a_planted_difference() -> None:
    results = passes(moved(CHOICES, 0, 1, 2.5))
    scores = list(bench.score_rows(results))
    assert scores[0].figure("change").median == -0.25
    rows = {row.labels["compared with native"]: row for row in bench.item_rows(results)}
    assert rows["native again"].figure("identical").median == 2
    assert rows["native, batch 1"].figure("rounding").median == 1
    assert rows["xllm"].figure("unexplained").median == 1
    assert [check.passed for check in bench.checks(results)] == [False]
    items = bench.details(results)["offline xl_arc_easy"]["xllm"]["items"]
    assert [item["id"] for item in items] == [0]
    json.dumps(bench.details(results))


def test_with_kernels_of_its_own_the_yardstick_is_the_wider_of_two() -> None:
    own_kernels = moved(CHOICES, 0, 0, 0.5)
    (alone,) = passes(own_kernels)
    (beside_eager,) = passes(own_kernels, native_eager=moved(CHOICES, 0, 0, 0.4))
    assert alone.xllm.count(Kind.UNEXPLAINED) == 1  # batches move stock by 0.1
    assert beside_eager.xllm.count(Kind.ROUNDING) == 1
    assert list(beside_eager.outcomes)[-2:] == ["native, eager", "xllm"]
    (near,) = passes(own_kernels, native_eager=moved(CHOICES, 0, 0, 0.01))
    assert near.xllm.count(Kind.UNEXPLAINED) == 1


def test_a_run_without_differences_passes_its_checks() -> None:
    results = passes(copy.deepcopy(CHOICES))
    assert [check.passed for check in bench.checks(results)] == [True]


def test_both_sides_differ_in_one_variable_alone(tmp_path: Path) -> None:
    plan = sides.Plan(tmp_path, {"xl_arc_easy": 1}, "bfloat16", True, tmp_path)
    for path in sides.PATHS:
        native, xllm = (sides.peer(plan, path, side) for side in sides.PLATFORMS)
        assert native.command == xllm.command
        assert native.environment | {"XLLM_PLATFORM": "xllm"} == xllm.environment


def test_costly_tasks_get_a_share_of_the_limit_and_never_nothing() -> None:
    limits = bench.limits_for((), 100)
    assert (limits["xl_arc_easy"], limits["xl_hellaswag"], limits["xl_gsm8k"]) == (100, 50, 20)
    assert bench.limits_for(("xl_gsm8k",), 1) == {"xl_gsm8k": 1}


def test_the_largest_limit_fits_the_data() -> None:
    files = {"xl_arc_easy": "arc_easy", "xl_lambada": "lambada", "xl_hellaswag": "hellaswag"}
    for task, most in bench.limits_for((), bench.MAX_LIMIT).items():
        data = FOLDER / "data" / f"{files.get(task, 'gsm8k')}.jsonl"
        assert most <= len(data.read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "xl_nothing"], "xl_nothing"),
        (["--limit", "0"], "1<=x<=400"),
        (["--limit", "401"], "1<=x<=400"),
        (["--path", "telnet"], "telnet"),
    ],
)
def test_misuse_ends_before_anything_starts(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench.command, arguments)
    assert result.exit_code == 2
    assert message in result.output


# In a child: lm-eval brings warnings of its own, and imports much.
PROMPTS = """
import json, sys
from xllm_plugin import shims
shims.install()
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[1], include_defaults=False).load(sys.argv[2:])["tasks"]
seen = {}
for name, task in tasks.items():
    task.build_all_requests(limit=2, rank=0, world_size=1)
    seen[name] = [[str(r.args[0]), str(r.args[1])] for r in task.instances]
json.dump(seen, open("seen.json", "w"))
"""


def test_lm_eval_loads_the_tasks_and_builds_their_prompts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install 'xllm-plugin[eval]'")
    subprocess.run(
        [sys.executable, "-c", PROMPTS, str(FOLDER / "tasks"), *bench.SHARES],
        check=True,
        cwd=tmp_path,
        env=sides.clean_environment({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}),
        timeout=300,
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: len(requests) for name, requests in seen.items()} == {
        "xl_arc_easy": 8,
        "xl_lambada": 2,
        "xl_hellaswag": 8,
        "xl_gsm8k": 2,
    }
    context, word = seen["xl_lambada"][0]
    first = json.loads((FOLDER / "data" / "lambada.jsonl").read_text().splitlines()[0])["text"]
    assert context + word == first
    problem = seen["xl_gsm8k"][0][0]
    assert problem.count("Question:") == 5
    assert problem.count("####") == 4
    assert problem.endswith("Answer:")
