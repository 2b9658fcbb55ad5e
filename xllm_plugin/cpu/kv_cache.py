"""Memory of the KV cache: zeroed by the kernel when a page is first used, or an elastic range.

`torch.zeros` writes every byte before the first request is served: seconds for 4 GiB on a small
machine, and all of it resident, used or not.  Fresh anonymous memory is zero without that.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from xllm_plugin.cpu.memory import CpuMemoryDriver
from xllm_plugin.cpu.vm_calls import VmCalls
from xllm_plugin.errors import InternalError, NotNowError
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import MOST_PAGE_BYTES, KVLayout, slab_blocks_of
from xllm_plugin.xtensor.memory import ElasticMemory
from xllm_plugin.xtensor.request_ranges import plan_ranges

__all__ = ["ElasticBuffer", "ZeroOnFirstUse", "elastic_memory"]

MIN_BYTES = 64 * 2**20


class ZeroOnFirstUse(TorchFunctionMode):
    """Within this context, large int8 tensors of zeros are fresh anonymous memory.

    vLLM allocates the whole KV cache as one such tensor (vllm/v1/worker/utils.py,
    `allocate_kv_cache`) inside a context that a runner may give.

    Args:
        min_bytes: smaller tensors are torch's.
    """

    def __init__(self, min_bytes: int = MIN_BYTES) -> None:
        super().__init__()
        self._min_bytes = min_bytes
        self._made: list[torch.Tensor] = []

    def drop(self, calls: VmCalls) -> None:
        """Give the memory of these tensors back to the system; they are zeros again.

        Raises:
            NotNowError: the kernel refused; the contents are lost, and the tensors may be used.
        """
        try:
            for tensor in self._made:
                calls.drop(tensor.data_ptr(), -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        except OSError as error:
            raise NotNowError(
                f"the kernel did not take the KV cache's memory back: {error}. Try again. The "
                "engine is paused; /wake_up resumes it."
            ) from error

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
            if num_bytes >= self._min_bytes and str(kwargs.get("device", "cpu")) == "cpu":
                self._made.append(untouched_zeros(num_bytes))
                return self._made[-1].view(tuple(size))
        return func(*args, **kwargs)


class ElasticBuffer(TorchFunctionMode):
    """Within this context, the int8 tensor of zeros of the KV buffer's size is an elastic range.

    Its bytes are there when their slab is committed, and undefined.

    Args:
        memory: whose range it is.
        driver: under `memory`.
    """

    def __init__(self, memory: ElasticMemory, driver: CpuMemoryDriver) -> None:
        super().__init__()
        self._memory = memory
        self._driver = driver
        self._num_made = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `torch.zeros(num_bytes, dtype=torch.int8)`; all else is left as it is."""
        kwargs = dict(kwargs or {})
        num_bytes = self._memory.range.layout.num_bytes
        if func is torch.zeros and args == (num_bytes,) and kwargs.get("dtype") is torch.int8:
            self._num_made += 1
            return self._driver.tensor(self._memory.range.start, num_bytes)
        return func(*args, **kwargs)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._num_made != 1 and error[0] is None:
            raise InternalError(
                f"seam 'kv-cache-zeros': vLLM asked {self._num_made} times for a KV buffer of "
                f"{self._memory.range.layout.num_bytes} bytes; set xtensor.enabled to false and "
                "report this"
            )


def elastic_memory(
    layout: KVLayout, config: XTensorConfig, full_blocks: int
) -> tuple[ElasticMemory, CpuMemoryDriver]:
    """An elastic range for a KV buffer, of pages as large as its slabs allow.

    The range has the layout's blocks in columns that begin with pages (`KVLayout.aligned`).  With
    `form=contiguous` it has more of them, in ranges for requests (`plan_ranges`), not more memory.

    Args:
        layout: as vLLM plans the buffer.
        config: the settings.
        full_blocks: that one request of full length holds.
    """
    num_slabs = None
    if config.form == "contiguous":
        plan = plan_ranges(config, layout, full_blocks, mmap.PAGESIZE)
        slab_blocks, num_slabs = plan.slab_blocks, plan.num_slabs
        page_bytes = layout.page_bytes(slab_blocks, MOST_PAGE_BYTES)
        num_bytes = num_slabs * slab_blocks * layout.block_bytes
        layout = replace(layout, num_blocks=plan.num_blocks).aligned(page_bytes)
    else:
        slab_blocks = slab_blocks_of(config, layout, mmap.PAGESIZE)
        page_bytes = layout.page_bytes(slab_blocks, MOST_PAGE_BYTES)
        layout = layout.aligned(page_bytes)
        num_bytes = -(-layout.num_bytes // page_bytes) * page_bytes
    driver = CpuMemoryDriver(page_bytes=page_bytes, capacity_bytes=num_bytes)
    return ElasticMemory(driver, layout, slab_blocks, config, num_slabs=num_slabs), driver


def untouched_zeros(num_bytes: int) -> torch.Tensor:
    """An int8 tensor [num_bytes] of zeros, in huge pages where the kernel gives them."""
    # Not shared, which is Python's default: the kernel seldom gives huge pages to shared memory.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # The tensor holds the mapping.
    return torch.frombuffer(memory, dtype=torch.int8)
