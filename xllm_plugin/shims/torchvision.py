"""Let a CUDA build of torchvision be imported beside a CPU build of torch.

PyPI's torchvision is built for CUDA.  With torch+cpu its C++ library does not load, and
`import torchvision` ends with "operator torchvision::nms does not exist", which takes transformers'
image code, and with it vLLM, down.  Declaring the schemas of the missing operators first lets the
Python part import; image transforms need no more.  Where the library does load (torchvision from
PyTorch's own CPU index), nothing is done.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["TorchvisionFinder", "install", "is_in_force"]

# Operators that torchvision/_meta_registrations.py registers fake kernels for by name at import.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch.library.Library deregisters its schemas when it is collected.
_libraries: list[Any] = []


class TorchvisionFinder(MetaPathFinder):
    """Acts once, when `torchvision` is first looked for."""

    def __init__(self) -> None:
        self._has_looked = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Declare the schemas if they are missing; let the ordinary finders find the module."""
        del path, target
        if fullname != "torchvision" or self._has_looked:
            return
        # It stays on sys.meta_path: a list that is being walked would skip the finder after it.
        self._has_looked = True
        spec = importlib.machinery.PathFinder.find_spec("torchvision")
        if spec is not None and spec.origin is not None:
            _declare_missing_operators(Path(spec.origin).parent)


def _declare_missing_operators(package: Path) -> None:
    import torch

    if torch.version.cuda is not None or _operators_load(package):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def _operators_load(package: Path) -> bool:
    """Say whether torchvision's own library can be loaded, in the way torchvision will load it."""
    import torch

    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            return False
        return True
    return False


def install() -> None:
    """Put the finder first on `sys.meta_path` unless torchvision is imported.  Safe to repeat."""
    if "torchvision" in sys.modules or is_in_force():
        return
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


def is_in_force() -> bool:
    """Say whether the schemas were declared by us in this process."""
    return bool(_libraries)
