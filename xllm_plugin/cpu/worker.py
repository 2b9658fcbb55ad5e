"""The CPU family's worker."""

from __future__ import annotations

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from xllm_plugin.cpu.model_runner import XllmCpuModelRunner
from xllm_plugin.seams import Process, check_all
from xllm_plugin.worker.model_runner import adopt_runner
from xllm_plugin.worker.worker import XllmWorkerMixin

__all__ = ["XllmCpuWorker"]


class XllmCpuWorker(XllmWorkerMixin, CPUWorker):
    """vLLM's CPU worker with ours in front."""

    def init_device(self) -> None:
        """Bind the device, then build the runner."""
        check_all(Process.WORKER)
        init_amx()
        super().init_device()
        adopt_runner(self, XllmCpuModelRunner)


def init_amx() -> bool:
    """Ask the kernel for this process's AMX state (seam "amx-init").

    Returns:
        True when AMX is there and ready.
    """
    if not torch.cpu._is_amx_tile_supported():  # noqa: SLF001  torch has no public name for it
        return False
    return bool(torch.cpu._init_amx())  # noqa: SLF001
