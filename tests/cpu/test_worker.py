"""What the CPU worker sets up around vLLM's own."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.errors import NotNowError

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module", autouse=True)
def worker() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu import worker

    return worker


@pytest.mark.parametrize("asked", [True, False])
def test_the_runner_is_made_synchronous_and_the_scheduler_is_not(worker: Any, asked: bool) -> None:
    config = SimpleNamespace(async_scheduling=asked)
    with worker.synchronous_runner(config):
        assert config.async_scheduling is False
    assert config.async_scheduling is asked


def test_a_runner_that_cannot_be_made_leaves_the_configuration_as_it_was(worker: Any) -> None:
    config = SimpleNamespace(async_scheduling=True)
    with pytest.raises(MemoryError), worker.synchronous_runner(config):
        raise MemoryError
    assert config.async_scheduling is True


@pytest.mark.parametrize("error", [None, NotNowError("the kernel takes nothing back")])
def test_a_worker_gives_its_memory_back_before_vllm_goes_on(
    worker: Any, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    done: list[str] = []

    def close() -> None:
        done.append("memory")
        if error is not None:
            raise error

    monkeypatch.setattr(worker.CPUWorker, "shutdown", lambda self: done.append("vLLM's worker"))
    ours = worker.XllmCpuWorker.__new__(worker.XllmCpuWorker)
    ours.model_runner = SimpleNamespace(elastic_memory=SimpleNamespace(close=close))
    with nullcontext() if error is None else pytest.raises(NotNowError):
        ours.shutdown()
    assert done == ["memory", "vLLM's worker"]


def test_vllm_shuts_its_scheduler_down_after_its_workers() -> None:
    """The scheduler gives the lease of a pool back: the memory has to be gone by then."""
    from vllm.v1.engine.core import EngineCore

    source = inspect.getsource(EngineCore.shutdown)
    assert 0 < source.index("model_executor.shutdown()") < source.index("scheduler.shutdown()")
