"""What the scheduler shows of the requests of each class."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_plugin.scheduler.plan import Running, View, Waiting
from xllm_plugin.scheduler.report import ClassReport, class_report
from xllm_plugin.scheduler.waiting_queue import WaitingQueue


def make_running(request_id: str, deadline_s: float, *, is_online: bool = True) -> Running:
    return Running(request_id, is_online, deadline_s, 50.0, 0.0, 0, 100, 1, False)


def make_waiting(request_id: str, deadline_s: float, *, is_online: bool = True) -> Waiting:
    return Waiting(request_id, is_online, deadline_s, 50.0, 0.0, 0, 100)


def make_view(**requests: Any) -> View:
    return View(now_s=10.0, free_blocks=5, total_blocks=10, block_tokens=16, **requests)


def test_each_class_is_counted_by_state() -> None:
    view = make_view(
        running=[
            make_running("a", 10.02),
            make_running("b", 10.5),
            make_running("c", 0.0, is_online=False),
        ],
        waiting=WaitingQueue(
            [
                make_waiting("d", 9.7),
                make_waiting("e", 11.0),
                make_waiting("f", 0.0, is_online=False),
            ]
        ),
    )
    online = class_report(view, {"b", "c"}, is_online=True)
    assert online.least_slack_ms == pytest.approx(-300)
    assert (online.num_running, online.num_held, online.num_waiting) == (2, 1, 2)
    assert online.num_late == 1
    assert class_report(view, {"b", "c"}, is_online=False) == ClassReport(
        num_running=1, num_held=1, num_waiting=1
    )


def test_nothing_is_due_when_nobody_is_there() -> None:
    assert class_report(make_view(), set(), is_online=True) == ClassReport()
