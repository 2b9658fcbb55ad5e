"""Import transformers where torchvision and torchaudio were built for another torch.

PyPI's builds of both are for CUDA.  Beside torch+cpu their C++ libraries do not load, and
transformers imports both as soon as they are installed.  torchvision is repaired by our shim
(image processors need it); torchaudio, which no model here needs, is declared absent for this
process.  Where both load, nothing is done.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from xllm_plugin.shims import torchvision

__all__ = ["load_transformers"]


def load_transformers() -> Any:
    """Return the transformers module, able to make vision models, with its own noise turned off.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
    """
    torchvision.install()
    _hide_torchaudio_unless_it_loads()
    transformers = importlib.import_module("transformers")
    # Our own bar says what is going on; theirs would print between it.
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _hide_torchaudio_unless_it_loads() -> None:
    if "torchaudio" in sys.modules:
        return
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        # None makes `import torchaudio` and importlib.util.find_spec say that it is not installed.
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
