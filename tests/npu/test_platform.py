"""What the NPU platform refuses, and what it turns off, without a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xllm_plugin.errors import PlatformError
from xllm_plugin.npu.platform import XllmNpuPlatform, capture_nothing_of_vllms, refusal


def config(**model: Any) -> Any:
    settings = {
        "quantization": None,
        "sleep_mode_backend": "cumem",
        "sleep_mode_offload_cudagraph": False,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1, data_parallel_size=1),
        model_config=SimpleNamespace(**{**settings, **model}),
        speculative_config=None,
        lora_config=None,
        additional_config={},
    )


def test_a_dense_model_on_one_device_is_accepted() -> None:
    assert refusal(config()) is None


def test_each_thing_that_is_not_there_is_named() -> None:
    several, drafts, lora, elastic = config(), config(), config(), config()
    several.parallel_config.world_size = 2
    drafts.speculative_config = object()
    lora.lora_config = object()
    elastic.additional_config = {"xllm": {"xtensor": {"enabled": True}}}
    found = [
        refusal(asked)
        for asked in (
            several,
            drafts,
            lora,
            elastic,
            config(quantization="awq"),
            config(sleep_mode_backend="criu"),
            config(sleep_mode_offload_cudagraph=True),
        )
    ]
    assert found == [
        "2 ranks (HCCL)",
        "speculative decoding",
        "LoRA",
        "xtensor.enabled",
        "quantization (awq)",
        "--sleep-mode-backend criu",
        "--sleep-mode-offload-cudagraph",
    ]


def test_other_types_are_refused_with_the_option() -> None:
    XllmNpuPlatform.check_if_supports_dtype(torch.bfloat16)
    with pytest.raises(PlatformError, match=r"--dtype float32: .*Leave --dtype out"):
        XllmNpuPlatform.check_if_supports_dtype(torch.float32)


def test_the_communicators_class_is_there() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    assert isinstance(resolve_obj_by_qualname(XllmNpuPlatform.get_device_communicator_cls()), type)


def test_models_capture_nothing_of_vllms() -> None:
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    asked = config(enforce_eager=False)
    asked.compilation_config = CompilationConfig()
    asked.kernel_config = SimpleNamespace(enable_jit_warmup=True)
    capture_nothing_of_vllms(asked)
    assert not asked.model_config.enforce_eager
    assert not asked.kernel_config.enable_jit_warmup
    assert asked.compilation_config.mode == CompilationMode.NONE
    assert asked.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert asked.compilation_config.custom_ops == ["all"]
