"""Every aten operator of the device, run by the CPU's kernel on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from xllm_plugin.testing.cann.device.dispatch import put_over
from xllm_plugin.testing.cann.device.host import host_view, is_on_device, to_device
from xllm_plugin.testing.cann.device.tape import tape

__all__ = ["register"]

# These make, move or describe storage: torch_npu's own work on the emulated runtime.
NATIVE = frozenset(
    {
        "_copy_from_and_resize",
        "_pin_memory",
        "empty.memory_format",
        "empty_strided",
        "is_pinned",
        "pin_memory",
        "record_stream",
        "resize_",
        "set_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "set_.source_Tensor_storage_offset",
    }
)
# A device's kernels take host tensors (but for numbers) in these alone.
TAKES_HOST_TENSORS = frozenset(
    {
        "_copy_from",
        "_index_put_impl_",
        "_to_copy",
        "copy_",
        "index.Tensor",
        "index_put",
        "index_put_",
    }
)

OFFSET_STEP = 4
"""Offsets of a device's generator are multiples of 4."""


def register() -> None:
    """Register a kernel over each that torch_npu has; safe to repeat."""
    put_over("aten", _kernel_of)


def _kernel_of(name: str) -> Callable[..., Any] | None:
    packet, _, overload = name.partition(".")
    operators = getattr(torch.ops.aten, packet, None)
    if name in NATIVE or operators is None:  # or a kernel in the wrong namespace, of no operator
        return None
    operator = getattr(operators, overload or "default")
    return None if _is_view(operator) else on_host(operator, name)


def on_host(operator: Any, name: str) -> Callable[..., Any]:
    """A kernel that runs `operator` on host views of its arguments."""
    written = [a for a in operator._schema.arguments if _is_written(a)]  # noqa: SLF001
    outputs = {a.name for a in written if a.kwarg_only}
    returned = operator._schema.returns  # noqa: SLF001
    returns_written = bool(returned) and _is_written(returned[0])
    positions = {a.name: at for at, a in enumerate(operator._schema.arguments)}  # noqa: SLF001

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if name not in TAKES_HOST_TENSORS:
            refuse_host_tensors(name, (args, kwargs))
        given = [key for key in outputs if key in kwargs]
        here = tree_map(_on_host, (args, kwargs))
        like = {key: here[1][key] for key in given}

        def run() -> tuple[Any, dict[str, Any]]:
            fresh = {key: _fresh(like[key]) for key in given}
            return operator(*here[0], **{**here[1], **fresh}), fresh

        result, fresh = run()
        for key, value in fresh.items():
            _put(value, kwargs[key])
        if returns_written:
            tape.note(name, lambda: run()[1], [kwargs[key] for key in given])
            found = [kwargs[a.name] if a.name in kwargs else args[positions[a.name]]
                     for a in written]  # fmt: skip
            return found[0] if len(returned) == 1 else tuple(found)
        if "device" in kwargs and torch.device(kwargs["device"]).type == "cpu":
            tape.refuse_waiting(name)
            return result
        there = tree_map(to_device, result)
        tape.note(name, lambda: run()[0], there)
        return there

    return kernel


def refuse_host_tensors(name: str, arguments: Any) -> None:
    """Refuse tensors that a device's kernel could not read.

    Raises:
        RuntimeError: one with at least one dimension lies on the host.
    """
    for value in tree_leaves(arguments):
        if isinstance(value, torch.Tensor) and value.dim() and not is_on_device(value):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found one of shape "
                f"{tuple(value.shape)} on {value.device} beside those on npu"
            )


def _is_view(operator: Any) -> bool:
    return any(
        r.alias_info is not None and not r.alias_info.is_write
        for r in operator._schema.returns  # noqa: SLF001
    )


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _on_host(value: Any) -> Any:
    return _host_generator(value) if isinstance(value, torch.Generator) else host_view(value)


def _host_generator(generator: torch.Generator) -> torch.Generator:
    """The host's generator for one draw of the device's: of its seed and offset, which goes on."""
    if generator.device.type == "cpu":
        return generator
    offset = generator.get_offset()
    generator.set_offset(offset + OFFSET_STEP)
    seed = (generator.initial_seed() * 2**20 + offset) % 2**63
    return torch.Generator().manual_seed(seed)


def _fresh(output: Any) -> Any:
    """An empty host tensor for each of `out=`, which the operator may resize."""
    return tree_map(lambda one: torch.empty(0, dtype=one.dtype), output)


def _put(values: Any, outputs: Any) -> None:
    for value, output in zip(tree_leaves(values), tree_leaves(outputs), strict=True):
        if output.shape != value.shape:
            output.resize_(value.shape)
        host_view(output).copy_(value)
