"""Let a torchcodec that cannot be loaded count as absent.

PyPI's torchcodec is built for CUDA; beside CPU torch its import ends in an OSError.  vLLM treats
torchcodec as optional, but only an ImportError or RuntimeError tells it so
(vllm/multimodal/media/audio.py).  This turns the one into the other; where torchcodec imports,
nothing happens.
"""

from __future__ import annotations

from importlib.abc import Loader
from types import ModuleType

from xllm_plugin.shims import loader

__all__ = ["MODULE", "install"]

MODULE = "torchcodec"


def _execute(real: Loader, module: ModuleType) -> None:
    try:
        real.exec_module(module)
    except OSError as error:
        raise ImportError(f"{MODULE} is built for another torch: {error}") from error


def install() -> None:
    """Have `import torchcodec` raise ImportError where its libraries do not load."""
    loader.install(MODULE, _execute)
