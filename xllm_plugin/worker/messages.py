"""What travels with a step: scheduler to worker, and back.

vLLM's `SchedulerOutput` and `ModelRunnerOutput` are plain dataclasses that the executors pickle, so
one extra attribute of ours reaches the other side in step order, with no channel beside it
(seam "step-attributes").  Both records are frozen; later features add fields with defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xllm_plugin.xtensor.messages import MemoryChange, MemoryReport

__all__ = ["StepMessage", "StepStamp", "attach", "attached"]

ATTRIBUTE = "xllm"


@dataclass(frozen=True, slots=True)
class StepMessage:
    """From the scheduler: what this step means beyond vLLM's own schedule.

    Attributes:
        step: counts the engine's steps from 1; 0 for one without tokens.
        memory: to be carried out before it, or None.
    """

    step: int
    memory: MemoryChange | None = None


@dataclass(frozen=True, slots=True)
class StepStamp:
    """From the worker: what the step took.

    Attributes:
        step: the `StepMessage.step` it answers.
        duration_ms: from the start of `execute_model` to the sampled tokens, in the worker; the
            time spent waiting for the engine between the two calls is not counted.
        memory: the pages after a step that brought a `StepMessage.memory`, else None.
    """

    step: int
    duration_ms: float
    memory: MemoryReport | None = None


def attach(carrier: Any, record: StepMessage | StepStamp) -> None:
    """Put the record on vLLM's output object."""
    setattr(carrier, ATTRIBUTE, record)


def attached(carrier: Any) -> Any:
    """Return the record on vLLM's output object, or None."""
    return getattr(carrier, ATTRIBUTE, None)
