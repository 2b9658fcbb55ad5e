"""The fleet benchmark: a quick run of all policies, its tables, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from rich.console import Console

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.fleet_simulator.promises import ShareSummary
from xllm_plugin.errors import ConfigError

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


def test_the_readme_has_the_markers() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "fleet")
