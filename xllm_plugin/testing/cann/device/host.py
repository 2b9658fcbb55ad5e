"""Device tensors as host tensors over the same bytes, and back."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["host_view", "is_on_device", "to_device"]


def is_on_device(value: Any) -> bool:
    """Whether `value` is a tensor on the emulated device."""
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def host_view(value: Any) -> Any:
    """A host tensor over the memory of a device tensor, of the same shape and strides.

    Anything else is returned as it is, but for the device itself, which becomes the host.
    """
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device("cpu")
    if not is_on_device(value):
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    memory = torch._C._construct_storage_from_data_pointer(  # noqa: SLF001  the only way
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )
    offset, shape, strides = value.storage_offset(), value.shape, value.stride()
    return torch.empty(0, dtype=value.dtype).set_(memory, offset, shape, strides)


def to_device(value: Any) -> Any:
    """A host tensor copied to the current device; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="npu")
    host_view(there).copy_(value)
    return there
