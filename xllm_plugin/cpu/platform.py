"""The CPU family's vLLM platform."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform

from xllm_plugin.accelerator.platform import (
    EXECUTORS,
    OWN_SCHEDULERS,
    XllmPlatformMixin,
    has_connector,
)
from xllm_plugin.config import load_config
from xllm_plugin.cpu import fork
from xllm_plugin.cpu.graphs import choice as background
from xllm_plugin.cpu.native.build import NativeBuildError, built_library, early_build
from xllm_plugin.cpu.native.choice import refusal
from xllm_plugin.cpu.threads import OpenMPEnvironment, ThreadPlan, allowed_cpus, plan_here
from xllm_plugin.errors import ConfigError, PlatformError
from xllm_plugin.selection import is_server_command

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, VllmConfig

__all__ = ["XllmCpuPlatform"]

logger = logging.getLogger("vllm.xllm_plugin")

ASYNC_EXECUTOR = "xllm_plugin.cpu.executor.XllmCpuAsyncExecutor"
IN_THE_ENGINE = frozenset({EXECUTORS["uni"], ASYNC_EXECUTOR})

# Of this process; vLLM's hooks are class methods.
openmp = OpenMPEnvironment(os.environ)
engine_fork = fork.EngineFork()

ROTARY = "rotary_embedding"


class XllmCpuPlatform(XllmPlatformMixin, CpuPlatform):
    """vLLM's CPU platform; `_enum` stays CPU, so every `is_cpu()` of vLLM still holds."""

    xllm_worker_cls = fork.WORKER
    xllm_skips_draws = True

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Show our options; look at models without a process for it; schedule step by step."""
        super().pre_register_and_update(parser)
        from vllm.config import SchedulerConfig

        default_to_synchronous(SchedulerConfig)
        inspect_models_here()

    @classmethod
    def choose_async_scheduling(cls, vllm_config: VllmConfig, asked: bool | None) -> None:
        """Give back what vLLM's CPU class always takes.

        Raises:
            PlatformError: it was asked for, and cannot be had with the rest of the configuration.
        """
        refusal = async_refusal(vllm_config) if asked else None
        if refusal is not None:
            raise PlatformError(
                f"--async-scheduling was asked for, and {refusal} on the CPU. "
                "Leave it out, or give --no-async-scheduling."
            )
        vllm_config.scheduler_config.async_scheduling = bool(asked)

    def is_sleep_mode_available(self) -> bool:
        """Say yes; vLLM's own answer is a list of platforms (see `cpu.sleep`)."""
        return True

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose classes; keep MLA models off the rotary operator that is wrong for them."""
        # vLLM replaces "uni" by "mp", so what was asked for is read before.
        is_alone = computes_alone(vllm_config, len({cpu.numa_node for cpu in allowed_cpus()}))
        super().check_and_update_config(vllm_config)
        check_elastic_memory(vllm_config)
        check_sleep_mode(vllm_config)
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


def check_elastic_memory(vllm_config: VllmConfig) -> None:
    """Refuse elastic memory where something else holds on to the KV cache.

    Raises:
        ConfigError: names both settings.
    """
    config = load_config(vllm_config.additional_config).xtensor
    if not config.enabled:
        return
    reasons = {
        "a KV or encoder-cache connector, which keeps the cache's addresses": has_connector(
            vllm_config
        ),
        f"--scheduler-cls {vllm_config.scheduler_config.scheduler_cls}, for our scheduler decides "
        "about memory": vllm_config.scheduler_config.scheduler_cls not in OWN_SCHEDULERS,
        "pipeline parallelism, whose ranks have KV caches of different layouts": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        f"xtensor.pool={config.pool} and tensor parallelism: of several ranks one tells what it "
        "has given back": (
            config.pool is not None and vllm_config.parallel_config.tensor_parallel_size > 1
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"xtensor.enabled is true, and does not go with {reason}. Leave one of them out."
            )
    if config.form == "contiguous":
        check_contiguous(vllm_config)


def check_contiguous(vllm_config: VllmConfig) -> None:
    """Refuse what requests with ranges of their own do not go with; the rest is known later.

    Raises:
        ConfigError: names both settings.
    """
    policy = load_config(vllm_config.additional_config).scheduler.policy
    reasons = {
        f"scheduler.policy={policy}, whose plans count single blocks": policy != "fcfs",
        "speculative decoding, with which it was not tried": (
            vllm_config.speculative_config is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"xtensor.form=contiguous does not go with {reason}. Use xtensor.form=paged."
            )


def check_sleep_mode(vllm_config: VllmConfig) -> None:
    """Refuse what sleep cannot do on a CPU.

    Raises:
        ConfigError: names the option.
    """
    model = vllm_config.model_config
    if model is not None and model.enable_sleep_mode and model.sleep_preserve_parameter_names:
        raise ConfigError(
            f"--sleep-preserve-parameter-names {model.sleep_preserve_parameter_names}: on a CPU "
            "level 2 loads every weight again. Leave it out, or sleep at level 1, which keeps all."
        )


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
        parallel.distributed_executor_backend in {"uni", *IN_THE_ENGINE}
        and parallel.world_size == parallel.data_parallel_size == parallel.nnodes == 1
        and num_memory_nodes == 1
        and not has_connector(vllm_config)
    )


def compute_in_the_engine(vllm_config: VllmConfig, openmp: OpenMPEnvironment) -> ThreadPlan | None:
    """Take the executor without a process of its own; bind OpenMP for the engine's process.

    The process that is starting now has its OpenMP library loaded; the engine's, its child, will
    find the environment.

    Returns:
        The threads of the engine's process, or None in that process itself.
    """
    parallel = vllm_config.parallel_config
    # This process is the engine: a program that is its own, or the child, which is bound.
    is_engine = parallel.distributed_executor_backend in IN_THE_ENGINE
    is_async = vllm_config.scheduler_config.async_scheduling
    parallel.distributed_executor_backend = ASYNC_EXECUTOR if is_async else EXECUTORS["uni"]
    if is_engine:
        return None
    plan = plan_here()
    openmp.bind(plan)
    return plan


def choose_start(vllm_config: VllmConfig, plan: ThreadPlan, engine_fork: fork.EngineFork) -> None:
    """Fork the engine's process from this server's, or leave it to vLLM to start a new one."""
    reason = fork.refusal(vllm_config, sys.argv, os.environ)
    if reason is None:
        engine_fork.arm(plan)
        logger.info("xllm-plugin: the engine's process is forked from this one.")
    else:
        logger.info("xllm-plugin: the engine's process is started anew, not forked: %s.", reason)


def default_to_synchronous(scheduler_config: type[SchedulerConfig]) -> None:
    """Let `async_scheduling=None` mean False (seam "async-scheduling-default").

    vLLM takes it for True wherever it can, so that nobody can tell later what was asked.  On a CPU
    scheduling ahead takes its time from the cores that compute; what it was measured to gain is in
    ARCHITECTURE.md.
    """
    post_init = scheduler_config.__post_init__
    if post_init.__module__ == __name__:
        return

    def decided(self: SchedulerConfig, *args: Any, **kwargs: Any) -> None:
        if self.async_scheduling is None:
            self.async_scheduling = False
        post_init(self, *args, **kwargs)

    scheduler_config.__post_init__ = decided


def async_refusal(vllm_config: VllmConfig) -> str | None:
    """Why steps cannot be scheduled ahead, or None.

    The scheduler leaves placeholders where it does not know a token yet.  The CPU runner, which
    runs one step after the other on one thread, knows what it has sampled itself; drafts, and what
    the last stage of a pipeline sampled, it waits to be told.
    """
    if vllm_config.speculative_config is not None:
        return "it does not go with speculative decoding"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "it does not go with pipeline parallelism"
    return None


def choose_graphs(vllm_config: VllmConfig) -> None:
    """Leave out vLLM's compilation for a model that runs as native code or is compiled later.

    The kernels are built here if they have to be: a machine that cannot build them compiles.
    """
    # vLLM's configuration chooses its platform while it is being imported.
    from vllm.config import CompilationMode

    early_build.wait()
    if native_refusal(vllm_config) is None:
        try:
            built_library()
        except NativeBuildError as error:
            logger.warning("xllm-plugin: the model's layers are compiled, for %s", error)
        else:
            vllm_config.compilation_config.mode = CompilationMode.NONE
            return
    if background.refusal(vllm_config) is not None:
        return
    # A user's own choice of operators is compiled as it is.
    if "all" not in vllm_config.compilation_config.custom_ops:
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
