"""Steps in a file, one JSON object a line: what was in each, how long it was to take, and took.

For who asks why tokens were late, or whether the step-time model fits a device.  Lines can be read
by anything; `read_trace` reads them back.  Imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from xllm_plugin.errors import ConfigError
from xllm_plugin.scheduler.predictor import StepShape

__all__ = ["StepTrace", "TracedStep", "read_trace"]

logger = logging.getLogger(__name__)

MODE: Final = 0o600
"""Lengths and moments of requests say something about who sent them."""


class TracedStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step that has ended.

    Attributes:
        step: its number, from 1.
        rank: of the engine, under data parallelism.
        began_s: when it was planned, monotonic seconds.
        shape: what was in it.
        predicted_ms: before it ran.
        error: of the step-time model then, see `StepModel`.
        measured_ms: as a request waits for it, `gap_ms` and planning included.
        worker_ms: of these, in the worker.
        gap_ms: of these, from the end of the step before to the planning of this one.
        bound: what kept it from being larger; empty if it was not planned.
        num_running: requests that the plan chose from the batch, and those that it held.
        num_held: of these, left out.
        num_waiting: requests in the queue, of both classes.
        num_late: of these, online ones whose TTFT could no longer be met.
    """

    step: int
    rank: int = 0
    began_s: float
    shape: StepShape
    predicted_ms: float
    error: float
    measured_ms: float
    worker_ms: float
    gap_ms: float = 0.0
    bound: str = ""
    num_running: int = 0
    num_held: int = 0
    num_waiting: int = 0
    num_late: int = 0


class StepTrace:
    """Appends steps to a file; a line is written whole, so several engines may share one.

    Args:
        path: of the file, which may exist.
        rank: of the engine, under data parallelism.

    Raises:
        ConfigError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.rank = rank
        self._path = path
        self._encoder = msgspec.json.Encoder()
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE)
        except OSError as error:
            raise ConfigError(
                f"scheduler.step_trace is {path}, which cannot be written: {error.strerror}. Give "
                "a file in a directory that exists and is yours."
            ) from error

    def write(self, step: TracedStep) -> None:
        """Append one step.  If the file cannot take it, the trace ends and the log says so."""
        if self._file is None:
            return
        line = self._encoder.encode(step) + b"\n"
        try:
            os.write(self._file, line)
        except OSError as error:
            logger.warning("the trace of steps in %s ends here: %s", self._path, error)
            self.close()

    def close(self) -> None:
        """Close the file.  Safe to repeat."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_trace(path: Path) -> Iterator[TracedStep]:
    """The steps in a file that `StepTrace` wrote, in order; a last line that is cut is left out.

    Raises:
        ConfigError: the file cannot be read, or is none of these.
    """
    decoder = msgspec.json.Decoder(TracedStep)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        steps = [decoder.decode(line) for line in lines]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} holds no steps: {error}. Give the file that scheduler.step_trace named."
        ) from error
    yield from steps
