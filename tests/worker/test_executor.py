"""The executors that the platform names are vLLM's with ours in front; ranks sleep together."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.accelerator.platform import EXECUTORS
from xllm_plugin.errors import NotNowError

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


class Rank:
    """A worker that may be unable to sleep, or to wake."""

    def __init__(self) -> None:
        self.is_asleep = False
        self.sleep_fault = self.wake_fault = ""

    def sleep(self, level: int = 1) -> None:
        if self.sleep_fault:
            raise NotNowError(self.sleep_fault)
        self.is_asleep = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        if self.wake_fault:
            raise NotNowError(self.wake_fault)
        self.is_asleep = False


def executor_of(num_ranks: int) -> tuple[Any, list[Any]]:
    """VLLM's executor with ours in front, over ranks in this process."""
    from vllm.v1.executor.abstract import Executor

    mixin = load("xllm_plugin.worker.executor.XllmExecutorMixin")
    rank = type("RankOfOurs", (load("xllm_plugin.worker.worker.XllmWorkerMixin"), Rank), {})
    ranks = [rank() for _ in range(num_ranks)]

    class Ranks(mixin, Executor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parallel_config = SimpleNamespace(world_size=num_ranks)
            self.sleeping_tags = set()

        def _init_executor(self) -> None: ...

        def check_health(self) -> None: ...

        def collective_rpc(
            self, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None
        ) -> list[Any]:
            return [getattr(one, method)(*args, **(kwargs or {})) for one in ranks]

    return Ranks(), ranks


def test_all_ranks_sleep_and_wake() -> None:
    executor, ranks = executor_of(2)
    executor.sleep(1)
    assert executor.is_sleeping
    assert [rank.is_asleep for rank in ranks] == [True, True]
    executor.sleep(1)  # a second call is vLLM's to answer
    executor.wake_up()
    assert not executor.is_sleeping
    assert [rank.is_asleep for rank in ranks] == [False, False]


@pytest.mark.parametrize("number", [0, 1])
def test_a_sleep_that_fails_on_one_rank_is_undone_on_all(number: int) -> None:
    executor, ranks = executor_of(2)
    ranks[number].sleep_fault = "the disk is full. /wake_up resumes it."
    with pytest.raises(
        NotNowError, match=rf"^rank {number}: the disk is full\. /wake_up resumes it\.$"
    ):
        executor.sleep(1)
    assert not executor.is_sleeping
    assert [rank.is_asleep for rank in ranks] == [False, False]
    ranks[number].sleep_fault = ""
    executor.sleep(1)
    assert [rank.is_asleep for rank in ranks] == [True, True]


def test_a_rank_that_can_neither_sleep_nor_wake_is_named() -> None:
    executor, ranks = executor_of(3)
    ranks[1].sleep_fault = ranks[2].sleep_fault = "no"
    ranks[0].wake_fault = "the file is gone"
    with pytest.raises(
        NotNowError,
        match=r"rank 1: no; rank 2: no\. Of ranks \[0\] .* POST /sleep again, or restart",
    ):
        executor.sleep(1)
    assert not executor.is_sleeping, "so that the next /sleep reaches it"


def test_one_rank_says_for_itself_what_it_has_undone() -> None:
    executor, (rank,) = executor_of(1)
    rank.sleep_fault, rank.wake_fault = "the disk is full", "not asked"
    with pytest.raises(NotNowError, match=r"^the disk is full$"):
        executor.sleep(1)
