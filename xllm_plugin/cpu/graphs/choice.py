"""Whether a model is compiled in the background, and what its configuration is meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xllm_plugin.config import load_config
from xllm_plugin.cpu.native.build import find_compiler

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["compile_later", "compiles_later", "refusal", "to_be_compiled"]

# vLLM's CPU platform sets it for a model that it would compile; it stays when the mode changes.
MARK = "cpp.dynamic_threads"


def refusal(vllm_config: VllmConfig) -> str | None:
    """Why vLLM compiles this model itself, or not at all; None when it can be done later."""
    graph = load_config(vllm_config.additional_config).graph
    config: Any = vllm_config
    parallel = config.parallel_config
    reasons = {
        "graph.mode is off": graph.mode == "off",
        "graph.background_compile is off": not graph.background_compile,
        "there is no model": config.model_config is None,
        "it takes images or sound": bool(
            getattr(config.model_config, "is_multimodal_model", False)
        ),
        "vLLM does not compile it": MARK not in config.compilation_config.inductor_compile_config,
        "it is quantised": config.quant_config is not None,
        "LoRA": config.lora_config is not None,
        "speculative decoding": config.speculative_config is not None,
        "weights are replaced at run time": config.weight_transfer_config is not None,
        "several ranks share the work": parallel.world_size * parallel.data_parallel_size > 1,
        "no C++ compiler was found": find_compiler() is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def compile_later(vllm_config: VllmConfig) -> None:
    """Let the model start eager, with vLLM's own operators where it has them."""
    from vllm.config import CompilationMode

    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.NONE
    compilation.custom_ops[:] = ["all" if op == "none" else op for op in compilation.custom_ops]


def compiles_later(vllm_config: VllmConfig) -> bool:
    """Whether `compile_later` was called."""
    from vllm.config import CompilationMode

    is_uncompiled = vllm_config.compilation_config.mode == CompilationMode.NONE
    return is_uncompiled and refusal(vllm_config) is None


def to_be_compiled(vllm_config: VllmConfig) -> None:
    """Undo `compile_later`, in the process that compiles; see vLLM's CpuPlatform."""
    from vllm.config import CompilationMode

    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
    compilation.custom_ops[:] = ["none" if op == "all" else op for op in compilation.custom_ops]
