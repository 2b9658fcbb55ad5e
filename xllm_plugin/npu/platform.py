"""The NPU family's vLLM platform: out of tree, one device."""

from __future__ import annotations

import logging
import multiprocessing
import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from xllm_plugin.accelerator.platform import XllmPlatformMixin
from xllm_plugin.config import load_config
from xllm_plugin.errors import PlatformError
from xllm_plugin.npu import availability

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

__all__ = ["XllmNpuPlatform"]

logger = logging.getLogger("vllm.xllm_plugin")

V2_RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"
START_METHOD_ENV = "VLLM_WORKER_MULTIPROC_METHOD"


class XllmNpuPlatform(XllmPlatformMixin, Platform):
    """What vLLM asks a platform; torch.npu answers the rest (`Platform.__getattr__`)."""

    _enum = PlatformEnum.OOT
    device_name = "npu"
    device_type = "npu"
    dispatch_key = "PrivateUse1"
    ray_device_key = "NPU"
    device_control_env_var = "ASCEND_RT_VISIBLE_DEVICES"
    # One rank: its group never communicates, and needs no HCCL.
    dist_backend = "gloo"
    simple_compile_backend = "eager"

    xllm_worker_cls = "xllm_plugin.npu.worker.XllmNpuWorker"

    def __init__(self) -> None:
        """Load torch_npu, which torch has done already unless it was told not to.

        Raises:
            PlatformError: it cannot be loaded.
        """
        try:
            import torch_npu  # noqa: F401  registers torch.npu
        except (ImportError, OSError) as error:
            raise PlatformError(
                f"torch_npu cannot be loaded: {error}. It has to be of torch {torch.__version__} "
                "and CANN of its own version; `xllm doctor` says which are here."
            ) from error
        super().__init__()

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """The only one that attention takes in the layout used (`npu/attention.py`)."""
        return [torch.bfloat16]

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Show our options; extend vLLM's V1 runner, as V2 is written in Triton; never fork.

        A process that has asked CANN for a device's memory cannot be forked.
        """
        super().pre_register_and_update(parser)
        os.environ.setdefault(V2_RUNNER_ENV, "0")
        os.environ.setdefault(START_METHOD_ENV, "spawn")

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose classes; refuse what is not there yet; turn vLLM's graphs off.

        Raises:
            PlatformError: what is asked for is not supported on this family.
        """
        super().check_and_update_config(vllm_config)
        reason = refusal(vllm_config)
        if reason is not None:
            raise PlatformError(
                f"the NPU family of xllm-plugin does not support {reason}; see docs/npu.md for "
                "what it does."
            )
        if vllm_config.model_config is not None:
            cls.check_if_supports_dtype(vllm_config.model_config.dtype)
            check_device(vllm_config)
        capture_nothing_of_vllms(vllm_config)

    def is_sleep_mode_available(self) -> bool:
        """Say yes; vLLM's own answer is a list of platforms (see `npu/sleep.py`)."""
        return True

    @classmethod
    def choose_async_scheduling(cls, vllm_config: VllmConfig, asked: bool | None) -> None:
        """Schedule step by step: vLLM's runner copies tokens of the step ahead on CUDA streams."""
        del asked
        vllm_config.scheduler_config.async_scheduling = False

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: Any,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """The backend for latent attention or for any other, if it can do what the layer needs.

        Raises:
            PlatformError: it cannot, or another one was asked for.
        """
        del num_heads
        backend = attention_backend(use_mla=attn_selector_config.use_mla)
        reasons = backend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if selected_backend is not None:
            reasons.append(f"attention backend {selected_backend.name} is not of this family")
        if reasons:
            raise PlatformError(
                f"attention on the NPU family: {'; '.join(reasons)}. It takes decoder attention "
                "in bfloat16 with a head size of at most 128, or DeepSeek's latent attention of "
                "512 and 64."
            )
        return f"{backend.__module__}.{backend.__qualname__}"

    @classmethod
    def get_mla_prefill_backend_cls(
        cls, mla_selector_config: MLAPrefillSelectorConfig
    ) -> type[Any]:
        """What stands where vLLM's layer wants one; see the class."""
        del mla_selector_config
        from xllm_plugin.npu.mla import NpuLatentPrefill

        return NpuLatentPrefill

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """vLLM's base: a group of one rank makes none, and more ranks are refused."""
        communicators = "vllm.distributed.device_communicators"
        return f"{communicators}.base_device_communicator.DeviceCommunicatorBase"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """The SoC's name, such as Ascend910B3."""
        return str(torch.npu.get_device_name(device_id))

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """A device's memory in bytes; asked without taking the device in this process.

        Raises:
            NotNowError: the device cannot be taken.
        """
        return availability.ask(device_id).total_bytes

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Use a device from here on."""
        torch.npu.set_device(device)

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Seed every device's generator."""
        torch.npu.manual_seed_all(seed)

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:
        """The bytes that tensors hold."""
        return float(torch.npu.memory_allocated(device))

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """Refuse another dtype than bfloat16.

        Raises:
            PlatformError: it is another.
        """
        if dtype != torch.bfloat16:
            raise PlatformError(
                f"--dtype {str(dtype).removeprefix('torch.')}: on Ascend devices paged attention "
                "takes bfloat16 alone. Leave --dtype out, or give bfloat16."
            )

    @classmethod
    def import_kernels(cls) -> None:
        """None: torch_npu brings the operators."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """None: `npu/operators.py` replaces whole layers."""

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Replace the Triton kernels on the way of a dense model."""
        from vllm.triton_utils.dispatcher import register_kernels

        from xllm_plugin.npu.kernels import KERNELS

        register_kernels(KERNELS)


def attention_backend(*, use_mla: bool) -> type[AttentionBackend]:
    """The class for one of the two kinds of attention."""
    if use_mla:
        from xllm_plugin.npu.mla import NpuLatentBackend

        return NpuLatentBackend
    from xllm_plugin.npu.attention import NpuAttentionBackend

    return NpuAttentionBackend


def refusal(vllm_config: VllmConfig) -> str | None:
    """What is asked for that this family does not do, or None."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    num_ranks = parallel.world_size * parallel.data_parallel_size
    asked = {
        f"{num_ranks} ranks (HCCL)": num_ranks > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "xtensor.enabled": load_config(vllm_config.additional_config).xtensor.enabled,
    }
    if model is not None:
        backend = model.sleep_mode_backend
        asked |= {
            f"quantization ({model.quantization})": model.quantization is not None,
            f"--sleep-mode-backend {backend}": backend != "cumem",  # vLLM's default
            "--sleep-mode-offload-cudagraph": model.sleep_mode_offload_cudagraph,
        }
    return next((what for what, is_asked in asked.items() if is_asked), None)


def check_device(vllm_config: VllmConfig) -> None:
    """See that the device can be taken and may hold the model, before an engine is started.

    Once this process holds the device, or is a server's child, the answer is known.

    Raises:
        NotNowError: it cannot be taken now, or others hold its memory.
        PlatformError: it is too small.
    """
    if torch.npu.is_initialized() or multiprocessing.parent_process() is not None:
        return
    from xllm_plugin.npu.demand import demand_of

    availability.check_memory(0, availability.ask(0), demand_of(vllm_config))


def capture_nothing_of_vllms(vllm_config: VllmConfig) -> None:
    """Neither compile nor capture CUDA graphs; `npu/graphs.py` captures what is worth it."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.cudagraph_capture_sizes = []
    compilation.max_cudagraph_capture_size = 0
    vllm_config.kernel_config.enable_jit_warmup = False  # there is no Triton kernel to warm up
    if "all" not in compilation.custom_ops and "none" not in compilation.custom_ops:
        compilation.custom_ops.append("all")
