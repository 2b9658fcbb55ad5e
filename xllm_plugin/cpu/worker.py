"""The CPU family's worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from xllm_plugin.config import load_config
from xllm_plugin.cpu.model_runner import XllmCpuModelRunner
from xllm_plugin.cpu.platform import IN_THE_ENGINE, engine_fork
from xllm_plugin.cpu.sleep import SleepMode
from xllm_plugin.cpu.threads import plan_here
from xllm_plugin.cpu.weight_memory import WeightMemory
from xllm_plugin.errors import MisuseError
from xllm_plugin.seams import Process, check_all
from xllm_plugin.worker.model_runner import adopt_runner
from xllm_plugin.worker.worker import XllmWorkerMixin
from xllm_plugin.xtensor.memory import ElasticMemory

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig
    from vllm.v1.core.sched.output import SchedulerOutput

__all__ = ["XllmCpuWorker"]


class XllmCpuWorker(XllmWorkerMixin, CPUWorker):
    """vLLM's CPU worker with ours in front."""

    _sleep_mode: SleepMode | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        engine_fork.enter()
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        """Bind the device, then build the runner."""
        check_all(Process.WORKER)
        init_amx()
        set_threads(self.parallel_config.distributed_executor_backend)
        with synchronous_runner(self.scheduler_config):
            super().init_device()
        adopt_runner(self, XllmCpuModelRunner)
        if self.model_config.enable_sleep_mode:
            directory = load_config(self.vllm_config.additional_config).engine.sleep_dir
            self._sleep_mode = SleepMode(self.model_runner, WeightMemory(directory))

    def elastic_memory(self) -> ElasticMemory | None:
        """What backs the KV cache, or None where all of it is there from the start."""
        # An engine that fails early shuts a worker down that has no runner.
        runner: XllmCpuModelRunner | None = getattr(self, "model_runner", None)
        return None if runner is None else runner.elastic_memory

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step; see the mixin."""
        if self._sleep_mode is not None:
            self._sleep_mode.check_awake(scheduler_output.total_num_scheduled_tokens)
        return super().execute_model(scheduler_output)

    def sleep(self, level: int = 1) -> None:
        """Give memory back to the system; the engine is paused (see `SleepMode.sleep`)."""
        self._has_sleep_mode().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take it again; see `SleepMode.wake_up`."""
        self._has_sleep_mode().wake_up(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Give the KV cache's memory back; see `SleepMode.discard`."""
        self._has_sleep_mode().discard(tags)

    def _has_sleep_mode(self) -> SleepMode:
        if self._sleep_mode is None:
            raise MisuseError("this engine cannot sleep; start it with --enable-sleep-mode.")
        return self._sleep_mode

    def shutdown(self) -> None:
        """Give the KV cache's memory back, and end what runs beside the steps.

        vLLM shuts the scheduler down afterwards, which gives the lease of a pool back: another
        server may take the memory at once.  If it does not go, the error keeps vLLM from that, and
        the lease ends with the process.
        """
        try:
            memory = self.elastic_memory()
            if memory is not None:
                memory.close()
        finally:
            super().shutdown()

    def compile_or_warm_up_model(self) -> Any:
        """The last thing before the first answer."""
        times = super().compile_or_warm_up_model()
        self.model_runner.start_background_work()
        return times


@contextmanager
def synchronous_runner(config: SchedulerConfig) -> Iterator[None]:
    """Let vLLM build the runner that knows a step's tokens when the step ends.

    With `async_scheduling` its runner leaves them on the device (streams, events) and fills the
    next step's placeholders there.  On a CPU the steps run one after the other on one thread: when
    the next one reads its inputs, the tokens stand where the scheduler has left placeholders.
    """
    asked = config.async_scheduling
    config.async_scheduling = False
    try:
        yield
    finally:
        config.async_scheduling = asked


def set_threads(executor_backend: object) -> None:
    """Compute on the planned cores in a program that loaded OpenMP before vLLM could bind it.

    An engine in a process of its own has found OMP_NUM_THREADS when it loaded OpenMP; a program
    that is its own engine has it only where the user decided, and then the user's word stands.
    """
    if executor_backend not in IN_THE_ENGINE or "OMP_NUM_THREADS" in os.environ:
        return
    plan = plan_here()
    if plan.cores:
        torch.set_num_threads(plan.num_threads)


def init_amx() -> bool:
    """Ask the kernel for this process's AMX state (seam "amx-init").

    Returns:
        True when AMX is there and ready.
    """
    if not torch.cpu._is_amx_tile_supported():  # noqa: SLF001  torch has no public name for it
        return False
    return bool(torch.cpu._init_amx())  # noqa: SLF001
