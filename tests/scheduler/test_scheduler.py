"""The scheduler mixin over a stand-in: every step carries a number, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
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
    from xllm_plugin.scheduler import scheduler

    return scheduler


class VllmScheduler:
    """As much of vLLM's scheduler as the mixin stands on; returns what it is told."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        pool = SimpleNamespace(num_gpu_blocks=10, get_num_free_blocks=lambda: 9)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.calls: list[tuple[Any, ...]] = []
        self.num_scheduled_tokens = 0

    def get_request_counts(self) -> tuple[int, int]:
        return (0, 0)

    def schedule(self, *args: Any) -> Any:
        self.calls.append(("schedule", *args))
        return SimpleNamespace(total_num_scheduled_tokens=self.num_scheduled_tokens)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self.calls.append(("update", scheduler_output, model_runner_output))
        return {0: SimpleNamespace(outputs=[SimpleNamespace(new_token_ids=[1, 2])])}

    def finish_requests(self, *args: Any) -> Any:
        self.calls.append(("finish", *args))
        return "finished"

    def _preempt_request(self, *args: Any) -> None:
        self.calls.append(("preempt", *args))

    def shutdown(self) -> None:
        self.calls.append(("shutdown",))


@pytest.fixture
def scheduler(module: Any, tmp_path: Path) -> Any:
    class Scheduler(module.XllmSchedulerMixin, VllmScheduler):  # type: ignore[misc]  # imported late
        """As a real one is made."""

    directory = tmp_path / "s"
    directory.mkdir(mode=0o700)
    settings = {"directory": str(directory), "snapshot_interval_ms": 0}
    vllm_config = SimpleNamespace(
        additional_config={"xllm": {"channel": settings}},
        instance_id="id",
        model_config=SimpleNamespace(served_model_name="tiny", model="tiny"),
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(data_parallel_index=0),
    )
    made = Scheduler(vllm_config)
    made.socket = directory / "id.dp0.sock"
    yield made
    made._telemetry.close()


def test_steps_are_numbered_from_one_and_empty_ones_are_not(scheduler: Any) -> None:
    numbers = []
    for num_tokens in (3, 0, 5):
        scheduler.num_scheduled_tokens = num_tokens
        numbers.append(attached(scheduler.schedule("argument")))
    assert numbers == [StepMessage(1), None, StepMessage(2)]
    assert scheduler.calls == [("schedule", "argument")] * 3


def test_what_a_step_was_is_recorded_and_vllm_s_answer_is_returned(scheduler: Any) -> None:
    scheduler.num_scheduled_tokens = 2
    scheduled, ran = scheduler.schedule(), SimpleNamespace()
    attach(ran, StepStamp(step=1, duration_ms=12.0))
    outputs = scheduler.update_from_output(scheduled, ran)
    assert outputs[0].outputs[0].new_token_ids == [1, 2]
    assert scheduler.calls[-1] == ("update", scheduled, ran)
    load = scheduler._telemetry._load_now()
    assert (load.num_steps, load.num_generated_tokens, load.last_step_ms) == (1, 2, 12.0)


def test_preemptions_are_counted(scheduler: Any) -> None:
    scheduler._preempt_request("request", 1.0)
    assert scheduler.calls == [("preempt", "request", 1.0)]
    assert scheduler._telemetry._load_now().num_preemptions == 1


def test_requests_end_as_in_vllm(scheduler: Any) -> None:
    assert scheduler.finish_requests(["a"], "aborted") == "finished"
    assert scheduler.calls == [("finish", ["a"], "aborted")]


def test_the_socket_lives_as_long_as_the_scheduler(scheduler: Any) -> None:
    assert scheduler.socket.exists()
    scheduler.shutdown()
    assert not scheduler.socket.exists()
    assert scheduler.calls == [("shutdown",)]


def test_both_of_vllm_s_schedulers_have_ours_in_front(module: Any) -> None:
    for ours, base in (
        (module.XllmScheduler, module.Scheduler),
        (module.XllmAsyncScheduler, module.AsyncScheduler),
    ):
        assert ours.__mro__.index(module.XllmSchedulerMixin) < ours.__mro__.index(base)
