"""Which part of a step each moment belongs to.  Imports neither torch nor vLLM."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from xllm_plugin.errors import SeamError

__all__ = ["METHODS", "PARTS", "REST", "PartTimer", "Step", "typical"]

REST: Final = "rest"
PARTS: Final = (
    "scheduling",
    "input preparation",
    "forward",
    "logits",
    "sampling",
    "bookkeeping",
    REST,
)

METHODS: Final[Mapping[str, Mapping[str, str]]] = {
    "scheduler": {"schedule": "scheduling", "update_from_output": "bookkeeping"},
    "runner": {
        "_update_states": "input preparation",
        "_prepare_inputs": "input preparation",
        "_determine_batch_execution_and_padding": "input preparation",
        "_get_slot_mappings": "input preparation",
        "_build_attention_metadata": "input preparation",
        "_preprocess": "input preparation",
        "_model_forward": "forward",
        "_sample": "sampling",
        "_update_states_after_model_execute": "bookkeeping",
        "_bookkeeping_sync": "bookkeeping",
    },
    "model": {"compute_logits": "logits"},
}
"""Owner -> method -> part, of vLLM 0.32 (v1/worker/gpu_model_runner.py, v1/core/sched)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: tokens scheduled for each request, and milliseconds of each part."""

    tokens: tuple[int, ...]
    parts_ms: Mapping[str, float]

    @property
    def whole_ms(self) -> float:
        """The whole step; the parts are without overlap and without gaps."""
        return sum(self.parts_ms.values())

    def is_decode(self, batch: int) -> bool:
        """Whether it made one token for each of `batch` requests and did nothing else."""
        return self.tokens == (1,) * batch

    def is_prefill(self, tokens: int) -> bool:
        """Whether it read one prompt of `tokens` tokens and did nothing else."""
        return self.tokens == (tokens,)


class PartTimer:
    """Replaces methods by timed ones; what a call spends in another timed call is that one's.

    The outermost method is the step itself, whose own time is the rest.  So the parts of a step
    add up to the whole, whatever calls what.  All calls have to be made by one thread.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._inner_s = 0.0
        self._parts_s = dict.fromkeys(PARTS, 0.0)

    def attach(self, owner: Any, method: str, part: str) -> None:
        """Time `owner.method` from now on.  Raises `SeamError` when it has none."""
        if not callable(getattr(owner, method, None)):
            raise SeamError(
                f"{type(owner).__name__} has no method {method!r} to time; the step benchmark "
                "knows vLLM 0.32, so compare benchmarks/step/parts.py with the installed vLLM"
            )
        setattr(owner, method, self._timed(getattr(owner, method), part))

    def take_ms(self) -> dict[str, float]:
        """The parts since the last call, in milliseconds."""
        taken = {part: seconds * 1e3 for part, seconds in self._parts_s.items()}
        self._parts_s = dict.fromkeys(PARTS, 0.0)
        return taken

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            around_s, self._inner_s = self._inner_s, 0.0
            started_s = self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                took_s = self._clock() - started_s
                self._parts_s[part] += took_s - self._inner_s
                self._inner_s = around_s + took_s

        return timed


def typical(steps: Sequence[Step]) -> dict[str, float]:
    """The parts of a typical step, in milliseconds: the mean over the middle half by whole time.

    A mean, so that the parts still add up; of the middle half, so that a step which the machine
    interrupted does not count.
    """
    ordered = sorted(steps, key=lambda step: step.whole_ms)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return {part: statistics.fmean(step.parts_ms[part] for step in middle) for part in PARTS}
