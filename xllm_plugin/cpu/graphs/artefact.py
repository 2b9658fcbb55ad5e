"""Bind a compiled graph to the model that serves, and check that they fit before anything runs."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xllm_plugin.cpu.graphs.store import INDUCTOR, MODEL, StoredGraph

__all__ = ["ForeignGraphError", "bind", "describe", "generalise", "load", "take_inputs"]


class ForeignGraphError(Exception):
    """The graph was made for another model or other code; says what differs."""


def load(folder: Path, module: torch.nn.Module) -> Any:
    """Read a compiled function from `folder`; see vllm/compilation/decorators.py.

    Its guards are dropped, as vLLM drops them: `bind` checks the inputs instead.

    Args:
        folder: as in `StoredGraph`.
        module: whose `forward` was compiled.

    Raises:
        ForeignGraphError: a source file that was traced has changed since.
    """
    with kernels_in(folder / INDUCTOR), (folder / MODEL).open("rb") as file:
        function: Any = torch.compiler.load_compiled_function(
            file, f_globals=type(module).forward.__globals__
        )
    for source in function.source_info().inlined_sources:
        lines = inspect.getsource(sys.modules[source.module])
        if digest(lines) != digest(source.content):
            raise ForeignGraphError(f"{source.module} has changed since")
    function.disable_guard_check()
    return function


def digest(text: str) -> bytes:
    """Of a file's text, whatever its last line ends with."""
    return hashlib.sha256(text.strip().encode()).digest()


@contextmanager
def kernels_in(folder: Path) -> Iterator[None]:
    """Let Inductor find kernels in `folder`, by the variable that it reads whenever it looks."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def bind(stored: StoredGraph, module: torch.nn.Module) -> Callable[..., Any]:
    """The graph as a function of the module and the arguments of its `forward`.

    At the first call the inputs it finds in the module are compared with those it was compiled
    for: compiled code trusts them, so a weight of another type would be read as garbage.

    Raises:
        ForeignGraphError: traced source files have changed; at the first call: inputs differ.
    """
    function = load(stored.folder, module)

    def check(inputs: Sequence[Any]) -> None:
        found = [describe(value) for value in inputs]
        expected = stored.manifest.inputs
        if len(found) != len(expected):
            raise ForeignGraphError(f"it takes {len(expected)} inputs, not {len(found)}")
        for index, (here, there) in enumerate(zip(found, expected, strict=True)):
            if not _fits(here, there):
                raise ForeignGraphError(f"input {index} is {here}, it was compiled for {there}")
        give_back()

    give_back = take_inputs(function, check)
    return function


def take_inputs(function: Any, look: Callable[[Sequence[Any]], None]) -> Callable[[], None]:
    """Let `look` see the inputs of the compiled graph before each call.

    Returns:
        What ends it.
    """
    names, backend_id = function.fn.__globals__, function._artifacts.backend_id  # noqa: SLF001
    compiled = names[backend_id]

    def looked_at(*inputs: Any) -> Any:
        look(inputs)
        return compiled(*inputs)

    def give_back() -> None:
        names[backend_id] = compiled

    names[backend_id] = looked_at
    return give_back


def describe(value: Any) -> list[Any]:
    """An input as JSON has it: ``["torch.bfloat16", [16, 576], [576, 1]]``, or ``["int"]``."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), list(value.stride())]
    return [type(value).__name__]


def generalise(one: list[Any], other: list[Any]) -> list[Any]:
    """The description that fits inputs of two batches: None where they differ."""
    return [
        generalise(a, b) if isinstance(a, list) and isinstance(b, list) else a if a == b else None
        for a, b in zip(one, other, strict=True)
    ]


def _fits(here: Any, there: Any) -> bool:
    if isinstance(there, list) and isinstance(here, list):
        return len(here) == len(there) and all(map(_fits, here, there))
    return there is None or here == there
