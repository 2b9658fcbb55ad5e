"""The benchmark of the prefix index: a quick run, and that what it fills is what it weighs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from click.testing import CliRunner

from xllm_plugin.bench import readme, schema

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kv_index"


def test_a_quick_run(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = CliRunner().invoke(bench.command, ["--quick", "--json", str(path)])
    assert done.exit_code in (0, 1), done.output  # 1: slower than it should be, at this moment
    result = schema.load(path)
    assert {row.table for row in result.rows} == {
        *("Lookup of 100,000 tokens", "Events", "Memory"),
        "A new chat of 8,000 characters, about 2,000 tokens",
    }
    assert all(figure.median > 0 for row in result.rows for figure in row.figures)
    assert len(result.checks) == 2 * len(bench.INSTANCES_QUICK)


def test_instances_share_keys_and_sets_of_holders(bench: ModuleType) -> None:
    index = bench.filled(3, 200)
    index.check_integrity()
    assert len(index) == 200
    alone, shared = (bench.memory_row(count, 500).figures[0].median for count in (1, 4))
    assert shared < alone


def test_the_readme_has_the_markers() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "kv_index") is not None
