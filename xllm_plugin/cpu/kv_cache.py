"""Memory of the KV cache that the kernel zeroes page by page, when a page is first used.

`torch.zeros` writes every byte before the first request is served: seconds for 4 GiB on a small
machine, and all of it resident, used or not.  Fresh anonymous memory is zero without that.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["ZeroOnFirstUse"]

MIN_BYTES = 64 * 2**20


class ZeroOnFirstUse(TorchFunctionMode):
    """Within this context, large int8 tensors of zeros are fresh anonymous memory.

    vLLM allocates the whole KV cache as one such tensor (vllm/v1/worker/utils.py,
    `allocate_kv_cache`) inside a context that a runner may give.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `torch.zeros(n, dtype=torch.int8)`; everything else is left as it is."""
        kwargs = dict(kwargs or {})
        if func is torch.zeros and kwargs.get("dtype") is torch.int8:
            size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            num_bytes = math.prod(size)
            if num_bytes >= MIN_BYTES and str(kwargs.get("device", "cpu")) == "cpu":
                return untouched_zeros(num_bytes).view(tuple(size))
        return func(*args, **kwargs)


def untouched_zeros(num_bytes: int) -> torch.Tensor:
    """An int8 tensor [num_bytes] of zeros, in huge pages where the kernel gives them."""
    # Not shared, which is Python's default: the kernel seldom gives huge pages to shared memory.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # The tensor holds the mapping.
    return torch.frombuffer(memory, dtype=torch.int8)
