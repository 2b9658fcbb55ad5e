"""The router benchmark: its mock, its client and its tables, with the real service in between."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from click.testing import CliRunner

from xllm_plugin.bench import readme, schema
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "router"


def test_a_quick_run_of_ours_passes_its_checks(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--quick", "--seconds", "0.3", "--routers", bench.OURS, "--json", str(path)]
    done = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = schema.load(path)
    assert [check.passed for check in result.checks] == [True, True]
    assert len(result.rows) == 2 * len(bench.CASES)
    for row in result.rows:
        if row.labels["router"] == bench.OURS:
            assert row.figure("CPU").median > 0


def test_routers_that_are_not_here(bench: ModuleType, tmp_path: Path) -> None:
    done = CliRunner().invoke(bench.command, ["--routers", "envoy", "--peers-bin", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "installed are xllm service" in str(done.exception)


def test_ports_and_urls_are_filled_in(bench: ModuleType) -> None:
    router = bench.Router("r", "", ("r", "{URLS}", "--port={PORT}", "{INSTANCES}", "{SPARE}"))
    assert router.filled(1, 2, [3]) == [
        *("r", "http://127.0.0.1:3", "--port=1", "--instance", "http://127.0.0.1:3", "2")
    ]


def test_the_readme_has_the_markers() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "router")
