"""Let a CUDA build of torchaudio be imported beside a CPU build of torch.

PyPI's torchaudio is built for CUDA, and `import torchaudio` ends in an OSError when its C++ library
does not load; transformers' audio code, and with it vLLM, goes down.  Without the library file
torchaudio imports and runs in Python alone, which is all that resampling needs.  So where the
library cannot be loaded, torchaudio is told to look for it in a folder that is not there.  Where
it does load (torchaudio from PyTorch's own CPU index), nothing is done.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader
from pathlib import Path
from types import ModuleType

from xllm_plugin.shims import loader

__all__ = ["MODULE", "install", "is_in_force"]

# The module that loads the library, and the constant in it that names the folder.
MODULE = "torchaudio._extension.utils"
CONSTANT = "_LIB_DIR"
NOWHERE = Path("/nonexistent/torchaudio-is-built-for-another-torch")


def _execute(real: Loader, module: ModuleType) -> None:
    real.exec_module(module)
    if not _library_loads(getattr(module, CONSTANT)):
        setattr(module, CONSTANT, NOWHERE)


def _library_loads(folder: Path) -> bool:
    import torch

    for library in folder.glob("_torchaudio*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


def install() -> None:
    """Have `import torchaudio` do without its library where that does not load."""
    loader.install(MODULE, _execute)


def is_in_force() -> bool:
    """Say whether torchaudio was redirected in this process."""
    return getattr(sys.modules.get(MODULE), CONSTANT, None) == NOWHERE
