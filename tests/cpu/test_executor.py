"""A worker on a thread of its own: calls in order, Futures that fail alike, an end that waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from xllm_plugin import shims

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@dataclass
class GrammarOutput:
    """As much of vLLM's as the executor reads."""

    grammar_bitmask: Any


class Worker:
    """Stands for vLLM's worker; `gate` holds a step back."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def _note(self, name: str, argument: Any = None) -> None:
        self.calls.append((name, argument, threading.current_thread().name))

    def execute_model(self, step: Any) -> None:
        assert self.gate.wait(60)
        self._note("execute_model", step)
        if self.error is not None:
            raise self.error

    def sample_tokens(self, grammar: Any) -> str:
        self._note("sample_tokens", None if grammar is None else grammar.grammar_bitmask.tolist())
        return "tokens"

    def shutdown(self) -> None:
        self._note("shutdown")


@pytest.fixture(scope="module", autouse=True)
def executor_class() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu.executor import XllmCpuAsyncExecutor

    return XllmCpuAsyncExecutor


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def executor(executor_class: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    def make_worker(self: Any) -> None:
        worker._note("made")
        self.driver_worker = worker

    # What vLLM does to make a worker is vLLM's to test.
    monkeypatch.setattr(UniProcExecutor, "_init_executor", make_worker)
    made = executor_class.__new__(executor_class)
    made._init_executor()
    yield made
    worker.gate.set()
    made.shutdown()


def test_a_step_runs_while_the_engine_goes_on(executor: Any, worker: Worker) -> None:
    worker.gate.clear()
    opened = executor.execute_model("step 1", non_block=True)
    sampled = executor.sample_tokens(None, non_block=True)
    assert not opened.done()
    assert not sampled.done()
    worker.gate.set()
    assert sampled.result(60) == "tokens"
    assert opened.result(60) is None


def test_every_call_runs_in_order_on_the_one_thread(executor: Any, worker: Worker) -> None:
    for step in range(3):
        executor.execute_model(step, non_block=True)
        executor.sample_tokens(None, non_block=True)
    (thread,) = executor.collective_rpc(lambda _: threading.current_thread().name)
    expected = [("made", None)]
    for step in range(3):
        expected += [("execute_model", step), ("sample_tokens", None)]
    assert [call[:2] for call in worker.calls] == expected
    assert {call[2] for call in worker.calls} == {thread}
    assert thread != threading.current_thread().name


def test_a_call_that_waits_answers_as_vllm_s_does(executor: Any) -> None:
    assert executor.collective_rpc("sample_tokens", args=(None,)) == ["tokens"]
    assert executor.sample_tokens(None) == "tokens"
    assert executor.collective_rpc("sample_tokens", None, (None,), None, True).result(60) == [
        "tokens"
    ]


def test_a_failed_step_fails_where_its_tokens_are_awaited(executor: Any, worker: Worker) -> None:
    worker.error = ArithmeticError("the kernel failed")
    executor.execute_model("step", non_block=True)
    sampled = executor.sample_tokens(None, non_block=True)
    with pytest.raises(ArithmeticError, match="the kernel failed"):
        sampled.result(60)
    assert "sample_tokens" not in {call[0] for call in worker.calls}
    worker.error = None
    executor.execute_model("next", non_block=True)
    assert executor.sample_tokens(None, non_block=True).result(60) == "tokens"


def test_the_mask_of_a_step_is_the_one_it_was_given(executor: Any, worker: Worker) -> None:
    """vLLM fills the same buffer for the next step, before this one has come to sample."""
    buffer = np.array([[1, 2]], dtype=np.int32)
    worker.gate.clear()
    executor.execute_model("step 1", non_block=True)
    sampled = executor.sample_tokens(GrammarOutput(buffer), non_block=True)
    buffer[:] = 0
    worker.gate.set()
    sampled.result(60)
    assert worker.calls[-1][:2] == ("sample_tokens", [[1, 2]])


def test_a_call_can_take_too_long(executor: Any, worker: Worker) -> None:
    worker.gate.clear()
    with pytest.raises(TimeoutError):
        executor.collective_rpc("execute_model", timeout=0.01, args=("step",))


def test_the_end_waits_for_the_step_and_drops_what_waits(executor: Any, worker: Worker) -> None:
    worker.gate.clear()
    running = executor.execute_model("step 1", non_block=True)
    executor.collective_rpc(lambda _: None, non_block=True)
    waiting = executor.execute_model("step 2", non_block=True)
    threading.Timer(0.05, worker.gate.set).start()
    executor.shutdown()
    assert running.done()
    assert worker.calls[-1][0] == "shutdown"
    assert waiting.cancelled() or waiting.done()


def test_the_engine_s_thread_computes_alone_as_long_as_the_executor_lives(
    executor: Any,
) -> None:
    """A second OpenMP team would stop the model thread's from spinning."""
    assert torch.get_num_threads() == 1
    executor.shutdown()
    assert torch.get_num_threads() == executor._num_engine_threads


def test_only_the_calling_thread_is_set(executor_class: Any) -> None:
    from xllm_plugin.cpu.executor import compute_with

    del executor_class
    found: list[int] = []
    before = torch.get_num_threads()
    thread = threading.Thread(target=lambda: found.extend([compute_with(1), compute_with(3)]))
    thread.start()
    thread.join(60)
    assert found == [before, 1]
    assert torch.get_num_threads() == before
