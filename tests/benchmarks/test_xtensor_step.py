"""The cost of elastic memory in small: pairs, intervals, checks that can fail, tables."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.errors import InternalError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "xtensor_step"
PAUSE_S = 1e-6


@pytest.fixture(autouse=True)
def no_pauses(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE_S", PAUSE_S)


class FakeChild:
    """Answers each run with steps of `ms` milliseconds."""

    def __init__(self, bench: ModuleType, name: str, ms: float, asked: list[Any]) -> None:
        self._parts = bench.parts.PARTS
        self._name, self._ms, self._asked = name, ms, asked
        self._left: list[list[int]] = []
        self.turns = 0

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if job["do"] == "begin":
            self._asked.append((self._name, job))
            batch = len(job["prompts"])
            self._left = [[256] * batch] + [[1] * batch] * 4
            return {}
        self.turns += 1
        taken, self._left = self._left[: job["num_steps"]], self._left[job["num_steps"] :]
        times = dict.fromkeys(self._parts, 0.0) | {"forward": self._ms}
        steps = [{"tokens": tokens, "parts_ms": times} for tokens in taken]
        return {"steps": steps, "has_more": bool(self._left)}


def found(bench: ModuleType, elastic_ms: float, asked: list[Any] | None = None) -> Any:
    asked = [] if asked is None else asked
    times_ms = {"fixed": 10.0, "elastic": elastic_ms, "contiguous": 12.0}
    children = {name: FakeChild(bench, name, ms, asked) for name, ms in times_ms.items()}
    with Reporter(Console(quiet=True), 96, first="-") as reporter:
        starts = [
            bench.measure(
                {side: children[side] for side in ("fixed", memory)},
                range(100),
                (1, 8),
                range(2 * n, 2 * n + 2),
                reporter,
            )
            for n, memory in enumerate(bench.memories_of(8))
        ]
    return {batch: [times[batch] for times in starts] for batch in (1, 8)}


def test_all_of_a_round_get_the_same_prompts_and_no_two_rounds_do(bench: ModuleType) -> None:
    asked: list[Any] = []
    found(bench, 10.0, asked)
    jobs = [job for _, job in asked]
    assert all(job == jobs[n - n % 2] for n, job in enumerate(jobs))
    assert len({str(job["prompts"]) for job in jobs}) == 2 * 2 * len(bench.memories_of(8))
    names = [name for name, _ in asked]
    order = ["fixed", "elastic"]
    assert names[:8] == order * 2 + order[::-1] * 2
    assert names[-4:] == ["contiguous", "fixed"] * 2


def test_of_two_engines_each_is_started_first_as_often(bench: ModuleType) -> None:
    for memory, num_starts in (("elastic", bench.STARTS), ("contiguous", bench.CONTIGUOUS_STARTS)):
        firsts = [bench.in_turn(memory, number)[0] for number in range(num_starts)]
        assert firsts.count(memory) == firsts.count("fixed") == num_starts / 2
    assert bench.ROUNDS % 2 == 0, "within a start, too"


def test_a_start_is_about_one_memory_most_are_about_the_elastic_one(bench: ModuleType) -> None:
    assert bench.memories_of(1) == ["elastic", "contiguous"]
    assert bench.memories_of(6) == ["elastic"] * 6 + ["contiguous"] * 2


def test_of_a_start_counts_the_median_of_its_rounds(bench: ModuleType) -> None:
    times = bench.Times()
    times.step_ms = {"fixed": [10.0, 20.0, 10.0], "elastic": [30.0, 20.0, 11.0], "contiguous": []}
    assert bench.ratios([times], "step_ms", "elastic") == [pytest.approx(1.1)]


def test_the_luck_of_a_start_is_within_the_interval(bench: ModuleType) -> None:
    lucky = [0.98, 0.99, 1.0, 1.0, 1.01, 1.01, 1.02, 1.02]
    low, high = bench.ratio_interval(lucky)
    assert 0.985 < low < 1.0 < high < 1.02


def test_the_engines_take_turns_within_a_run(bench: ModuleType) -> None:
    asked: list[Any] = []
    children = {name: FakeChild(bench, name, 10.0, asked) for name in bench.MEMORIES}
    pauses_s: list[float] = []
    job = bench.run_job(range(100), 8, 0)
    steps = bench.take_turns(children, job, bench.MEMORIES, pauses_s.append)
    assert [child.turns for child in children.values()] == [5, 5, 5]  # five steps, one a turn
    assert [len(taken) for taken in steps.values()] == [5, 5, 5]
    assert pauses_s == [PAUSE_S] * 15


@pytest.mark.parametrize(("elastic_ms", "passed"), [(10.1, True), (10.3, False), (9.7, False)])
def test_a_step_that_costs_more_fails_the_run(
    bench: ModuleType, elastic_ms: float, passed: bool
) -> None:
    outcome = bench.checks(found(bench, elastic_ms), is_quick=False)
    assert [check.passed for check in outcome] == [passed, passed]
    assert bench.checks(found(bench, elastic_ms), is_quick=True) == []


def test_the_tables_can_be_rendered(bench: ModuleType, tmp_path: Path) -> None:
    run = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench xtensor_step")
    result = run.finish(
        peers=[bench.peer(memory) for memory in bench.MEMORIES],
        rows=bench.rows(found(bench, 10.1)),
        notes=bench.notes(tmp_path, 8),
    )
    text = readme.render(result)
    assert "| 8 | elastic | 10.1 | 1.01 | 1.01 | 1.01 |" in text
    assert "| 8 | contiguous | 60 | 1.20 |" in text


def test_an_engine_with_the_other_memory_is_refused(bench: ModuleType) -> None:
    bench.require("elastic", {"block_pool": "ElasticBlockPool"})
    with pytest.raises(InternalError, match="asked for elastic KV memory"):
        bench.require("elastic", {"block_pool": "BlockPool"})


def test_the_sides_differ_in_one_setting(bench: ModuleType) -> None:
    fixed, elastic, contiguous = (bench.environment(memory) for memory in bench.MEMORIES)
    assert set(fixed.items()) ^ set(elastic.items()) == {
        ("XLLM_XTENSOR__ENABLED", "0"),
        ("XLLM_XTENSOR__ENABLED", "1"),
    }
    assert set(elastic.items()) ^ set(contiguous.items()) == {("XLLM_XTENSOR__FORM", "contiguous")}


def test_a_run_without_a_step_of_the_whole_batch_is_our_bug(bench: ModuleType) -> None:
    with pytest.raises(InternalError, match="please report"):
        bench.Times().record("fixed", 8, [])


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "xtensor_step")
