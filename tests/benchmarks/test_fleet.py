"""The fleet benchmark: a quick run of all policies, its tables, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from rich.console import Console

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.fleet_simulator.promises import ShareSummary
from xllm_plugin.errors import ConfigError, PlatformError
from xllm_plugin.service import cost

FOLDER = Path(__file__).parents[2] / "benchmarks" / "fleet"


def test_a_quick_run_compares_all_policies(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--quick", "--instances", "4", "--json", str(path)]
    done = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = schema.load(path)
    assert result.passed
    tables = {row.table for row in result.rows}
    assert {"What was aimed at", "Size", bench.CASES[0].name} <= tables
    first = [row for row in result.rows if row.table == bench.CASES[0].name]
    assert [row.labels["policy"] for row in first] == [*bench.OURS, *bench.PEERS]
    assert all(row.figure("TTFT p90").median > 0 for row in first)
    promised = [row for row in result.rows if row.table == bench.PROMISED[0].name]
    assert [row.labels["policy"] for row in promised] == list(bench.WITH_PROMISES)
    assert all(0 <= row.figure("interactive kept").median <= 100 for row in promised)
    assert bench.BLIND in {peer.name for peer in result.peers}


def test_the_lead_is_in_promises_kept_where_it_is_smallest(bench: ModuleType) -> None:
    case = bench.PROMISED[0]
    made = bench.Bench(4, 1, Console(quiet=True))
    kept = {bench.DEFAULT: 80, bench.BLIND: 70, "least-loaded": 85}
    for load in case.loads:
        for name, num_kept in kept.items():
            made.shares[case.name, load, name] = [
                {
                    "interactive": ShareSummary(100, num_kept, 1.0, 0.1, 2.0),
                    "offline": ShareSummary(100, 100, 9.0, 0.9, 9.0),
                }
            ]
    (ahead,) = bench.promised_aims(made, [case], list(kept))
    assert ahead.figure("found").median == pytest.approx(-5)
    (ahead,) = bench.promised_aims(made, [case], [bench.DEFAULT, bench.BLIND])
    assert ahead.figure("found").median == pytest.approx(10)


@pytest.mark.parametrize(
    "arguments", [("--policies", "magic"), ("--cases", "9"), ("--cases", "0"), ("--loads", "-1")]
)
def test_what_is_not_there_is_named(bench: ModuleType, arguments: tuple[str, str]) -> None:
    done = CliRunner().invoke(bench.command, arguments)
    assert isinstance(done.exception, ConfigError), done.output
    assert arguments[1] in str(done.exception)


def test_a_compiled_service_is_refused_at_start(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "is_compiled", lambda: True)
    done = CliRunner().invoke(bench.command, ["--quick"])
    assert isinstance(done.exception, PlatformError), done.output
    assert "compiled" in str(done.exception)


def test_other_weights_are_those_of_the_policy_itself(bench: ModuleType, tmp_path: Path) -> None:
    before = cost.OFFLINE_WEIGHT, cost.LATE_WEIGHT
    path = tmp_path / "weights.json"
    grid = f"{before[0]:g}:{before[1]:g},1:5,0.05:0"
    arguments = ["--quick", "--weights", grid, "--repeats", "1", "--json", str(path)]
    done = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    untold, ours, late, little = schema.load(path).rows
    assert "promise" in untold.labels["offline second"]
    assert ours.labels["late second"].endswith("(in force)")
    ends = [row.figure("offline, mean to its end") for row in (untold, ours, late, little)]
    assert len({end.median for end in ends if end is not None}) == 4, "each chooses otherwise"
    assert before == (cost.OFFLINE_WEIGHT, cost.LATE_WEIGHT)


@pytest.mark.parametrize("text", ["", "0.2", "a:0", "2:0", "0.2:-1", "0.2:inf", "nan:0"])
def test_weights_that_are_none(bench: ModuleType, text: str) -> None:
    done = CliRunner().invoke(bench.command, ["--weights", text])
    assert isinstance(done.exception, ConfigError), done.output
    assert "OFFLINE:LATE" in str(done.exception)


def test_the_readme_has_the_markers_and_the_weights_that_were_measured() -> None:
    text = (FOLDER / "README.md").read_text()
    assert readme.section(text, "fleet")
    result = schema.load(FOLDER / "weights.json")
    assert readme.section(text, result.name) == readme.render(result)
    assert result.passed
