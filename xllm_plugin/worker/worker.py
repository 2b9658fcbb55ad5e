"""The worker mixin: every device family's worker is this over vLLM's own."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import ModelRunnerOutput

from xllm_plugin.errors import InternalError
from xllm_plugin.worker.messages import StepMessage, StepStamp, attach, attached
from xllm_plugin.xtensor.memory import ElasticMemory
from xllm_plugin.xtensor.messages import MemoryChange, MemoryReport

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

__all__ = ["StepTimer", "XllmWorkerMixin"]


class StepTimer:
    """Adds up the parts of one step; `execute_model` and `sample_tokens` are two calls."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._message: StepMessage | None = None
        self._elapsed_s = 0.0

    def begin(self, message: StepMessage | None) -> None:
        """Start a new step."""
        self._message = message
        self._elapsed_s = 0.0

    def measure(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call and add the time it took to the step."""
        started_s = self._clock()
        try:
            return call(*args)
        finally:
            self._elapsed_s += self._clock() - started_s

    def stamp(self, memory: MemoryReport | None = None) -> StepStamp | None:
        """Return the step's stamp, or None when the scheduler was not ours."""
        if self._message is None:
            return None
        return StepStamp(self._message.step, self._elapsed_s * 1e3, memory)


class XllmWorkerMixin:
    """Times each step and stamps its output; carries out what it says about memory.

    Stands before vLLM's worker in the bases.  Under tensor parallelism every rank stamps; vLLM
    returns one rank's output.
    """

    _step_timer: StepTimer | None = None
    _memory_report: MemoryReport | None = None

    def elastic_memory(self) -> ElasticMemory | None:
        """What backs the KV cache, or None where all of it is there from the start."""
        return None

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step; see vllm/v1/worker/worker_base.py."""
        message = attached(scheduler_output)
        self._timer.begin(message)
        if message is not None and message.memory is not None:
            self._memory_report = self._timer.measure(self._change_memory, message.memory)
        elif (memory := self.elastic_memory()) is not None and memory.owes:
            self._timer.measure(memory.settle)
        output = self._timer.measure(super().execute_model, scheduler_output)  # type: ignore[misc]
        return self._stamped(output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Finish the step that `execute_model` left open by returning None."""
        output = self._timer.measure(super().sample_tokens, grammar_output)  # type: ignore[misc]
        return self._stamped(output)

    def try_sleep(self, level: int) -> str | None:
        """Fall asleep; return what keeps this rank from it, or None.  See `XllmExecutorMixin`."""
        return _why_not(self.sleep, level)  # type: ignore[attr-defined]

    def try_wake_up(self) -> str | None:
        """Bring back what is away, if anything is; return what is in the way, or None."""
        return _why_not(self.wake_up)  # type: ignore[attr-defined]

    @property
    def _timer(self) -> StepTimer:
        if self._step_timer is None:
            self._step_timer = StepTimer()
        return self._step_timer

    def _change_memory(self, change: MemoryChange) -> MemoryReport:
        memory = self.elastic_memory()
        if memory is None:
            raise InternalError(
                "the scheduler's KV cache is elastic and this worker's is not; please report this"
            )
        memory.apply(change)
        return memory.report()

    def _stamped(self, output: Any) -> Any:
        report = self._memory_report
        if not isinstance(output, ModelRunnerOutput) or not (output.req_ids or report):
            return output
        stamp = self._timer.stamp(report)
        if stamp is None:
            return output
        if not output.req_ids:
            # vLLM shares one empty output among all idle steps: it is not ours to write on.
            output = copy.copy(output)
        attach(output, stamp)
        self._memory_report = None
        return output


def _why_not(call: Callable[..., None], *args: Any) -> str | None:
    try:
        call(*args)
    except Exception as error:  # noqa: BLE001 - said to the executor, which raises
        return str(error) or type(error).__name__
    return None
