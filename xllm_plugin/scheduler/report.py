"""What the scheduler shows of itself: section `REPORT_SECTION` of the engine's snapshot.

Plain numbers, so that `xllm top` and others read them without what computed them.  Imports neither
torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

__all__ = [
    "REPORT_SECTION",
    "ClassReport",
    "Listed",
    "SchedulerReport",
    "StepReport",
    "class_report",
]

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


class Listed(NamedTuple):
    """What counts of one request.

    Attributes:
        is_online: whether somebody waits for it.
        is_running: in the batch; else in the queue.
        is_held: kept out of the last step with its KV.
        slack_ms: until its next token is due; negative if overdue.
    """

    is_online: bool
    is_running: bool
    is_held: bool
    slack_ms: float


def class_report(requests: Iterable[Listed], *, is_online: bool) -> ClassReport:
    """The requests of one class among `requests`."""
    mine = [request for request in requests if request.is_online is is_online]
    num_running = sum(request.is_running for request in mine)
    counts = {
        "num_running": num_running,
        "num_held": sum(request.is_held for request in mine),
        "num_waiting": len(mine) - num_running,
    }
    if not is_online:
        return ClassReport(**counts)
    return ClassReport(
        **counts,
        num_late=sum(request.slack_ms < 0 for request in mine),
        least_slack_ms=min((request.slack_ms for request in mine), default=None),
    )
