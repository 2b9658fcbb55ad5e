"""Each step is timed in its two parts, and only a step that ran is stamped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.errors import InternalError
from xllm_plugin.worker.messages import StepMessage, StepStamp, attach, attached
from xllm_plugin.xtensor.messages import MemoryChange

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module", autouse=True)
def module() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.worker import worker

    return worker


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


class VllmWorker:
    """Stands for vLLM's worker; each call takes the time it is told and returns what it is told."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.execute_s = 0.25
        self.sample_s = 0.125
        self.executed: Any = None
        self.sampled: Any = None

    def execute_model(self, scheduler_output: Any) -> Any:
        self.clock.now_s += self.execute_s
        return self.executed

    def sample_tokens(self, grammar_output: Any) -> Any:
        self.clock.now_s += self.sample_s
        return self.sampled


@pytest.fixture
def worker(module: Any) -> Any:
    class Worker(module.XllmWorkerMixin, VllmWorker):  # type: ignore[misc]  # imported late
        """As a family's worker is made."""

    clock = ManualClock()
    made = Worker(clock)
    made._step_timer = module.StepTimer(clock)
    return made


def step(number: int | None = 1, memory: MemoryChange | None = None) -> Any:
    """A schedule; None for one that does not come from our scheduler."""
    scheduler_output = SimpleNamespace()
    if number is not None:
        attach(scheduler_output, StepMessage(number, memory))
    return scheduler_output


def model_output(*req_ids: str) -> Any:
    from vllm.v1.outputs import ModelRunnerOutput

    return ModelRunnerOutput(
        req_ids=list(req_ids), req_id_to_index={name: i for i, name in enumerate(req_ids)}
    )


def test_both_parts_of_a_step_count_and_the_wait_between_them_does_not(worker: Any) -> None:
    worker.sampled = model_output("a")
    assert worker.execute_model(step(4)) is None
    worker.clock.now_s += 10
    output = worker.sample_tokens(None)
    assert output is worker.sampled
    assert attached(output) == StepStamp(step=4, duration_ms=375.0)


def test_a_step_that_ends_in_one_call(worker: Any) -> None:
    worker.executed = model_output("a")
    assert attached(worker.execute_model(step(1))) == StepStamp(1, 250.0)


def test_a_new_step_starts_from_nothing(worker: Any) -> None:
    worker.executed = model_output("a")
    worker.execute_model(step(1))
    worker.executed = model_output("a")
    assert attached(worker.execute_model(step(2))) == StepStamp(2, 250.0)


def test_a_scheduler_that_is_not_ours_gets_vllm_s_plain_output(worker: Any) -> None:
    worker.executed = model_output("a")
    assert attached(worker.execute_model(step(None))) is None


def test_the_empty_output_that_vllm_shares_is_never_written_on(worker: Any) -> None:
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    worker.executed = worker.sampled = EMPTY_MODEL_RUNNER_OUTPUT
    assert worker.execute_model(step(1)) is EMPTY_MODEL_RUNNER_OUTPUT
    assert worker.sample_tokens(None) is EMPTY_MODEL_RUNNER_OUTPUT
    assert attached(EMPTY_MODEL_RUNNER_OUTPUT) is None


@pytest.mark.parametrize("output", [None, SimpleNamespace(req_ids=["a"])])
def test_outputs_of_other_kinds_pass_untouched(worker: Any, output: Any) -> None:
    worker.executed = output
    assert worker.execute_model(step(1)) is output
    assert attached(output) is None


def test_a_step_that_fails_leaves_the_next_one_right(worker: Any) -> None:
    def fail() -> None:
        worker.clock.now_s += 9
        raise RuntimeError("out of memory")

    timer = worker._timer
    timer.begin(StepMessage(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        timer.measure(fail)
    assert timer.stamp() == StepStamp(1, 9000.0), "what it took is known all the same"
    worker.executed = model_output("a")
    assert attached(worker.execute_model(step(2))) == StepStamp(2, 250.0)


def test_a_worker_makes_its_own_timer(module: Any, worker: Any) -> None:
    worker._step_timer = None
    timer = worker._timer
    assert isinstance(timer, module.StepTimer)
    assert worker._timer is timer
    assert type(worker)._step_timer is None


class ElasticMemory:
    """Says what it was told, and when."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.changes: list[tuple[Any, float]] = []
        self.owes = False

    def settle(self) -> None:
        self.changes.append(("settled", self.clock.now_s))
        self.owes = False

    def apply(self, change: Any) -> None:
        self.changes.append((change, self.clock.now_s))
        self.clock.now_s += 1.0

    def report(self) -> str:
        return f"report {len(self.changes)}"


def test_memory_is_changed_before_its_step_and_counts_as_its_time(worker: Any) -> None:
    worker.memory = ElasticMemory(worker.clock)
    worker.elastic_memory = lambda: worker.memory
    worker.executed = output = model_output("a")
    change = MemoryChange(budget_slabs=2, committed=(1,))
    worker.execute_model(step(1, change))
    assert worker.memory.changes == [(change, 50.0)]
    assert attached(output) == StepStamp(1, 1250.0, "report 1")  # type: ignore[arg-type]
    worker.executed = output = model_output("a")
    worker.execute_model(step(2))
    assert attached(output).memory is None


def test_a_step_without_tokens_reports_and_leaves_vllm_s_empty_output_alone(worker: Any) -> None:
    worker.memory = ElasticMemory(worker.clock)
    worker.elastic_memory = lambda: worker.memory
    worker.executed = empty = model_output()
    answer = worker.execute_model(step(0, MemoryChange(budget_slabs=2)))
    assert attached(empty) is None
    assert attached(answer).memory == "report 1"
    assert attached(worker.execute_model(step(0))) is None


def test_what_is_owed_since_sleep_is_there_before_a_step_that_says_nothing(worker: Any) -> None:
    worker.memory = ElasticMemory(worker.clock)
    worker.elastic_memory = lambda: worker.memory
    worker.memory.owes = True
    worker.executed = output = model_output("a")
    worker.execute_model(step(1))
    worker.execute_model(step(2))
    assert worker.memory.changes == [("settled", 50.0)]
    assert attached(output).memory is None


def test_a_worker_without_elastic_memory_cannot_be_told_to_change_it(worker: Any) -> None:
    with pytest.raises(InternalError, match="this worker's is not"):
        worker.execute_model(step(1, MemoryChange(budget_slabs=2)))
