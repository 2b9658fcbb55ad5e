"""Each step is timed in its two parts, and only a step that ran is stamped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.worker.messages import StepMessage, StepStamp, attach, attached

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


def step(number: int | None = 1) -> Any:
    """A schedule; None for one that does not come from our scheduler."""
    scheduler_output = SimpleNamespace()
    if number is not None:
        attach(scheduler_output, StepMessage(number))
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
