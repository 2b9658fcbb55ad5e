"""A finder for one module, whose loader lets us decide how the module is executed."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

__all__ = ["OneModuleFinder", "install"]

Execute = Callable[[Loader, ModuleType], None]


class _WrappingLoader(Loader):
    """The real loader, but for how the module is executed."""

    def __init__(self, real: Loader, execute: Execute) -> None:
        self._real = real
        self._execute = execute

    def __getattr__(self, name: str) -> Any:
        """Leave resources, source and the like to the real loader."""
        return getattr(self._real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._execute(self._real, module)


class OneModuleFinder(MetaPathFinder):
    """Finds `name` through the ordinary path and has `execute(loader, module)` execute it."""

    def __init__(self, name: str, execute: Execute) -> None:
        self.name = name
        self._execute = execute

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the one module; leave every other to the ordinary finders."""
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrappingLoader(spec.loader, self._execute)
        return spec


def install(name: str, execute: Execute) -> None:
    """Put a finder for `name` first on `sys.meta_path`, unless there is one.  Safe to repeat."""
    if not any(isinstance(f, OneModuleFinder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, OneModuleFinder(name, execute))
