"""What a wheel compiles (`make wheel`): rules that its compiler does not check, or too late."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOOK = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["mypyc"]
COMPILED = [ROOT / name.lstrip("/") for name in HOOK["include"]]
MAKES_ITS_CLASSES = {"Struct", "BaseModel", "BaseSettings"}
WITH_HOOKS = {"Histogram"}
"""Told to another process in a form of their own (`processes/messages.py`)."""


def name_of(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.stem)
def test_a_compiled_module_has_only_classes_that_can_be(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            assert not MAKES_ITS_CLASSES & {name_of(base) for base in node.bases}, node.name
            frozen = [
                keyword
                for decorator in node.decorator_list
                if isinstance(decorator, ast.Call)
                for keyword in decorator.keywords
                if keyword.arg == "frozen"
            ]
            assert not frozen, f"{node.name}: cannot be made by modules that are not compiled"
        elif isinstance(node, ast.FunctionDef):
            assert "hookimpl" not in {name_of(each) for each in node.decorator_list}, node.name


def test_what_processes_tell_each_other_is_not_compiled() -> None:
    """A decoder reads annotations, of which compiled classes keep only the outermost type."""
    compiled = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in COMPILED}
    messages = ROOT / "xllm_plugin" / "service" / "processes" / "messages.py"
    told = {
        alias.name
        for node in ast.parse(messages.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module in compiled
        for alias in node.names
    }
    assert told == WITH_HOOKS
