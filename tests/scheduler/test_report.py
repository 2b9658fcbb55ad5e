"""What the scheduler shows of the requests of each class."""

from __future__ import annotations

from xllm_plugin.scheduler.report import ClassReport, Listed, class_report


def listed(
    slack_ms: float, *, online: bool = True, runs: bool = True, held: bool = False
) -> Listed:
    return Listed(online, runs, held, slack_ms)


def test_each_class_is_counted_by_state() -> None:
    requests = [
        listed(20),
        listed(500, held=True),
        listed(-1e4, online=False, held=True),
        listed(-300, runs=False),
        listed(1000, runs=False),
        listed(-1e4, online=False, runs=False),
    ]
    online = class_report(requests, is_online=True)
    assert online.least_slack_ms == -300
    assert (online.num_running, online.num_held, online.num_waiting) == (2, 1, 2)
    assert online.num_late == 1
    assert class_report(requests, is_online=False) == ClassReport(
        num_running=1, num_held=1, num_waiting=1
    )


def test_nothing_is_due_when_nobody_is_there() -> None:
    assert class_report([], is_online=True) == ClassReport()
