"""The benchmark of contiguous KV in small: the forms compute the same, its tables render."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.bench import readme, schema

FOLDER = Path(__file__).parents[2] / "benchmarks" / "xtensor_contiguous"


def measured(bench: ModuleType, between: float = 0.0, beside: float = 0.01) -> Any:
    times = {bench.SCATTERED: [10.0, 20.0], bench.IN_A_ROW: [9.0, 22.0], bench.TABLE_FREE: [5.0, 5]}
    return bench.Measured(bench.MODELS[0], 1024, 8, times, (between, beside))


@pytest.mark.engine
@pytest.mark.full  # imports vLLM and computes, 10 s
def test_all_forms_compute_the_same(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_PLATFORM", "native")
    monkeypatch.setattr(bench, "WORKING_SET_BYTES", 2**21)
    pytest.importorskip("vllm")
    ops, isa = bench.load_kernels()
    case = bench.Case(ops, isa, bench.MODELS[0], context=512, num_requests=2)
    assert case.num_layers == 3
    assert not case._tables[bench.SCATTERED].equal(case._tables[bench.IN_A_ROW])
    between, beside = case.differences()
    assert between == 0
    assert 0 < beside <= bench.TOLERANCE
    assert all(len(times) == 2 for times in bench.measure(case, 2).values())


@pytest.mark.parametrize(
    ("differences", "passed"), [((0.0, 0.01), [True, True]), ((1e-3, 0.03), [False, False])]
)
def test_forms_that_differ_fail_the_run(
    bench: ModuleType, differences: tuple[float, float], passed: list[bool]
) -> None:
    found = bench.checks([measured(bench), measured(bench, *differences)])
    assert [check.passed for check in found] == passed


def test_the_tables_can_be_rendered(bench: ModuleType) -> None:
    run = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench xtensor_contiguous")
    result = run.finish(rows=bench.rows([measured(bench)]), notes=bench.notes("vec"))
    text = readme.render(result)
    assert "SmolLM2-135M (9 heads, 3 of keys, size 64)" in text
    assert "| 1024 | 8 | 15 (10-20) | 15.5 (9-22) | 5 | 1 (0.900-1.10) |" in text


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "xtensor_contiguous")
