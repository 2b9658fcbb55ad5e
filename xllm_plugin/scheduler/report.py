"""What the scheduler shows of itself: section `REPORT_SECTION` of the engine's snapshot.

Plain numbers, so that `xllm top` and others read them without what computed them.  Imports neither
torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from xllm_plugin.scheduler.plan import View

__all__ = ["REPORT_SECTION", "ClassReport", "SchedulerReport", "StepReport", "class_report"]

REPORT_SECTION: Final = "scheduler"


class ClassReport(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one class now.

    Attributes:
        num_running: in the batch.
        num_held: of these, kept out of the last step with their KV.
        num_waiting: in the queue.
        num_late: of all, those whose next token is overdue.
        least_slack_ms: until the next token of any of them is due; negative if overdue, None if
            there are none, or their promises do not count.
    """

    num_running: int = 0
    num_held: int = 0
    num_waiting: int = 0
    num_late: int = 0
    least_slack_ms: float | None = None


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """The last step that has ended.

    Attributes:
        num_sequences: requests in it.
        decode_tokens: of those that write, drafts included.
        prefill_tokens: of parts of prompts.
        context_tokens: whose keys and values the decodes read, summed.
        predicted_ms: before it ran; None without a model of steps.
        measured_ms: None before it has ended.
        bound: what kept it from being larger; empty if it was not planned.
    """

    num_sequences: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    predicted_ms: float | None = None
    measured_ms: float | None = None
    bound: str = ""


class SchedulerReport(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, the last step, and how well steps are predicted.

    Attributes:
        policy: `scheduler.policy` in force.
        online: requests that somebody waits for.
        offline: requests that nobody waits for.
        step: the last one.
        error: running mean of the relative error of predictions; None without a model.
        is_cautious: whether the model cannot be relied on, and budgets are small for it.
    """

    policy: str
    online: ClassReport = ClassReport()
    offline: ClassReport = ClassReport()
    step: StepReport = StepReport()
    error: float | None = None
    is_cautious: bool = False


def class_report(view: View, held: AbstractSet[str], *, is_online: bool) -> ClassReport:
    """The requests of one class in `view`.

    Args:
        view: the engine now.
        held: ids of requests that were kept out of the last step.
        is_online: which class.
    """
    running = [request for request in view.running if request.is_online is is_online]
    waiting = [request for request in view.waiting if request.is_online is is_online]
    counts = {
        "num_running": len(running),
        "num_held": sum(request.request_id in held for request in running),
        "num_waiting": len(waiting),
    }
    if not is_online:
        return ClassReport(**counts)
    deadlines_s = [r.deadline_s for r in running]
    deadlines_s += [r.deadline_s for r in waiting]
    slacks_s = [deadline_s - view.now_s for deadline_s in deadlines_s]
    return ClassReport(
        **counts,
        num_late=sum(slack_s < 0 for slack_s in slacks_s),
        least_slack_ms=min(slacks_s) * 1e3 if slacks_s else None,
    )
