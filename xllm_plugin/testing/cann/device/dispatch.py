"""Kernels in the places of torch_npu's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["put_over"]

_libraries: dict[str, Any] = {}
"""torch drops the kernels with these objects."""


def put_over(namespace: str, kernel_of: Callable[[str], Callable[..., Any] | None]) -> None:
    """Replace torch_npu's kernels of one namespace; safe to repeat.

    Args:
        namespace: of the operators.
        kernel_of: the kernel for an operator's name, overload included; None keeps torch_npu's.
    """
    if namespace in _libraries:
        return
    _libraries[namespace] = library = torch.library.Library(namespace, "IMPL", "PrivateUse1")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001  no public name
    for full_name in torch._C._dispatch_get_all_op_names():  # noqa: SLF001
        name = full_name.removeprefix(f"{namespace}::")
        if name == full_name or not has_kernel(full_name, "PrivateUse1"):
            continue
        kernel = kernel_of(name)
        if kernel is not None:
            library.impl(name, kernel, allow_override=True)
