"""The CPU family's model runner."""

from __future__ import annotations

import logging
import mmap
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.config import CompilationMode
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from xllm_plugin.config import load_config
from xllm_plugin.cpu.graphs.background import BackgroundGraph
from xllm_plugin.cpu.graphs.choice import compiles_later
from xllm_plugin.cpu.kv_cache import ElasticBuffer, ZeroOnFirstUse, elastic_memory
from xllm_plugin.cpu.native.build import NativeBuildError, built_library
from xllm_plugin.cpu.native.layers import UnsupportedLayerError
from xllm_plugin.cpu.native.library import Kernels
from xllm_plugin.cpu.native.linear import packing
from xllm_plugin.cpu.native.model import full_refusal, take_over
from xllm_plugin.cpu.platform import native_refusal
from xllm_plugin.cpu.vm_calls import VmCalls
from xllm_plugin.scheduler.memory import ending_the_engine
from xllm_plugin.worker.model_runner import XllmModelRunnerMixin
from xllm_plugin.xtensor.kv_cache import full_request_blocks
from xllm_plugin.xtensor.layout import KVLayout, moved
from xllm_plugin.xtensor.memory import ElasticMemory

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["XllmCpuModelRunner"]

logger = logging.getLogger("vllm.xllm_plugin")


class XllmCpuModelRunner(XllmModelRunnerMixin, CPUModelRunner):
    """vLLM's V1 CPU runner with ours in front."""

    _kernels: Kernels | None = None
    _graph: BackgroundGraph | None = None
    _fixed_memory: ZeroOnFirstUse | None = None
    elastic_memory: ElasticMemory | None = None

    def initialize_kv_cache_tensors(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int],
        kv_cache_allocation_context: AbstractContextManager[Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Allocate the KV cache without writing to it; see vLLM's GPUModelRunner."""
        kv_buffer, kv_cache_config = self._kv_buffer(kv_cache_config)
        with kv_buffer:
            return super().initialize_kv_cache_tensors(
                kv_cache_config, kernel_block_sizes, kv_cache_allocation_context
            )

    def _kv_buffer(self, kv_cache_config: KVCacheConfig) -> tuple[TorchFunctionMode, KVCacheConfig]:
        """What makes the buffer, and vLLM's tensors as they are placed in it."""
        config = load_config(self.vllm_config.additional_config).xtensor
        if not config.enabled or not kv_cache_config.kv_cache_tensors:
            can_sleep = self.model_config.enable_sleep_mode
            self._fixed_memory = ZeroOnFirstUse(mmap.PAGESIZE) if can_sleep else ZeroOnFirstUse()
            return self._fixed_memory, kv_cache_config
        layout = KVLayout.of_tensors(kv_cache_config.num_blocks, kv_cache_config.kv_cache_tensors)
        full_blocks = full_request_blocks(kv_cache_config, self.vllm_config)
        with ending_the_engine():  # it is refused here first, and then by the scheduler
            self.elastic_memory, driver = elastic_memory(layout, config, full_blocks)
        self.elastic_memory.start()
        placed_layout = self.elastic_memory.range.layout
        tensors = moved(kv_cache_config.kv_cache_tensors, layout, placed_layout)
        placed = replace(
            kv_cache_config, num_blocks=placed_layout.num_blocks, kv_cache_tensors=list(tensors)
        )
        return ElasticBuffer(self.elastic_memory, driver), placed

    def sleep_kv_cache(self) -> None:
        """Give the KV cache's memory back to the system; every block's contents are lost.

        Raises:
            NotNowError: see `ElasticMemory.sleep` and `ZeroOnFirstUse.drop`.
        """
        if self.elastic_memory is not None:
            self.elastic_memory.sleep()
        elif self._fixed_memory is not None:
            self._fixed_memory.drop(VmCalls())

    def wake_kv_cache(self) -> None:
        """Let the KV cache have memory again, as blocks are used.

        Raises:
            PagesExhaustedError: see `ElasticMemory.wake`.
        """
        if self.elastic_memory is not None:
            self.elastic_memory.wake()

    def reload_refusal(self) -> str | None:
        """Why the weights cannot be loaded once more, or None when they can."""
        reasons = {
            f"--load-format {self.load_config.load_format} has no files to load from": not hasattr(
                get_model_loader(self.load_config), "get_all_weights"
            ),
            "vLLM's own code runs the model's layers, and has packed the weights in its way": (
                self._kernels is None
            ),
            "a draft model shares its weights": self.speculative_config is not None,
            "adapters (LoRA) are loaded beside them": self.lora_config is not None,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load as vLLM does, and let native code run the layers it knows."""
        self._kernels = self._native_kernels()
        if self._kernels is None:
            if compiles_later(self.vllm_config):
                self._graph = BackgroundGraph(self.vllm_config)
            super().load_model(load_dummy_weights)
            if self._graph is not None:
                self._graph.load(self.model)
            return
        with packing(self._kernels):
            super().load_model(load_dummy_weights)
        self._take_over(self._kernels)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Take new weights in, packed as the first ones were."""
        if self._kernels is None:
            super().reload_weights(*args, **kwargs)
            return
        with packing(self._kernels):
            super().reload_weights(*args, **kwargs)
        self._take_over(self._kernels)

    def warming_up_model(self) -> None:
        """Run a full batch once, so that what it needs is known before the rest is given away.

        vLLM does so only to compile.
        """
        if self._kernels is None and self._graph is None:
            super().warming_up_model()
        else:
            self.profile_run()

    def start_background_work(self) -> None:
        """Begin what is better done while the engine answers; it is ready to."""
        if self._graph is not None:
            self._graph.start()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step; see vLLM's GPUModelRunner."""
        if self._graph is not None:
            self._graph.between_steps()
        return super().execute_model(*args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; a request whose prompt goes on draws nothing from its seed (see below)."""
        states = [(draws, draws.get_state()) for draws in self._unused_generators().values()]
        output = super()._sample(*args, **kwargs)
        for draws, state in states:
            draws.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """Count what was sampled; vLLM takes back what an unfinished prompt has drawn.

        It does so by a generator's offset, which those of a CPU lack: a seed and a prompt in chunks
        ended the engine (seam "cpu-generator-offset").
        """
        generators = self.input_batch.generators
        unused = self._unused_generators()
        for index in unused:
            del generators[index]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(unused)

    def skip_draws(self, req_id: str, num_tokens: int) -> None:
        """Draw one number a token, as vLLM's sampler does on a CPU.

        See `TopKTopPSampler.forward_cpu`; where it does otherwise, `instance/replay.py` refuses.
        """
        draws = self.requests[req_id].generator
        for _ in range(num_tokens if draws is not None else 0):
            torch.randint(0, 2**31, (1,), generator=draws, dtype=torch.long)

    def _unused_generators(self) -> dict[int, torch.Generator]:
        """Those of seeded requests whose token of this step will be thrown away, by index."""
        discarded = self.discard_request_mask.np
        generators = self.input_batch.generators
        return {index: draws for index, draws in generators.items() if discarded[index]}

    def _native_kernels(self) -> Kernels | None:
        reason = native_refusal(self.vllm_config)
        if reason is None and self.compilation_config.mode != CompilationMode.NONE:
            # `choose_graphs` has said why.
            reason = "it is compiled before the first answer"
        try:
            kernels = None if reason else Kernels(built_library())
        except NativeBuildError as error:
            kernels, reason = None, str(error)
        if reason is not None:
            logger.info("xllm-plugin: vLLM's own code runs the model's layers: %s.", reason)
        return kernels

    def _take_over(self, kernels: Kernels) -> None:
        try:
            reason = full_refusal(self.model)
            if load_config(self.vllm_config.additional_config).graph.mode == "partial":
                reason = "graph.mode is partial"
            num_layers = take_over(kernels, self.model, is_full=reason is None)
        except UnsupportedLayerError as unsupported:
            logger.warning(
                "xllm-plugin: vLLM's own code runs the model's layers, uncompiled: %s. "
                "XLLM_GRAPH__MODE=off compiles them as vLLM does.",
                unsupported,
            )
            return
        logger.info(
            "xllm-plugin: %d decoder layers run as native code, %s.",
            num_layers,
            f"around vLLM's attention: {reason}" if reason else "as one call a step",
        )
