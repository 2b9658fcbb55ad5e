"""The executors: vLLM's own, under names of ours, chosen by class path."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.executor.abstract import SLEEP_TAGS
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from xllm_plugin.errors import NotNowError

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

__all__ = ["XllmExecutorMixin", "XllmMultiprocExecutor", "XllmUniProcExecutor"]

logger = logging.getLogger("vllm.xllm_plugin")


class XllmExecutorMixin:
    """Stands before vLLM's executor in the bases; later parts hook their work in here."""

    parallel_config: ParallelConfig
    sleeping_tags: set[str]

    def sleep(self, level: int = 1) -> None:
        """Let every rank sleep, or none; see vLLM's `Executor.sleep` (seam "sleep-of-ranks").

        When a rank raises, vLLM takes all to be awake, so no `/wake_up` reaches those that are
        asleep; and its executor of several processes leaves their answers to be taken for those of
        its next call.  So ranks say here what keeps them.

        Raises:
            NotNowError: a rank cannot sleep.  All are awake, unless the message says otherwise.
        """
        if self.parallel_config.world_size == 1 or "weights" in self.sleeping_tags:
            super().sleep(level)  # type: ignore[misc]
            return
        refused = self._what_keeps("try_sleep", level)
        if not refused:
            self.sleeping_tags |= SLEEP_TAGS
            return
        why = "; ".join(f"rank {rank}: {said.rstrip('.')}" for rank, said in refused.items())
        asleep = self._what_keeps("try_wake_up")
        if asleep:
            logger.error("xllm-plugin: a sleep that failed could not be undone: %s", asleep)
            why += (
                f". Of ranks {sorted(asleep)} a part is still away, and no request can be "
                "answered: POST /sleep again, or restart the engine. Do not call /wake_up: to "
                "vLLM this engine is awake, so it would go on with requests, and end"
            )
        raise NotNowError(f"{why}.")

    def _what_keeps(self, method: str, *args: Any) -> dict[int, str]:
        """Ask all ranks to do something; what those said that could not, by rank."""
        said = self.collective_rpc(method, args=args)  # type: ignore[attr-defined]
        return {rank: why for rank, why in enumerate(said) if why is not None}


class XllmMultiprocExecutor(XllmExecutorMixin, MultiprocExecutor):
    """One process a rank, beside the engine process."""


class XllmUniProcExecutor(XllmExecutorMixin, UniProcExecutor):
    """The one rank lives in the engine process."""
