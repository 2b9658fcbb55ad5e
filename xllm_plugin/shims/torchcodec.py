"""Let a torchcodec that cannot be loaded count as absent.

PyPI's torchcodec is built for CUDA; beside CPU torch its import ends in an OSError.  vLLM treats
torchcodec as optional, but only an ImportError or RuntimeError tells it so
(vllm/multimodal/media/audio.py).  This finder turns the one into the other; where torchcodec
imports, nothing happens.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

__all__ = ["TorchcodecFinder", "install"]

MODULE = "torchcodec"


class _ImportErrorLoader(Loader):
    """Runs the real loader; a library that does not load is an ImportError."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        """Leave resources, source and the like to the real loader."""
        return getattr(self._real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._real.exec_module(module)
        except OSError as error:
            raise ImportError(f"{MODULE} is built for another torch: {error}") from error


class TorchcodecFinder(MetaPathFinder):
    """Finds `torchcodec` through the ordinary path, with a loader that raises ImportError."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find `torchcodec`; leave every other module to the ordinary finders."""
        if fullname != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ImportErrorLoader(spec.loader)
        return spec


def install() -> None:
    """Put the finder first on `sys.meta_path`.  Safe to repeat."""
    if not any(isinstance(finder, TorchcodecFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchcodecFinder())
