"""Put the emulated operators where torch_npu's own kernels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

# Each enters its operators when it is imported.
from xllm_plugin.testing.cann.device import (  # noqa: F401
    attention,
    dense,
    experts,
    latent,
    sampling,
)
from xllm_plugin.testing.cann.device.contract import EMULATED
from xllm_plugin.testing.cann.device.fallback import refuse_host_tensors
from xllm_plugin.testing.cann.device.host import host_view, to_device
from xllm_plugin.testing.cann.device.tape import tape

__all__ = ["register"]

DEVICE, AUTOGRAD = "PrivateUse1", "AutogradPrivateUse1"

ATTENTION = "npu_fused_infer_attention_score_v2"

_libraries: list[Any] = []
"""Torch drops the kernels with these objects."""


def register() -> None:
    """Register the emulated operators, and a refusal for every other; safe to repeat.

    Gradients are not emulated: that key lets every call through.
    """
    if _libraries:
        return
    kernels, gradients = (torch.library.Library("npu", "IMPL", key) for key in (DEVICE, AUTOGRAD))
    _libraries.extend((kernels, gradients))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001  no public name
    for full_name in torch._C._dispatch_get_all_op_names():  # noqa: SLF001
        name = full_name.removeprefix("npu::")
        is_operator = full_name.startswith("npu::npu_") or name in EMULATED
        if is_operator and has_kernel(full_name, DEVICE):
            function = EMULATED.get(name)
            kernel = _refusal(name) if function is None else _kernel(name, function)
            if name == f"{ATTENTION}.out":
                kernel = _attention_out
            kernels.impl(name, kernel, allow_override=True)
            if has_kernel(full_name, AUTOGRAD):  # some of these compute by themselves
                gradients.impl(name, torch.library.fallthrough_kernel, allow_override=True)


def _kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        refuse_host_tensors(name, (args, kwargs))
        here = tree_map(host_view, (args, kwargs))
        given = zip(tree_leaves(here), tree_leaves((args, kwargs)), strict=True)
        given_back = {id(one): there for one, there in given}

        def run() -> Any:
            return function(*here[0], **here[1])

        def put_back(one: Any) -> Any:
            return given_back[id(one)] if id(one) in given_back else to_device(one)

        there = tree_map(put_back, run())
        tape.note(name, run, there)
        return there

    return kernel


def _attention_out(*args: Any, out: list[torch.Tensor], workspace: Any, **kwargs: Any) -> Any:
    """Attention into tensors that are there: the form whose lengths a graph can replace."""
    del workspace
    refuse_host_tensors(ATTENTION, (args, kwargs, out))
    here = tree_map(host_view, (args, kwargs))

    num_results = 2 if kwargs.get("return_softmax_lse") else 1
    filled = out[:num_results]

    def run() -> Any:
        return EMULATED[ATTENTION](*here[0], **here[1])[:num_results]

    if not tape.replaces(run):
        for result, value in zip(filled, run(), strict=True):
            host_view(result).copy_(value)
        tape.note(ATTENTION, run, filled)
    return out[0], out[1]


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is not emulated (xllm_plugin/testing/cann/device)")

    return refuse
