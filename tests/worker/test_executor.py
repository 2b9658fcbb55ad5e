"""The executors that the platform names exist, and are vLLM's with ours in front."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.accelerator.platform import EXECUTORS

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    shims.install()
    pytest.importorskip("vllm")


def load(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module_name), name)


@pytest.mark.parametrize(
    ("backend", "base"),
    [
        ("mp", "vllm.v1.executor.multiproc_executor.MultiprocExecutor"),
        ("uni", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
    ],
)
def test_each_backend_has_an_executor_of_ours(backend: str, base: str) -> None:
    executor = load(EXECUTORS[backend])
    mixin = load("xllm_plugin.worker.executor.XllmExecutorMixin")
    assert executor.__mro__.index(mixin) < executor.__mro__.index(load(base))
    assert executor.supports_pp == load(base).supports_pp


class Worker:
    """Notes on which thread each call came."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def shutdown(self) -> None: ...

    def execute_model(self, step: int) -> int:
        self.threads.append(threading.current_thread().name)
        if step < 0:
            raise ValueError(step)
        return step


@pytest.fixture
def executor_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], Any]]:
    """Build the executor over a stand-in worker, with or without asynchronous scheduling."""
    executor_class = load(EXECUTORS["uni"])
    built = []

    def start(self: Any) -> None:
        self.driver_worker = Worker()
        self.driver_worker.execute_model(0)

    def build(async_scheduling: bool) -> Any:
        executor = executor_class.__new__(executor_class)
        executor.scheduler_config = SimpleNamespace(async_scheduling=async_scheduling)
        executor._init_executor()
        built.append(executor)
        return executor

    monkeypatch.setattr(load(EXECUTORS["uni"]).__mro__[2], "_init_executor", start)
    yield build
    for executor in built:
        executor.shutdown()


def test_the_engine_s_own_thread_computes(executor_of: Callable[[bool], Any]) -> None:
    executor = executor_of(False)
    assert executor.execute_model(7) == 7
    assert executor.execute_model(8, non_block=True).result() == 8
    assert set(executor.driver_worker.threads) == {threading.current_thread().name}


def test_under_asynchronous_scheduling_one_model_thread_does(
    executor_of: Callable[[bool], Any],
) -> None:
    executor = executor_of(True)
    worker = executor.driver_worker
    futures = [executor.execute_model(step, non_block=True) for step in (1, 2, 3)]
    assert [future.result() for future in futures] == [1, 2, 3]
    assert executor.execute_model(4) == 4
    assert len(worker.threads) == 5  # the first from the start
    (name,) = set(worker.threads)
    assert name.startswith("xllm-model")


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_what_the_worker_raises_arrives(
    executor_of: Callable[[bool], Any], async_scheduling: bool
) -> None:
    executor = executor_of(async_scheduling)
    with pytest.raises(ValueError, match="-1"):
        executor.execute_model(-1)
    with pytest.raises(ValueError, match="-2"):
        executor.execute_model(-2, non_block=True).result()
    assert executor.execute_model(5) == 5


def test_shutting_down_twice_is_fine(executor_of: Callable[[bool], Any]) -> None:
    executor = executor_of(True)
    executor.shutdown()
    executor.shutdown()
