"""The CPU family's vLLM platform."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform

from xllm_plugin.accelerator.platform import EXECUTORS, XllmPlatformMixin
from xllm_plugin.config import load_config
from xllm_plugin.cpu import fork
from xllm_plugin.cpu.graphs import choice as background
from xllm_plugin.cpu.native.build import NativeBuildError, built_library
from xllm_plugin.cpu.native.choice import refusal
from xllm_plugin.cpu.threads import OpenMPEnvironment, ThreadPlan, allowed_cpus, plan_here
from xllm_plugin.errors import PlatformError
from xllm_plugin.selection import is_server_command

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["XllmCpuPlatform"]

logger = logging.getLogger("vllm.xllm_plugin")

# Of this process; vLLM's hooks are class methods.
openmp = OpenMPEnvironment(os.environ)
engine_fork = fork.EngineFork()

ROTARY = "rotary_embedding"


class XllmCpuPlatform(XllmPlatformMixin, CpuPlatform):
    """vLLM's CPU platform; `_enum` stays CPU, so every `is_cpu()` of vLLM still holds."""

    xllm_worker_cls = "xllm_plugin.cpu.worker.XllmCpuWorker"

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Show our options, and look at models without a process for it."""
        super().pre_register_and_update(parser)
        inspect_models_here()

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose classes; keep MLA models off the rotary operator that is wrong for them."""
        # vLLM replaces "uni" by "mp", so what was asked for is read before.
        is_alone = computes_alone(vllm_config, len({cpu.numa_node for cpu in allowed_cpus()}))
        super().check_and_update_config(vllm_config)
        if is_alone:
            plan = compute_in_the_engine(vllm_config, openmp)
            if plan is not None and is_server_command(sys.argv, sys.orig_argv):
                choose_start(vllm_config, plan, engine_fork)
        else:
            openmp.release()
        choose_graphs(vllm_config)
        if vllm_config.use_v2_model_runner:
            raise PlatformError(
                "vLLM chose its V2 model runner, which the CPU family of xllm-plugin does not "
                "extend yet. Set VLLM_USE_V2_MODEL_RUNNER=0 (the V1 runner), or run without this "
                "plugin: --platform native."
            )
        if vllm_config.model_config is not None and vllm_config.model_config.use_mla:
            disable_rotary_operator(vllm_config.compilation_config.custom_ops)


def inspect_models_here() -> None:
    """Have vLLM import a model's class in this process, where its cache does not know the model.

    vLLM starts an interpreter for it, which imports for as long as this one has, so that no GPU is
    initialised here (seam "model-inspection").  A CPU needs no such care, and a forked engine
    inherits the import.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = _call  # noqa: SLF001  there is no setting for it


def _call(function: Callable[[], Any]) -> Any:
    return function()


def computes_alone(vllm_config: VllmConfig, num_memory_nodes: int) -> bool:
    """Whether the model's only rank can live in the engine's process.

    vLLM puts it into a process of its own on the CPU, because it sets OpenMP's environment there.
    Each step then crosses two more process borders, and one core is kept from it.
    ``--distributed-executor-backend mp`` still asks for that.  Several ranks or memory nodes keep
    one process a rank, and vLLM's connectors ask for "mp" by name.
    """
    parallel = vllm_config.parallel_config
    return (
        parallel.distributed_executor_backend in {"uni", EXECUTORS["uni"]}
        and parallel.world_size == parallel.data_parallel_size == parallel.nnodes == 1
        and num_memory_nodes == 1
        and vllm_config.kv_transfer_config is None
        and vllm_config.ec_transfer_config is None
    )


def compute_in_the_engine(vllm_config: VllmConfig, openmp: OpenMPEnvironment) -> ThreadPlan | None:
    """Take the executor without a process of its own; bind OpenMP for the engine's process.

    The process that is starting now has its OpenMP library loaded; the engine's, its child, will
    find the environment.

    Returns:
        The threads of the engine's process, or None in that process itself.
    """
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend == EXECUTORS["uni"]:
        # This process is the engine: a program that is its own, or the child, which is bound.
        return None
    parallel.distributed_executor_backend = EXECUTORS["uni"]
    plan = plan_here()
    openmp.bind(plan)
    return plan


def choose_start(vllm_config: VllmConfig, plan: ThreadPlan, engine_fork: fork.EngineFork) -> None:
    """Fork the engine's process from this server's, or leave it to vLLM to start a new one."""
    reason = fork.refusal(vllm_config, sys.argv, os.environ)
    if reason is None:
        engine_fork.arm(plan)
    else:
        logger.info("xllm-plugin: the engine's process is started anew, not forked: %s.", reason)


def choose_graphs(vllm_config: VllmConfig) -> None:
    """Leave out vLLM's compilation for a model that runs as native code or is compiled later.

    The kernels are built here if they have to be: a machine that cannot build them compiles.
    """
    # vLLM's configuration chooses its platform while it is being imported.
    from vllm.config import CompilationMode

    if native_refusal(vllm_config) is None:
        try:
            built_library()
        except NativeBuildError as error:
            logger.warning("xllm-plugin: the model's layers are compiled, for %s", error)
        else:
            vllm_config.compilation_config.mode = CompilationMode.NONE
            return
    if background.refusal(vllm_config) is None:
        background.compile_later(vllm_config)


def native_refusal(vllm_config: VllmConfig) -> str | None:
    """Why vLLM's own code runs the model's layers, or None when native code does."""
    graph = load_config(vllm_config.additional_config).graph
    if graph.mode == "off":
        return "graph.mode is off"
    if not graph.native_layers:
        return "graph.native_layers is off"
    return refusal(vllm_config)


def disable_rotary_operator(custom_ops: list[str]) -> None:
    """Switch the C++ rotary operator off in place, whatever was asked (seam "cpu-rotary-3d").

    It rotates queries of shape [tokens, heads > 1, dim] wrongly; a request for it
    ("+rotary_embedding") would be a request for wrong text.
    """
    while f"+{ROTARY}" in custom_ops:
        custom_ops.remove(f"+{ROTARY}")
    if f"-{ROTARY}" not in custom_ops:
        custom_ops.append(f"-{ROTARY}")
