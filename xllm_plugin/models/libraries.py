"""Import transformers where media libraries were built for another torch (`xllm_plugin.shims`)."""

from __future__ import annotations

import importlib
from typing import Any

from xllm_plugin import shims

__all__ = ["load_transformers"]


def load_transformers() -> Any:
    """Return the transformers module, able to make vision models, with its own noise turned off.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
    """
    shims.install()
    transformers = importlib.import_module("transformers")
    # Our own bar says what is going on; theirs would print between it.
    transformers.utils.logging.disable_progress_bar()
    return transformers
