"""The NPU family's worker."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch_npu  # noqa: F401  registers torch.npu
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory

from xllm_plugin.npu import experts, mla_layer, operators  # noqa: F401  register our layers
from xllm_plugin.npu.model_runner import XllmNpuModelRunner
from xllm_plugin.npu.sleep import NpuSleep
from xllm_plugin.seams import Process, check_all
from xllm_plugin.worker.worker import XllmWorkerMixin

__all__ = ["XllmNpuWorker"]


class XllmNpuWorker(XllmWorkerMixin, Worker):
    """vLLM's GPU worker on a device of torch_npu."""

    _sleep_mode_backend: NpuSleep | None = None

    def init_device(self) -> None:
        """Take the device, join the group of one, measure memory, build the runner.

        As `Worker.init_device`, which does so for "cuda" alone (seam "npu-worker-device").
        """
        check_all(Process.NPU_WORKER)
        self.device = torch.device("npu", self.local_rank)
        current_platform.set_device(self.device)
        current_platform.check_if_supports_dtype(self.model_config.dtype)
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        gc.collect()
        torch.accelerator.empty_cache()
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()

    def determine_available_memory(self) -> int:
        """See vLLM's worker; the runner is told how much of the rest a step works in."""
        torch.accelerator.reset_peak_memory_stats(self.device)
        available_bytes = super().determine_available_memory()
        peak_bytes = torch.accelerator.max_memory_allocated(self.device)
        working_bytes = peak_bytes - torch.accelerator.memory_allocated(self.device)
        self.model_runner.working_bytes = working_bytes
        return available_bytes

    def _make_model_runner(self) -> Any:
        runner = XllmNpuModelRunner(self.vllm_config, self.device)
        runner.setup_xllm()
        return runner

    @property
    def sleep_mode_backend(self) -> NpuSleep:
        """What vLLM's `sleep` and `wake_up` call; one that is chosen by name is given no runner."""
        if self._sleep_mode_backend is None:
            self._sleep_mode_backend = NpuSleep(self.model_runner)
        return self._sleep_mode_backend

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        """No pool: sleep takes the memory of tensors, wherever it is (`npu/sleep.py`)."""
        del tag
        return nullcontext()
