"""What users read is checked against what the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from xllm_plugin import hookspecs
from xllm_plugin.cli import COMMANDS
from xllm_plugin.config import BOOTSTRAP_ENV, load_config, settings_with_origin
from xllm_plugin.selection import REASON_ENV

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_setting_is_in_the_readme() -> None:
    """A setting without a line in README's table is one that nobody can find."""
    load_config(environ={})
    for setting in settings_with_origin(environ={}):
        assert f"`{setting.name}`" in read("README.md")
        variable = "XLLM_" + setting.name.upper().replace(".", "__")
        assert f"`{variable}`" in read("README.md")


def test_every_bootstrap_variable_is_in_the_readme() -> None:
    for name in BOOTSTRAP_ENV - {REASON_ENV}:
        assert name in read("README.md")


def test_every_hook_is_in_the_contributing_guide() -> None:
    hooks = [
        name
        for name, value in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(value, f"{hookspecs.PROJECT}_spec")
    ]
    assert hooks
    for name in hooks:
        assert f"| `{name}` |" in read("CONTRIBUTING.md")


def test_every_command_is_in_the_readme() -> None:
    for name in COMMANDS:
        assert f"xllm {name}" in read("README.md")


def test_every_folder_is_in_the_architecture() -> None:
    for folder in (ROOT / "xllm_plugin").iterdir():
        if (folder / "__init__.py").is_file():
            assert f"`{folder.name}/`" in read("ARCHITECTURE.md"), folder.name


def test_every_benchmark_is_in_the_readme() -> None:
    for bench in (ROOT / "benchmarks").glob("*/bench.py"):
        assert f"benchmarks/{bench.parent.name}/README.md" in read("README.md")


def test_links_between_documents_lead_somewhere() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", read(name)):
            assert (ROOT / target).exists(), f"{name} -> {target}"


def test_the_comparison_has_the_number_of_lines_of_the_npu_family() -> None:
    files = (ROOT / "xllm_plugin" / "npu").rglob("*.py")
    num_lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    rows = read("README.md").splitlines()
    (row,) = [row for row in rows if row.startswith("| lines of Python for the device")]
    assert f"| about {round(num_lines, -2):,} |" in row
