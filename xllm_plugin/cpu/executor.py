"""Asynchronous scheduling on the CPU (paper 4.1): steps run on a thread beside the engine's."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.serial_utils import run_method

from xllm_plugin.worker.executor import XllmUniProcExecutor

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput

__all__ = ["XllmCpuAsyncExecutor", "compute_with"]

OMP_PAUSE_SOFT = 1


class XllmCpuAsyncExecutor(XllmUniProcExecutor):
    """The one rank lives in the engine's process, on a thread of its own: the model thread.

    It builds the worker and runs every call to it in order, so `execute_model(non_block=True)`
    returns at once and the engine schedules the next step and answers for the last one meanwhile.
    vLLM's executor runs the step inside that call, which suits devices that compute by themselves.
    """

    _model_thread: ThreadPoolExecutor
    _step: Future[Any] | None = None

    def _init_executor(self) -> None:
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="xllm-model")
        self._model_thread.submit(super()._init_executor).result()
        self._num_engine_threads = compute_with(1)

    def collective_rpc(  # noqa: PLR0917  as vLLM's
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        """Call the worker after every call before; see vLLM's `Executor.collective_rpc`.

        Returns:
            The worker's answer in a list, or bare with `single_value`; with `non_block` a Future.

        Raises:
            TimeoutError: it and the calls before it took longer than `timeout` seconds.
        """
        opened = self._step if method == "sample_tokens" else None

        def call() -> Any:
            if opened is not None:
                opened.result()  # Of a step that failed there is nothing to sample.
            answer = run_method(self.driver_worker, method, args, kwargs or {})
            return answer if single_value else [answer]

        future = self._model_thread.submit(call)
        if method == "execute_model":
            self._step = future
        return future if non_block else future.result(timeout)

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """Finish the step that `execute_model` left open; see vLLM's `Executor.sample_tokens`."""
        if grammar_output is not None:
            # vLLM fills one buffer for every step, and may fill it again before this one is read.
            bitmask = grammar_output.grammar_bitmask.copy()
            grammar_output = dataclasses.replace(grammar_output, grammar_bitmask=bitmask)
        return super().sample_tokens(grammar_output, non_block)

    def shutdown(self) -> None:
        """End the model thread after the call it is in, then the worker."""
        self._model_thread.shutdown(cancel_futures=True)
        # Here, and not as a last call there: at the interpreter's end the thread is gone already.
        super().shutdown()
        compute_with(self._num_engine_threads)


def compute_with(num_threads: int) -> int:
    """Set how many threads the calling thread computes with, and end those it has.

    OpenMP keeps a team of threads for every thread that has computed.  libgomp (target.c,
    `gomp_pause_host`; team.c, `gomp_managed_threads`) stops spinning in its barriers when there
    are more threads in all teams than processors: with a second team, of the engine's thread, a
    decode step took 6-10 ms longer on 2 cores.

    Returns:
        The number before.
    """
    before = torch.get_num_threads()  # Asked first: torch sets a thread's number when it starts.
    # Of the library that torch computes with; `torch.set_num_threads` would set it for threads that
    # start later too, and vLLM's worker puts a function without effect in its place.
    openmp = ctypes.CDLL(None)
    openmp.omp_set_num_threads(num_threads)
    openmp.omp_pause_resource_all(OMP_PAUSE_SOFT)
    return before
