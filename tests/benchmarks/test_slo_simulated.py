"""The planner keeps more promises than any static form, on a simulated machine."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.promises import Promise
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "slo_simulated"

PROMISE = Promise(1000, 50)
RATE = 4.2
"""Requests a second that the planner sustains."""
STATIC_RATE = RATE / 1.5


def kept(bench: ModuleType, side: str, rate: float) -> float:
    found: float = bench.attainment(side, rate, PROMISE, bench.Setting(seeds=6, noise=0.08))
    return found


def test_the_planner_sustains_a_rate(bench: ModuleType) -> None:
    assert kept(bench, "slo", RATE) >= bench.GOAL


@pytest.mark.parametrize("side", ["fcfs", "fcfs-256", "fcfs-64", "priority"])
def test_no_static_form_sustains_two_thirds_of_it(bench: ModuleType, side: str) -> None:
    assert kept(bench, side, STATIC_RATE) < bench.GOAL


def test_a_search_finds_what_a_side_sustains(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sustained = {"fcfs": 2.0, "priority": 3.0, "slo": 6.0}
    monkeypatch.setattr(
        bench, "attainment", lambda name, rate, *_: 1.0 if rate <= sustained[name] else 0.0
    )
    path = tmp_path / "result.json"
    arguments = ["--quick", "--sides", ",".join(sustained), "--json", str(path)]
    done = CliRunner().invoke(bench.command, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    (row,) = schema.load(path).rows
    assert row.labels == {"promise, ms": "1000/50"}
    found = {figure.name: figure.median for figure in row.figures}
    for side, rate in sustained.items():
        assert found[side] == pytest.approx(rate, rel=0.12)  # a rung of the ladder
    assert found["times the best static"] == found["slo"] / found["priority"]


@pytest.mark.parametrize("sides", ["", "fcfs,best"])
def test_a_side_that_is_not_there(bench: ModuleType, sides: str) -> None:
    done = CliRunner().invoke(bench.command, ["--sides", sides])
    assert isinstance(done.exception, ConfigError)
    assert "choose from fcfs, fcfs-256, fcfs-64, priority, slo" in str(done.exception)


def test_the_readme_has_the_markers() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "slo_simulated")
