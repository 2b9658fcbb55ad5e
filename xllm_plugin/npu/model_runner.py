"""The NPU family's model runner: vLLM's V1 GPU runner, which reaches the device through torch."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from xllm_plugin.worker.model_runner import XllmModelRunnerMixin

__all__ = ["XllmNpuModelRunner"]


class XllmNpuModelRunner(XllmModelRunnerMixin, GPUModelRunner):
    """vLLM's V1 runner with ours in front.

    It names `torch.cuda` for asynchronous scheduling, drafts and graphs alone, which the platform
    refuses; all else goes through `torch.accelerator`, `torch.Event` and tensors.
    """
