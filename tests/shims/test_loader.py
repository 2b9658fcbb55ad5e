"""One module is found and wrapped; every other, and everything else about it, is left alone."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.shims.loader import OneModuleFinder, install


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "wrapped_module", raising=False)


def execute(real: Loader, module: ModuleType) -> None:
    real.exec_module(module)
    module.value += 1  # type: ignore[attr-defined]


def test_the_module_is_executed_our_way(site_here: Any) -> None:
    site_here.add_module("wrapped_module", "value = 1")
    install("wrapped_module", execute)
    assert importlib.import_module("wrapped_module").value == 2


def test_the_real_loader_s_other_methods_are_there(site_here: Any) -> None:
    site_here.add_module("wrapped_module", "value = 1")
    install("wrapped_module", execute)
    module = importlib.import_module("wrapped_module")
    assert module.__spec__ is not None
    assert module.__spec__.loader.get_source("wrapped_module") == "value = 1"  # type: ignore[union-attr]


def test_other_modules_are_left_to_the_ordinary_finders() -> None:
    finder = OneModuleFinder("wrapped_module", execute)
    assert finder.find_spec("wrapped_module.part") is None
    assert finder.find_spec("wrapped") is None


def test_an_absent_module_stays_absent() -> None:
    assert OneModuleFinder("wrapped_module", execute).find_spec("wrapped_module", path=[]) is None


def test_installing_twice_is_installing_once() -> None:
    install("wrapped_module", execute)
    install("wrapped_module", execute)
    ours = [
        f for f in sys.meta_path if isinstance(f, OneModuleFinder) and f.name == "wrapped_module"
    ]
    assert len(ours) == 1
