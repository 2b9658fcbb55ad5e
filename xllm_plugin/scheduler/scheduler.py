"""The schedulers: vLLM's own, with ours in front.  `schedule` plans, then calls `super()`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from xllm_plugin.config import load_config
from xllm_plugin.scheduler.memory import MemoryControl
from xllm_plugin.scheduler.report import REPORT_SECTION
from xllm_plugin.scheduler.resumed import ResumedRequests
from xllm_plugin.scheduler.slo import SloPolicy
from xllm_plugin.scheduler.slo_metrics import PREDICTOR_SECTION, SLO_SECTION
from xllm_plugin.scheduler.telemetry import Telemetry
from xllm_plugin.scheduler.wake import EngineWaker
from xllm_plugin.seams import Process, check_all
from xllm_plugin.worker.messages import StepMessage, attach, attached

if TYPE_CHECKING:
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

__all__ = ["XllmAsyncScheduler", "XllmScheduler", "XllmSchedulerMixin"]


class XllmSchedulerMixin:
    """Stands before vLLM's scheduler in the bases; lives in the engine's process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_all(Process.ENGINE)
        super().__init__(*args, **kwargs)
        self._waker = EngineWaker()
        self._telemetry = Telemetry(self, self._waker.wake)
        self._memory = MemoryControl(self, self._telemetry.channel, self._waker)
        self._slo = self._make_policy()
        self._resumed = ResumedRequests(self)
        self._telemetry.start()

    def _make_policy(self) -> SloPolicy | None:
        config = load_config(self.vllm_config.additional_config).scheduler  # type: ignore[attr-defined]
        if config.policy != "slo":
            return None
        policy = SloPolicy(self, config)
        channel = self._telemetry.channel
        channel.add_section(PREDICTOR_SECTION, policy.model)
        channel.add_section(SLO_SECTION, policy.snapshot)
        channel.add_section(REPORT_SECTION, policy.report)
        return policy

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan, let vLLM schedule, and send our message along with the step."""
        self._waker.take()
        self._telemetry.drain_calls()
        self._memory.plan()
        output: SchedulerOutput
        with nullcontext() if self._slo is None else self._slo.planned():
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._resumed.record_scheduled(output)
        change, has_tokens = self._memory.take_change(), output.total_num_scheduled_tokens > 0
        step = self._telemetry.count_step() if has_tokens else 0
        if has_tokens or change is not None:
            attach(output, StepMessage(step, memory=change))
        if self._slo is not None:
            self._slo.record_scheduled(output, step)
        self._telemetry.record_change()
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Let vLLM take the step's tokens in, then record what the step was."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        stamp = attached(model_runner_output)
        if self._slo is not None:
            self._slo.record_step(attached(scheduler_output), outputs, stamp)
        self._memory.record(stamp)
        self._telemetry.record_step(scheduler_output, outputs, stamp)
        return outputs

    def has_requests(self) -> bool:
        """Whether a step is wanted: by vLLM, a queued call or the KV cache's memory."""
        return (
            super().has_requests()  # type: ignore[misc]
            or self._waker.is_pending
            or self._memory.has_work()
        )

    def add_request(self, request: Request) -> None:
        """Let vLLM queue the request; an idle engine that got work says so."""
        self._resumed.add(request)
        if self._slo is not None:
            self._slo.add(request)
        super().add_request(request)  # type: ignore[misc]
        self._telemetry.record_change()

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Let vLLM end or abort requests; an engine that falls idle by it says so."""
        finished = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        self._resumed.forget(finished)
        if self._slo is not None:
            self._slo.forget(finished)
        self._telemetry.record_change()
        return finished

    def set_pause_state(self, pause_state: PauseState) -> None:
        """Let vLLM pause or go on; the time between is no step's."""
        super().set_pause_state(pause_state)  # type: ignore[misc]
        if self._slo is not None:
            self._slo.interrupt()

    def _preempt_request(self, *args: Any, **kwargs: Any) -> Any:
        self._telemetry.num_preemptions += 1
        return super()._preempt_request(*args, **kwargs)  # type: ignore[misc]

    def shutdown(self) -> None:
        """Close the control socket with the scheduler."""
        try:
            self._memory.close()
            self._telemetry.close()
            if self._slo is not None:
                self._slo.close()
        finally:
            super().shutdown()  # type: ignore[misc]


class XllmScheduler(XllmSchedulerMixin, Scheduler):
    """Schedules a step after the one before it has ended."""


class XllmAsyncScheduler(XllmSchedulerMixin, AsyncScheduler):
    """Schedules a step while the one before it runs."""
