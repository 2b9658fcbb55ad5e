"""The memory of a model's weights goes back to the system, and comes back at the same addresses.

Native layers, compiled graphs and vLLM's own code hold on to those.  So only whole pages go, and
only those of tensors: what oneDNN has packed has no address that it would tell.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch

from xllm_plugin.cpu.native.linear import PackedLinear
from xllm_plugin.cpu.vm_calls import VmCalls
from xllm_plugin.errors import NotNowError
from xllm_plugin.models.cache import ModelCache

__all__ = ["PageRun", "WeightMemory", "whole_pages"]


class PageRun(NamedTuple):
    """Consecutive pages of this process; address and size are multiples of the system's page."""

    address: int
    num_bytes: int

    def view(self) -> memoryview:
        """Its bytes, to read and write."""
        return memoryview((ctypes.c_char * self.num_bytes).from_address(self.address)).cast("B")


class WeightMemory:
    """The memory of one model's weights, here or away.

    If the kernel refuses to take memory back half-way, `is_away` says that some of it is gone;
    `restore` brings that back, where the weights are kept.  Whoever calls `park` does that.

    Args:
        directory: where `park` writes them, `sleep` in the cache of models by default; on a disk,
            for a file in memory would win nothing.
        calls: the kernel.
    """

    def __init__(self, directory: Path | None = None, calls: VmCalls | None = None) -> None:
        self._directory = directory or ModelCache.at().root / "sleep"
        self._calls = calls or VmCalls()
        self._away: tuple[PageRun, ...] = ()
        self._file: FileIO | None = None

    @property
    def is_away(self) -> bool:
        """Whether weights, all or some, are zeros at this moment."""
        return bool(self._away)

    @property
    def is_kept(self) -> bool:
        """Whether they are in a file and can be read back."""
        return self._file is not None

    def park(self, model: torch.nn.Module) -> int:
        """Write the weights to a file and give their memory back; return how many bytes that is.

        Raises:
            NotNowError: the file cannot be written, and the weights are as they were; or the kernel
                refused, and they are away and kept.
        """
        runs = whole_pages(weights_of(model))
        try:
            self._file = self._written(runs)
        except OSError as error:
            raise NotNowError(
                f"the weights cannot be written to {self._directory}: {error}. Make room there, "
                "set engine.sleep_dir to another directory, or sleep at level 2. The engine is "
                "paused; /wake_up resumes it."
            ) from error
        return self._drop(runs)

    def drop(self, model: torch.nn.Module) -> int:
        """Give the memory of weights back without keeping them; return how many bytes that is.

        Buffers stay: no checkpoint has them.

        Raises:
            NotNowError: the kernel refused, and what is gone by then has to be loaded again.
        """
        return self._drop(whole_pages(weights_of(model, with_buffers=False)))

    def restore(self) -> None:
        """Have the weights read back where they were; what `drop` dropped is zeros.

        Raises:
            NotNowError: the file cannot be read.  The message has no next step: while an engine
                falls asleep it is another one than while it wakes.
        """
        if self._file is not None:
            try:
                self._file.seek(0)
                for run in self._away:
                    _each(self._file.readinto, run)
            except OSError as error:
                raise NotNowError(
                    f"the weights cannot be read back from {self._directory}: {error}."
                ) from error
            self._file.close()
            self._file = None
        self._away = ()

    def _written(self, runs: tuple[PageRun, ...]) -> FileIO:
        self._directory.mkdir(parents=True, exist_ok=True)
        # Without a name, so that a killed process leaves nothing behind.
        file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - kept open
        try:
            for run in runs:
                _each(file.write, run)
        except OSError:
            file.close()
            raise
        return file

    def _drop(self, runs: tuple[PageRun, ...]) -> int:
        for number, run in enumerate(runs, start=1):
            self._away = runs[:number]  # before the call: it may do a part of the run and then fail
            try:
                self._calls.drop(run.address, run.num_bytes)
            except OSError as error:
                raise NotNowError(
                    f"the kernel did not take the weights' memory back: {error}. Try again, or "
                    "restart the engine. The engine is paused; /wake_up resumes it."
                ) from error
        return sum(run.num_bytes for run in runs)


def weights_of(model: torch.nn.Module, *, with_buffers: bool = True) -> Iterator[torch.Tensor]:
    """Every tensor that holds weights, those packed for native layers included; some twice."""
    yield from model.parameters()
    if with_buffers:
        yield from model.buffers()
    for module in model.modules():
        linear = getattr(module, "cpu_linear", None)
        if isinstance(linear, PackedLinear):
            yield from linear.tensors()
        else:
            # vLLM's own packed weights are variables of a lambda
            # (vllm/model_executor/layers/utils.py, `dispatch_cpu_unquantized_gemm`).
            for cell in getattr(linear, "__closure__", None) or ():
                if isinstance(cell.cell_contents, torch.Tensor):
                    yield cell.cell_contents


def whole_pages(tensors: Iterable[torch.Tensor]) -> tuple[PageRun, ...]:
    """The pages that belong to the tensors' storages alone, in order, neighbours together."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.is_cpu)
    }
    runs: list[tuple[int, int]] = []  # first byte, and the first behind
    for start, num_bytes in sorted(storages.items()):
        end = start + num_bytes
        if runs and runs[-1][1] >= start:
            runs[-1] = (runs[-1][0], max(runs[-1][1], end))
        else:
            runs.append((start, end))
    page = os.sysconf("SC_PAGE_SIZE")
    inner = ((-(-start // page) * page, end // page * page) for start, end in runs)
    return tuple(PageRun(start, end - start) for start, end in inner if end > start)


def _each(call: Callable[[memoryview], int | None], run: PageRun) -> None:
    """Write or read a whole run; one call of the kernel does 2 GiB at most."""
    left = run.view()
    while left:
        num_bytes = call(left)
        if not num_bytes:
            raise OSError(f"{len(left)} bytes are missing")
        left = left[num_bytes:]
