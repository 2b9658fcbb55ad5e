"""xllm-plugin: the xLLM engine (arXiv 2510.14686) as a backend for vLLM.

Importing this package imports nothing heavy: neither torch nor vLLM.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
