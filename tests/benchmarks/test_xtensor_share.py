"""The benchmark of a shared budget in small: what is counted, checks that can fail, tables."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.promises import Outcome
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import NotNowError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "xtensor_share"

METRICS = """\
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 5.0
# TYPE vllm:request_num_preemptions histogram
vllm:request_num_preemptions_bucket{engine="0",le="0.5"} 7.0
vllm:request_num_preemptions_bucket{engine="0",le="1.0"} 9.0
vllm:request_num_preemptions_bucket{engine="0",le="+Inf"} 10.0
vllm:request_num_preemptions_count{engine="0"} 10.0
vllm:request_num_preemptions_sum{engine="0"} 5.0
"""


def make_plan(bench: ModuleType, tmp_path: Path, budget_bytes: int = 2**30) -> Any:
    return bench.Plan(
        model=tmp_path,
        vocabulary=Vocabulary(500),
        budget_bytes=budget_bytes,
        sizes=(2, 4),
        rounds=1,
        repeats=1,
        logs=tmp_path,
    )


def burst(bench: ModuleType, size: int, preempted: int = 0, *, short: int = 0) -> Any:
    """A burst of which some were preempted and some came without all their tokens."""
    outcomes = tuple(
        Outcome(
            trace="",
            due_s=0.0,
            prompt_tokens=3,
            output_tokens=9,
            first_s=0.1,
            last_s=4.0 + at,
            received_tokens=9 - (at < short),
            status=200,
        )
        for at in range(size)
    )
    probes = 1
    counted = bench.Counted(size + probes, size + probes - preempted, 2 * preempted)
    return bench.Burst(outcomes, counted)


def found(bench: ModuleType, shared: int, split: int, **kinds: Any) -> Any:
    """Bursts of two sizes; so many of the larger ones preempted."""
    return {
        side: {2: [burst(bench, 2)], 4: [burst(bench, 4, preempted, **kinds)]}
        for side, preempted in (("shared", shared), ("split", split))
    }


def test_requests_that_were_never_preempted_have_a_bucket_of_their_own(bench: ModuleType) -> None:
    counted = bench.Counted.of_metrics(METRICS)
    assert (counted.requests, counted.not_preempted, counted.preemptions) == (10, 7, 5)
    assert counted.since(bench.Counted(4, 3, 1)) == bench.Counted(6, 4, 4)
    with pytest.raises(NotNowError, match=r"lacks vllm:request_num_preemptions_bucket"):
        bench.Counted.of_metrics(METRICS.replace('le="0.5"', 'le="2"'))


def test_the_client_s_own_requests_do_not_count(bench: ModuleType) -> None:
    one = burst(bench, 4, preempted=1)
    assert (one.num_whole, one.num_undisturbed, one.duration_s) == (4, 3, 7.0)
    assert burst(bench, 4, short=2).num_undisturbed == 2


def test_both_sides_have_the_same_memory_and_the_same_requests(
    bench: ModuleType, tmp_path: Path
) -> None:
    shared = bench.peers("shared", "/m", 1000, "p")
    split = bench.peers("split", "/m", 1000, "p")
    assert list(shared) == list(split) == ["first", "second"]
    sizes = [
        [peer.command[peer.command.index("--kv-cache-memory-bytes") + 1] for peer in side.values()]
        for side in (shared, split)
    ]
    assert sizes == [["1000", "1000"], ["500", "500"]]
    assert all(peer.environment["XLLM_XTENSOR__POOL_BYTES"] == "1000" for peer in shared.values())
    assert not any("XTENSOR" in name for peer in split.values() for name in peer.environment)
    plan = make_plan(bench, tmp_path)
    assert plan.burst(4, "a") == plan.burst(4, "a") != plan.burst(4, "b")
    assert [one.due_s for one in plan.burst(4, "a")] == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(("split", "passed"), [(2, True), (1, False)])
def test_sharing_has_to_serve_more_of_the_larger_bursts(
    bench: ModuleType, tmp_path: Path, split: int, passed: bool
) -> None:
    plan = make_plan(bench, tmp_path)
    whole, budget, ratio = bench.checks(plan, found(bench, 0, split), [5, 7])
    assert (whole.passed, budget.passed, ratio.passed) == (True, True, passed)
    assert f"4 and {4 - split}" in ratio.detail


def test_no_undisturbed_request_at_all_is_not_more(bench: ModuleType, tmp_path: Path) -> None:
    *_, ratio = bench.checks(make_plan(bench, tmp_path), found(bench, 4, 4), [5])
    assert (ratio.passed, ratio.detail) == (False, "0 and 0")


def test_an_overdrawn_pool_and_an_answer_cut_short_fail_the_run(
    bench: ModuleType, tmp_path: Path
) -> None:
    plan = make_plan(bench, tmp_path, budget_bytes=2**20)
    whole, budget, _ = bench.checks(plan, found(bench, 0, 3, short=1), [2**20, 4 * 2**20])
    assert (whole.passed, whole.detail) == (False, "10 of 12")
    assert not budget.passed


def test_the_tables_can_be_rendered(bench: ModuleType, tmp_path: Path) -> None:
    run = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench xtensor_share")
    plan = make_plan(bench, tmp_path)
    bursts = found(bench, 0, 2)
    result = run.finish(
        peers=[peer.record("/m") for peer in bench.peers("shared", "/m", 1000, "p").values()],
        rows=bench.rows(bursts, plan.sizes),
        checks=bench.checks(plan, bursts, [1]),
        notes=bench.notes(plan),
        not_shown=bench.NOT_SHOWN,
    )
    text = readme.render(result)
    assert "**Bursts of 4 requests**" in text
    assert "| split | 2 | 4 | 7 | 100 |" in text


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "xtensor_share")
