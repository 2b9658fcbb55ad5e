"""The executors: vLLM's own, under names of ours, chosen by class path."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

__all__ = ["XllmMultiprocExecutor", "XllmUniProcExecutor"]


class XllmExecutorMixin:
    """Stands before vLLM's executor in the bases; later parts hook their work in here."""


class XllmMultiprocExecutor(XllmExecutorMixin, MultiprocExecutor):
    """One process a rank, beside the engine process."""


class XllmUniProcExecutor(XllmExecutorMixin, UniProcExecutor):
    """The one rank lives in the engine process.

    Without asynchronous scheduling the engine's own thread computes.  With it a model thread makes
    every call on the worker, in order, from the first on, so that OpenMP has one master and its
    threads are started once; the engine's thread schedules the next step meanwhile.
    """

    _model_thread: ThreadPoolExecutor | None = None

    def _init_executor(self) -> None:
        if not self.scheduler_config.async_scheduling:
            super()._init_executor()
            return
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="xllm-model")
        self._model_thread.submit(super()._init_executor).result()

    def collective_rpc(  # noqa: PLR0917  vLLM's signature
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        """Call the worker; see vllm/v1/executor/abstract.py.

        Returns:
            What the worker returned, or with `non_block` a future of it.
        """
        call = super().collective_rpc
        if self._model_thread is None:
            return call(method, timeout, args, kwargs, non_block, single_value)
        future: Future[Any] = self._model_thread.submit(
            call, method, timeout, args, kwargs, False, single_value
        )
        return future if non_block else future.result(timeout)

    def shutdown(self) -> None:
        """Let the calls under way end, then end the worker."""
        if self._model_thread is not None:
            self._model_thread.shutdown(cancel_futures=True)
            self._model_thread = None
        super().shutdown()
