"""Let a CUDA build of torchaudio be imported beside a CPU build of torch.

PyPI's torchaudio is built for CUDA, and `import torchaudio` ends in an OSError when its C++ library
does not load; transformers' audio code, and with it vLLM, goes down.  Without the library file
torchaudio imports and runs in Python alone, which is all that resampling needs.  So where the
library cannot be loaded, torchaudio is told to look for it in a folder that is not there.  Where
it does load (torchaudio from PyTorch's own CPU index), nothing is done.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["TorchaudioFinder", "install", "is_in_force"]

# The module that loads the library, and the constant in it that names the folder.
MODULE = "torchaudio._extension.utils"
CONSTANT = "_LIB_DIR"
NOWHERE = Path("/nonexistent/torchaudio-is-built-for-another-torch")


class _RedirectingLoader(Loader):
    """Runs the real loader, then points the module at `NOWHERE` if its library does not load."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        """Leave resources, source and the like to the real loader."""
        return getattr(self._real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        if not _library_loads(getattr(module, CONSTANT)):
            setattr(module, CONSTANT, NOWHERE)


class TorchaudioFinder(MetaPathFinder):
    """Finds the one module `MODULE`, through the ordinary path, with a loader that redirects."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find `MODULE`; leave every other module to the ordinary finders."""
        if fullname != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RedirectingLoader(spec.loader)
        return spec


def _library_loads(folder: Path) -> bool:
    import torch

    for library in folder.glob("_torchaudio*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


def install() -> None:
    """Put the finder first on `sys.meta_path`.  Safe to repeat."""
    if not any(isinstance(finder, TorchaudioFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchaudioFinder())


def is_in_force() -> bool:
    """Say whether torchaudio was redirected in this process."""
    return getattr(sys.modules.get(MODULE), CONSTANT, None) == NOWHERE
