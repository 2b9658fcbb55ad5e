"""Linear layers over packed bfloat16 weights, put where vLLM would pack them for oneDNN."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers import utils as vllm_utils

from xllm_plugin.cpu.native.library import Kernels, Linear

__all__ = ["BLOCK", "PackedLinear", "packing", "round_up"]

BLOCK = 32


class PackedLinear:
    """y = x W^T + b, as vLLM calls a layer's `cpu_linear`.

    Attributes:
        struct: what the kernels take; its bias is the layer's own, if it has one.
    """

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        n, k = weight.shape
        padded = round_up(n, BLOCK)
        self._kernels = kernels
        self._packed = torch.empty(padded * k, dtype=torch.bfloat16)
        kernels.pack(weight.contiguous().data_ptr(), self._packed.data_ptr(), n, k)
        self._bias: torch.Tensor | None = None
        if bias is not None:
            self._bias = torch.zeros(padded, dtype=torch.float32)
            self._bias[:n] = bias
        address = None if self._bias is None else self._bias.data_ptr()
        self.struct = Linear(self._packed.data_ptr(), address, n, k)
        self._without_bias = Linear(self._packed.data_ptr(), None, n, k)

    def tensors(self) -> Iterator[torch.Tensor]:
        """What it multiplies by and adds; the kernels have their addresses."""
        yield self._packed
        if self._bias is not None:
            yield self._bias

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply; `weight` is the layer's, which is empty by now."""
        del weight
        struct = self._without_bias if bias is None or self._bias is None else self.struct
        rows = x.reshape(-1, struct.k).contiguous()
        y = torch.empty((rows.shape[0], struct.n), dtype=x.dtype)
        self._kernels.linear(
            ctypes.byref(struct), rows.data_ptr(), struct.k, y.data_ptr(), struct.n, rows.shape[0]
        )
        return y.view(*x.shape[:-1], struct.n)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


@contextmanager
def packing(kernels: Kernels) -> Iterator[None]:
    """Pack the weights of bfloat16 layers that are loaded meanwhile (seam "cpu-gemm-dispatch").

    Other layers are vLLM's to pack.
    """
    theirs = vllm_utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        if not can_pack(weight):
            theirs(layer, remove_weight)
            return
        layer.cpu_linear = PackedLinear(kernels, weight, getattr(layer, "bias", None))
        if remove_weight:
            # As vLLM does: nobody reads the unpacked weight again.
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    vllm_utils.dispatch_cpu_unquantized_gemm = dispatch
    try:
        yield
    finally:
        vllm_utils.dispatch_cpu_unquantized_gemm = theirs


def can_pack(weight: torch.Tensor) -> bool:
    """Whether the kernels multiply by this weight."""
    # Two chains of sums take four of k at a time.
    return (
        not weight.is_meta
        and weight.ndim == 2  # noqa: PLR2004  [n, k]
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 4 == 0
    )
