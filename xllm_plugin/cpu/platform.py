"""The CPU family's vLLM platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

from xllm_plugin.accelerator.platform import XllmPlatformMixin
from xllm_plugin.errors import PlatformError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["XllmCpuPlatform"]

ROTARY = "rotary_embedding"


class XllmCpuPlatform(XllmPlatformMixin, CpuPlatform):
    """vLLM's CPU platform; `_enum` stays CPU, so every `is_cpu()` of vLLM still holds."""

    xllm_worker_cls = "xllm_plugin.cpu.worker.XllmCpuWorker"

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose classes; keep MLA models off the rotary operator that is wrong for them."""
        super().check_and_update_config(vllm_config)
        if vllm_config.use_v2_model_runner:
            raise PlatformError(
                "vLLM chose its V2 model runner, which the CPU family of xllm-plugin does not "
                "extend yet. Set VLLM_USE_V2_MODEL_RUNNER=0 (the V1 runner), or run without this "
                "plugin: --platform native."
            )
        if vllm_config.model_config is not None and vllm_config.model_config.use_mla:
            disable_rotary_operator(vllm_config.compilation_config.custom_ops)


def disable_rotary_operator(custom_ops: list[str]) -> None:
    """Switch the C++ rotary operator off in place, whatever was asked (seam "cpu-rotary-3d").

    It rotates queries of shape [tokens, heads > 1, dim] wrongly; a request for it
    ("+rotary_embedding") would be a request for wrong text.
    """
    while f"+{ROTARY}" in custom_ops:
        custom_ops.remove(f"+{ROTARY}")
    if f"-{ROTARY}" not in custom_ops:
        custom_ops.append(f"-{ROTARY}")
