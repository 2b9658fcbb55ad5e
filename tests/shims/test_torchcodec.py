"""A torchcodec that cannot be loaded counts as absent; any other error is its own."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from xllm_plugin.shims.loader import OneModuleFinder
from xllm_plugin.shims.torchcodec import install


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if not isinstance(finder, OneModuleFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)


def test_an_oserror_becomes_an_importerror(site_here: Any) -> None:
    site_here.add_module("torchcodec", "raise OSError('libcudart.so.13: cannot open')")
    install()
    with pytest.raises(ImportError, match=r"built for another torch: libcudart\.so\.13") as caught:
        importlib.import_module("torchcodec")
    assert isinstance(caught.value.__cause__, OSError)
    assert "torchcodec" not in sys.modules


def test_other_errors_pass(site_here: Any) -> None:
    site_here.add_module("torchcodec", "raise ZeroDivisionError('a bug')")
    install()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        importlib.import_module("torchcodec")


def test_one_that_loads_is_imported_as_ever(site_here: Any) -> None:
    site_here.add_module("torchcodec", "value = 3")
    install()
    assert importlib.import_module("torchcodec").value == 3
