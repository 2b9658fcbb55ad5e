"""What an emulated operator says it is, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["EMULATED", "FLOATS", "emulates", "require", "require_dtype"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

EMULATED: dict[str, Callable[..., Any]] = {}
"""Operators of the namespace npu by name, on host tensors."""


def emulates(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function as the operator `name`; its parameters are the schema's."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        EMULATED[name] = function
        return function

    return enter


def require(condition: bool, otherwise: str) -> None:
    """Raise what a device's own checks raise.

    Raises:
        RuntimeError: unless `condition`.
    """
    if not condition:
        raise RuntimeError(otherwise)


def require_dtype(name: str, tensor: torch.Tensor, accepted: Sequence[torch.dtype]) -> None:
    """Refuse another dtype.

    Raises:
        RuntimeError: it is another.
    """
    require(tensor.dtype in accepted, f"{name} is {tensor.dtype}; accepted are {accepted}")
