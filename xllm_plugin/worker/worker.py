"""The worker mixin: every device family's worker is this over vLLM's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import ModelRunnerOutput

from xllm_plugin.worker.messages import StepMessage, StepStamp, attach, attached

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

    def stamp(self) -> StepStamp | None:
        """Return the step's stamp, or None when the scheduler was not ours."""
        if self._message is None:
            return None
        return StepStamp(self._message.step, self._elapsed_s * 1e3)


class XllmWorkerMixin:
    """Times each step and stamps its output.

    Stands before vLLM's worker in the bases.  Under tensor parallelism every rank stamps; vLLM
    returns one rank's output.
    """

    _step_timer: StepTimer | None = None

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step; see vllm/v1/worker/worker_base.py."""
        self._timer.begin(attached(scheduler_output))
        output = self._timer.measure(super().execute_model, scheduler_output)  # type: ignore[misc]
        return self._stamped(output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Finish the step that `execute_model` left open by returning None."""
        output = self._timer.measure(super().sample_tokens, grammar_output)  # type: ignore[misc]
        return self._stamped(output)

    @property
    def _timer(self) -> StepTimer:
        if self._step_timer is None:
            self._step_timer = StepTimer()
        return self._step_timer

    def _stamped(self, output: Any) -> Any:
        # vLLM shares one empty output among all idle steps: it is not ours to write on.
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            stamp = self._timer.stamp()
            if stamp is not None:
                attach(output, stamp)
        return output
