"""Scheduling ahead answers what scheduling step by step answers, whatever is asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.engine

SCENARIOS = (
    "sampling",
    "stop_strings",
    "structured_output",
    "prefix_caching",
    "preemption",
    "abort",
    "leftovers",
)


@pytest.fixture(scope="module")
def synchronous(drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive("async_driver", "sync")


@pytest.fixture(scope="module")
def asynchronous(drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive("async_driver", "async")


def without_logprobs(found: Any) -> Any:
    """The same with log-probs taken out, which other batches round otherwise."""
    if isinstance(found, dict):
        return {k: without_logprobs(v) for k, v in found.items() if k != "logprobs"}
    if isinstance(found, list):
        return [without_logprobs(item) for item in found]
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_clients_see_the_same(
    synchronous: dict[str, Any], asynchronous: dict[str, Any], scenario: str
) -> None:
    assert without_logprobs(asynchronous[scenario]) == without_logprobs(synchronous[scenario])


def test_log_probs_are_the_same(synchronous: dict[str, Any], asynchronous: dict[str, Any]) -> None:
    pairs = zip(asynchronous["sampling"], synchronous["sampling"], strict=True)
    asked = [(a["logprobs"], b["logprobs"]) for a, b in pairs if b["logprobs"] is not None]
    assert len(asked) == 4, "three samples of one request, and one of another"
    for found, expected in asked:
        assert found == pytest.approx(expected, abs=1e-4)


def test_the_requests_were_what_they_are_called(synchronous: dict[str, Any]) -> None:
    """Otherwise that both agree would show nothing."""
    assert len({tuple(answer["token_ids"]) for answer in synchronous["sampling"]}) > 5
    cut, kept, by_token, free = synchronous["stop_strings"]
    assert cut["stop_reason"] == kept["stop_reason"]
    assert isinstance(cut["stop_reason"], str)
    assert kept["text"] == cut["text"] + cut["stop_reason"]
    assert len(by_token["token_ids"]) <= 11
    assert free["finish_reason"] == "length"
    structured = [answer["text"] for answer in synchronous["structured_output"]]
    assert structured[0].lstrip().startswith("{")
    assert structured[1] in {"red", "green"}
    assert re.fullmatch("[0-9]{5}-[a-f]{9}", structured[2])
    assert all(count > 0 for count in synchronous["prefix_caching"]["cached"])
    assert len(synchronous["abort"]) == 2


def test_nothing_is_left_and_the_books_are_right(asynchronous: dict[str, Any]) -> None:
    assert asynchronous["leftovers"] == {
        "num_blocks_held": 0,
        "num_requests": 0,
        "num_running": 0,
        "is_idle": True,
        "is_step_timed": True,
    }


def test_steps_run_on_the_model_thread(
    synchronous: dict[str, Any], asynchronous: dict[str, Any]
) -> None:
    assert synchronous["mode"]["executor"] == "XllmUniProcExecutor"
    assert synchronous["mode"]["worker"]["thread"] == "MainThread"
    mode = asynchronous["mode"]
    assert (mode["executor"], mode["scheduler"]) == ("XllmCpuAsyncExecutor", "XllmAsyncScheduler")
    assert mode["batch_queue_size"] == 2
    assert mode["runner_is_async"] is False
    assert mode["worker"]["thread"].startswith("xllm-model")
    assert mode["worker"]["num_threads"] == synchronous["mode"]["worker"]["num_threads"]
    assert mode["engine_num_threads"] == 1


def test_a_failed_step_is_reported_as_what_it_was(asynchronous: dict[str, Any]) -> None:
    assert asynchronous["failure"] == "the kernel failed"


def test_the_program_is_as_before_when_the_engine_has_ended(asynchronous: dict[str, Any]) -> None:
    after = asynchronous["threads_after"]
    assert after["num_threads"] == asynchronous["mode"]["program_num_threads"]
    assert not [name for name in after["names"] if name.startswith("xllm-model")]
