"""The executors: vLLM's own, under names of ours, chosen by class path."""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

__all__ = ["XllmMultiprocExecutor", "XllmUniProcExecutor"]


class XllmExecutorMixin:
    """Stands before vLLM's executor in the bases; later parts hook their work in here."""


class XllmMultiprocExecutor(XllmExecutorMixin, MultiprocExecutor):
    """One process a rank, beside the engine process."""


class XllmUniProcExecutor(XllmExecutorMixin, UniProcExecutor):
    """The one rank lives in the engine process."""
