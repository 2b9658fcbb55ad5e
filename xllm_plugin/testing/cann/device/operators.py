"""Put the emulated operators where torch_npu's own kernels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_map

# Each enters its operators when it is imported.
from xllm_plugin.testing.cann.device import attention, dense  # noqa: F401
from xllm_plugin.testing.cann.device.contract import EMULATED
from xllm_plugin.testing.cann.device.dispatch import put_over
from xllm_plugin.testing.cann.device.fallback import refuse_host_tensors
from xllm_plugin.testing.cann.device.host import host_view, to_device

__all__ = ["register"]


def register() -> None:
    """Register the emulated operators, and a refusal for every other; safe to repeat."""
    put_over("npu", _kernel_of)


def _kernel_of(name: str) -> Callable[..., Any] | None:
    if not name.startswith("npu_"):
        return None
    function = EMULATED.get(name)
    return _refusal(name) if function is None else _kernel(name, function)


def _kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        refuse_host_tensors(name, (args, kwargs))
        here = tree_map(host_view, (args, kwargs))
        return tree_map(to_device, function(*here[0], **here[1]))

    return kernel


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is not emulated (xllm_plugin/testing/cann/device)")

    return refuse
