"""The CPU family's model runner."""

from __future__ import annotations

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from xllm_plugin.worker.model_runner import XllmModelRunnerMixin

__all__ = ["XllmCpuModelRunner"]


class XllmCpuModelRunner(XllmModelRunnerMixin, CPUModelRunner):
    """vLLM's V1 CPU runner with ours in front."""
