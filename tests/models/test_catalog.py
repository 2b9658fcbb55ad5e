"""Every row of the catalogue is complete, and a mistyped name is helped."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import xllm_plugin.models
from xllm_plugin.errors import ModelError
from xllm_plugin.models.catalog import CATALOG, Recipe, Wheel, find_recipe

RECIPES = pytest.mark.parametrize("recipe", CATALOG.values(), ids=CATALOG)


def test_names() -> None:
    assert next(iter(CATALOG)) == "smollm2"
    assert {"tiny-llama", "tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-deepseek-v3"} <= set(CATALOG)
    assert {"tiny-llava", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "smollm2-moe"} <= set(CATALOG)


@RECIPES
def test_every_recipe_has_a_source_and_says_what_it_is(recipe: Recipe) -> None:
    assert recipe.gguf is not None or recipe.requires
    assert recipe.summary
    assert recipe.licence
    assert recipe.size_bytes > 1_000_000
    assert re.fullmatch(r"[a-z0-9.-]+", recipe.name)


@RECIPES
def test_every_requirement_comes_earlier(recipe: Recipe) -> None:
    """So that there are no cycles, and locks are taken in one order."""
    names = list(CATALOG)
    assert all(names.index(needed) < names.index(recipe.name) for needed in recipe.requires)


@RECIPES
def test_every_builder_exists(recipe: Recipe) -> None:
    """Read rather than imported: some builders need torch."""
    module, function = recipe.builder.split(":")
    package = Path(xllm_plugin.models.__file__).parent
    tree = ast.parse((package / f"{module.rsplit('.', 1)[1]}.py").read_text("utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@RECIPES
def test_every_wheel_is_pinned(recipe: Recipe) -> None:
    pieces = recipe.gguf.pieces if recipe.gguf else ()
    for wheel, _ in pieces:
        assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
        assert re.fullmatch(r"\d+(\.\d+)+", wheel.version)


def test_wheel_file_name() -> None:
    assert Wheel("a-b", "1.2", "").file_name == "a_b-1.2-py3-none-any.whl"


def test_unknown_name_lists_all_and_suggests_one() -> None:
    with pytest.raises(ModelError, match=r"'smolm2'.*Did you mean 'smollm2'") as raised:
        find_recipe("smolm2")
    assert all(name in str(raised.value) for name in CATALOG)


def test_far_name_gets_no_suggestion() -> None:
    with pytest.raises(ModelError, match="Accepted names") as raised:
        find_recipe("zzz")
    assert "Did you mean" not in str(raised.value)
