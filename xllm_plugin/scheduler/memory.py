"""The elastic KV cache as the scheduler holds it: steps, the control socket, an idle engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process
from typing import TYPE_CHECKING, Any, Final

from xllm_plugin.config import load_config
from xllm_plugin.errors import XllmError
from xllm_plugin.scheduler.wake import EngineAlarm, EngineWaker
from xllm_plugin.xtensor.messages import MEMORY_SECTION, MemoryChange, MemorySection

if TYPE_CHECKING:
    from xllm_plugin.channel.engine import EngineChannel
    from xllm_plugin.worker.messages import StepStamp
    from xllm_plugin.xtensor.kv_cache import ElasticKvCache

__all__ = ["MemoryControl", "ending_the_engine"]

ENGINE_PROCESS: Final = "EngineCore"
"""How vLLM names the process of an engine that is a server's (vllm/v1/engine/utils.py)."""


class MemoryControl:
    """What a scheduler does about memory; nothing, where the KV cache is not elastic.

    Args:
        scheduler: vLLM's, just made.
        channel: of the engine, not yet started.
        waker: of the engine's process.
    """

    def __init__(self, scheduler: Any, channel: EngineChannel, waker: EngineWaker) -> None:
        self._scheduler = scheduler
        self._cache: ElasticKvCache | None = None
        self._alarm = EngineAlarm(waker.wake)
        config = load_config(scheduler.vllm_config.additional_config).xtensor
        # A model without attention has nothing to keep.
        if not config.enabled or not scheduler.kv_cache_config.kv_cache_tensors:
            return
        from vllm.v1.engine.core import EngineCoreProc

        from xllm_plugin.xtensor.kv_cache import ElasticKvCache

        waker.find(EngineCoreProc, scheduler)
        with ending_the_engine():
            self._cache = ElasticKvCache.adopt(
                scheduler.kv_cache_manager,
                scheduler.kv_cache_config,
                scheduler.vllm_config,
                config,
            )
        channel.add_section(MEMORY_SECTION, self._cache.section)
        channel.register_call("set_memory_budget", self.set_memory_budget, on_engine_thread=True)

    def set_memory_budget(self, budget_bytes: int) -> MemorySection:
        """Change how much memory the KV cache may take."""
        assert self._cache is not None
        return self._cache.set_budget(budget_bytes)

    def plan(self) -> None:
        """Decide what is given back, before a step is scheduled."""
        if self._cache is not None:
            # Those that a pause keeps do not count: asleep, nothing beyond the minimum is needed.
            self._cache.plan(num_requests=self._scheduler.get_num_unfinished_requests())

    def take_change(self) -> MemoryChange | None:
        """What the step that was just scheduled tells the workers, or None."""
        if self._cache is None or self._cache.has_told:
            return None
        change = self._cache.take_change()
        self._alarm.set(self._cache.next_work_s())
        return change

    def record(self, stamp: StepStamp | None) -> None:
        """Take in what a worker says of its pages."""
        if self._cache is not None and stamp is not None and stamp.memory is not None:
            self._cache.record(stamp.memory)

    def has_work(self) -> bool:
        """Whether a step is wanted though no request asks for one."""
        return self._cache is not None and self._cache.has_work()

    def close(self) -> None:
        """End the alarm's thread, and leave what is shared."""
        self._alarm.close()
        if self._cache is not None:
            self._cache.close()


@contextmanager
def ending_the_engine() -> Iterator[None]:
    """End a server's engine with the message and the exit code of what is raised inside.

    vLLM would print a traceback of it, and so would the server, to which only the exit code goes
    (`cli/explain.py` reads it).  A program that is its own engine gets the exception.
    """
    try:
        yield
    except XllmError as error:
        is_alone = current_process().name.startswith(ENGINE_PROCESS)
        if is_alone and not os.environ.get("XLLM_TRACEBACK"):
            error.stop()
        raise
