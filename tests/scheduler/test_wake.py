"""An engine is found when it first looks for input, and an alarm rings at the time last set."""

from __future__ import annotations

import math
import queue
import threading
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.scheduler.wake import EngineAlarm, EngineWaker
from xllm_plugin.testing.fakes import ManualClock

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


class Engine:
    """As much of vLLM's `EngineCoreProc` as the waker touches."""

    def __init__(self, scheduler: object) -> None:
        self.scheduler = scheduler
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.num_looks = 0

    def _process_input_queue(self) -> str:
        self.num_looks += 1
        return "looked"


@pytest.fixture
def engine_class() -> type[Engine]:
    """A class of its own, for it is changed."""
    return type("Engine", (Engine,), {"_process_input_queue": Engine._process_input_queue})


def test_an_engine_is_woken_by_the_message_that_vllm_has_for_it(engine_class: Any) -> None:
    shims.install()
    from vllm.v1.engine import EngineCoreRequestType

    scheduler, waker = object(), EngineWaker()
    look = engine_class._process_input_queue
    waker.find(engine_class, scheduler)
    engine = engine_class(scheduler)
    assert engine._process_input_queue() == "looked"
    assert engine_class._process_input_queue is look, "vLLM's own again"
    waker.wake()
    assert engine.input_queue.get_nowait() == (EngineCoreRequestType.WAKEUP, None)
    assert waker.is_pending
    assert waker.take()
    assert not waker.take()


def test_another_engine_is_left_alone(engine_class: Any) -> None:
    waker = EngineWaker()
    waker.find(engine_class, object())
    other = engine_class(object())
    assert other._process_input_queue() == "looked"
    waker.wake()
    assert other.input_queue.empty()
    assert waker.is_pending, "the next step, whoever takes it, sees to it"


def test_an_alarm_rings_at_the_earliest_time_that_was_not_taken_back() -> None:
    rung, clock = threading.Event(), ManualClock()
    alarm = EngineAlarm(rung.set, clock)
    alarm.set(clock() + 1e6)
    assert not rung.is_set()
    alarm.set(clock() + 2e6)
    alarm.set(clock())
    assert rung.wait(30)
    rung.clear()
    alarm.set(math.inf)
    alarm.set(clock() - 1.0)
    assert rung.wait(30), "a time that has passed rings at once"
    alarm.close()
    assert not any(thread.name == "xllm-alarm" for thread in threading.enumerate())


def test_an_alarm_that_was_never_set_has_no_thread() -> None:
    alarm = EngineAlarm(lambda: None)
    alarm.set(math.inf)
    assert alarm._thread is None
    alarm.close()
