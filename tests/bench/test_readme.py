"""READMEs show exactly what the committed result files say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.schema import Figure, Result, Row
from xllm_plugin.cli.bench import benchmarks_folder
from xllm_plugin.errors import ConfigError

MakeResult = Callable[..., Result]
FOLDERS = sorted(path.parent for path in benchmarks_folder().glob("*/bench.py"))
OPENING, CLOSING = readme.markers("serving")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_published_tables_are_what_the_results_render_to(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    shown = readme.section(text, folder.name)
    if not (folder / "result.json").exists():
        assert shown == readme.PLACEHOLDER
        return
    result = schema.load(folder / "result.json")
    assert shown == readme.render(result)
    assert result.name == folder.name
    assert result.passed


def test_rendering(make_result: MakeResult) -> None:
    text = readme.render(make_result())
    assert "| peer | rate, tok/s |\n| --- | --: |\n| stock | 11.2 (10-12.5) |" in text
    assert "Median (minimum-maximum) of 3 repeats." in text
    assert "`xllm bench serving`, 2026-01-02 03:04 UTC, 2 min, commit 0123456789ab." in text
    assert "* **stock**: vLLM<br>`python -m 'x y'`" in text
    assert "* equal: passed (8 of 8)" in text
    assert "What it does not show:\n* a limit" in text
    assert "do not count" not in text


def test_a_failed_check_is_the_first_thing_said(make_result: MakeResult) -> None:
    text = readme.render(make_result(passed=False))
    assert text.startswith("**A check failed: the figures below do not count.**")
    assert "* equal: **FAILED**" in text


def test_rows_without_a_figure_show_a_dash(make_result: MakeResult) -> None:
    extra = Row(table="Speed", labels={"peer": "a|b"}, figures=(Figure.of("time", "s", [2.0]),))
    result = make_result()
    text = readme.render(result.model_copy(update={"rows": (*result.rows, extra)}))
    assert "| stock | 11.2 (10-12.5) | - |\n| a\\|b | - | 2 |" in text


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([3.0], "3"),
        ([1234.5], "1234"),
        ([12.34], "12.3"),
        ([1.234], "1.23"),
        ([0.1234], "0.123"),
        ([0.01234], "0.012"),
        ([0.0], "0"),
        ([1.0, 1.001, 1.002], "1.00 (1-1.00)"),
        ([1.5, 2.5, 3.5], "2.50 (1.50-3.50)"),
    ],
)
def test_numbers(values: list[float], shown: str) -> None:
    assert readme.format_figure(Figure.of("x", "", values)) == shown


def test_publish_touches_only_the_section(tmp_path: Path, make_result: MakeResult) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n\n{OPENING}\nold\n{CLOSING}\n\nend\n")
    written = readme.publish(make_result(), tmp_path / "result.json")
    text = page.read_text()
    assert written == [tmp_path / "result.json", page]
    assert text.startswith(f"# Title\n\n{OPENING}\n")
    assert text.endswith(f"{CLOSING}\n\nend\n")
    assert readme.section(text, "serving") == readme.render(make_result())
    assert readme.replace(text, make_result()) == text


def test_publish_leaves_foreign_readmes_alone(tmp_path: Path, make_result: MakeResult) -> None:
    page = tmp_path / "README.md"
    page.write_text("mine\n")
    assert readme.publish(make_result(), tmp_path / "r.json") == [tmp_path / "r.json"]
    assert page.read_text() == "mine\n"


@pytest.mark.parametrize(
    "text", ["", OPENING, f"{CLOSING}\n{OPENING}", f"{OPENING}\n{OPENING}\n{CLOSING}"]
)
def test_damaged_markers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="exactly one line"):
        readme.section(text, "serving")
