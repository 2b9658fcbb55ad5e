"""The NPU family's model runner: vLLM's V1 GPU runner, which reaches the device through torch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from xllm_plugin.config import load_config
from xllm_plugin.npu.graphs import DecodeGraphs, within_spare_memory
from xllm_plugin.npu.sampling import filter_on_device
from xllm_plugin.worker.model_runner import XllmModelRunnerMixin

__all__ = ["XllmNpuModelRunner"]

logger = logging.getLogger("vllm.xllm_plugin")


class XllmNpuModelRunner(XllmModelRunnerMixin, GPUModelRunner):
    """vLLM's V1 runner with ours in front.

    It names `torch.cuda` for asynchronous scheduling, drafts and graphs alone, which the platform
    refuses or turns off (seam "npu-runner-streams"); all else goes through `torch.accelerator`,
    `torch.Event` and tensors.
    """

    graphs: DecodeGraphs | None = None
    working_bytes = 0
    """What the largest step makes and holds at once, as measured before there was a KV cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        filter_on_device(self)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the cache; with it graphs can be captured.  See vLLM's GPUModelRunner."""
        super().initialize_kv_cache(*args, **kwargs)
        config = load_config(self.vllm_config.additional_config).graph
        if config.mode == "off" or self.model_config.enforce_eager:
            logger.info("xllm-plugin: every step runs eagerly, as asked.")
        elif len(self.attn_groups) == 1 and len(self.attn_groups[0]) == 1:
            self.graphs = DecodeGraphs(self, within_spare_memory(config, self.working_bytes))
        else:
            logger.info("xllm-plugin: every step runs eagerly: the layers differ in attention.")

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The model's output, by a graph where one is worth it (seam "npu-graph-step")."""
        eager = super()._model_forward

        def run() -> Any:
            return eager(input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs)

        if self.graphs is None or input_ids is None or positions is None or model_kwargs:
            return run()
        return self.graphs.forward(run, input_ids, positions)
