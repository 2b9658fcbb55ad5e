"""A torchvision of another build: its missing operators are declared; a fitting one is left."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from xllm_plugin.shims import torchvision
from xllm_plugin.shims.torchvision import TorchvisionFinder, install

USE = """
import sys
from xllm_plugin.shims import torchvision as shim
shim.install(); shim.install()
finders = [f for f in sys.meta_path if isinstance(f, shim.TorchvisionFinder)]
assert len(finders) == 1 and "torch" not in sys.modules
import torchvision.transforms
import torch
assert torch.ops.torchvision.nms is not None
print(shim.is_in_force(), torch.version.cuda is None, torchvision.__version__)
"""


@pytest.fixture(autouse=True)
def _meta_path(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if not isinstance(finder, TorchvisionFinder)]
    monkeypatch.setattr(sys, "meta_path", others)


def test_other_modules_are_left_to_the_ordinary_finders() -> None:
    finder = TorchvisionFinder()
    finder.find_spec("torch")
    finder.find_spec("torchvision_extras")
    assert not finder._has_looked


def test_an_absent_torchvision_stays_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    finder = TorchvisionFinder()
    monkeypatch.setattr(sys, "meta_path", [finder])
    assert importlib.util.find_spec("torchvision") is None
    assert finder in sys.meta_path, "removing it would hide the finder behind it from this search"


def test_it_is_installed_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torchvision, "_libraries", [])
    install()
    install()
    assert [isinstance(finder, TorchvisionFinder) for finder in sys.meta_path].count(True) == 1
    assert isinstance(sys.meta_path[0], TorchvisionFinder)


def test_an_imported_torchvision_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    install()
    assert not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path)


def test_torchvision_imports_beside_this_torch(run_python: Any) -> None:
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    done = run_python("-c", USE)
    assert done.returncode == 0, done.stderr
    in_force, is_cpu_torch, version = done.stdout.split()
    if is_cpu_torch == "True" and "+cpu" not in version:
        assert in_force == "True"
    if is_cpu_torch == "False":
        assert in_force == "False"
