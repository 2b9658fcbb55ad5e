"""Sleep on a CPU: `POST /sleep` gives memory back to the system, `/wake_up` takes it again.

vLLM's levels (vllm/v1/engine/core.py, `EngineCore.sleep`), for a machine on which weights lie in
the host's memory anyway:

0. nothing goes, the engine is paused; vLLM does that alone;
1. the KV cache is dropped; weights are written to a file on a disk and read back on waking;
2. the KV cache and the weights are dropped; weights are loaded again from the model's own files on
   waking.  (On a GPU that is left to whoever wakes the engine.)

Requests are vLLM's matter: it pauses the scheduler before it calls here, and by the mode asked for
aborts requests, lets them end, or keeps them and computes their prompts again later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from xllm_plugin.cpu.weight_memory import WeightMemory
from xllm_plugin.errors import InternalError, MisuseError, NotNowError, XllmError

__all__ = ["SleepMode", "SleepingRunner"]

logger = logging.getLogger("vllm.xllm_plugin")

KV_CACHE = "kv_cache"
WEIGHTS = "weights"

HALF_ASLEEP = (
    "A part of the engine's memory is away, and no request can be answered: POST /sleep again, "
    "which tries this first, or restart the engine. Do not call /wake_up: to vLLM this engine is "
    "awake, so it would bring nothing back, go on with requests, and the engine would end."
)
"""The next step when a sleep could be neither done nor undone.

`Executor.sleep` (vllm/v1/executor/abstract.py) notes that it sleeps when all workers have returned;
until then `Executor.wake_up` does not call them, and `EngineCore.wake_up` resumes its scheduler.
"""

STILL_ASLEEP = "Call /wake_up again, or restart the engine."


class SleepingRunner(Protocol):
    """What a model runner does for its engine's sleep."""

    def get_model(self) -> Any:
        """The model, a torch module."""
        ...

    def reload_weights(self) -> None:
        """Load the weights from the model's own files again."""
        ...

    def reload_refusal(self) -> str | None:
        """Why that is not possible, or None."""
        ...

    def sleep_kv_cache(self) -> None:
        """Give the KV cache's memory back; may be called again."""
        ...

    def wake_kv_cache(self) -> None:
        """Let it have memory again."""
        ...


class SleepMode:
    """What of a worker is away; all calls come between two steps.

    Args:
        runner: the worker's.
        weights: of the runner's model.
        clock: seconds.
    """

    def __init__(
        self,
        runner: SleepingRunner,
        weights: WeightMemory,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._weights = weights
        self._clock = clock
        self._is_kv_away = False
        self._owes_kv = False  # away by a sleep that failed: vLLM takes it to be here

    def check_awake(self, num_tokens: int) -> None:
        """Refuse a step of so many tokens while something is away.

        Raises:
            InternalError: it would compute with zeros, or where no memory is.
        """
        if num_tokens and (self._is_kv_away or self._weights.is_away):
            raise InternalError(
                f"a step of {num_tokens} tokens was scheduled while the engine sleeps; restart it "
                "and report this with the log"
            )

    def sleep(self, level: int) -> None:
        """Give the KV cache's and the weights' memory back to the system.

        Raises:
            MisuseError: there is no such level, or the weights could not be loaded again.
            NotNowError: the weights cannot be written, or memory not be given back; nothing is away
                that was not before, unless bringing it back failed as well: then the message says
                what to do, and `check_awake` refuses steps.
        """
        if level not in {1, 2}:
            raise MisuseError(f"level={level}: give 1 (weights kept in a file) or 2 (dropped).")
        if level == 2 and (reason := self._runner.reload_refusal()):  # noqa: PLR2004  the level
            raise MisuseError(
                f"level=2 drops the weights, and they could not be loaded again: {reason}. Sleep "
                "at level 1. The engine is paused; /wake_up resumes it."
            )
        started_s = self._clock()
        with advising(HALF_ASLEEP):
            self._undo()  # what a sleep that failed has left away
        self._owes_kv = not self._is_kv_away
        try:
            self._drop_kv()
            dropped_s = self._clock()
            model = self._runner.get_model()
            num_bytes = self._weights.park(model) if level == 1 else self._weights.drop(model)
        except XllmError:
            with advising(HALF_ASLEEP):
                self._undo()
            raise
        self._owes_kv = False
        logger.info(
            "xllm-plugin: asleep at level %d: KV cache away in %.0f ms, %.1f MiB of weights in "
            "%.0f ms.",
            level,
            1e3 * (dropped_s - started_s),
            num_bytes / 2**20,
            1e3 * (self._clock() - dropped_s),
        )

    def discard(self, tags: Collection[str]) -> None:
        """Give the KV cache's memory back, and let the weights be.

        Raises:
            MisuseError: something else is asked for.
            NotNowError: see `sleep`.
        """
        if set(tags) != {KV_CACHE}:
            raise MisuseError(f"tags={sorted(tags)}: only {KV_CACHE} can be discarded.")
        self._drop_kv()

    def wake_up(self, tags: Collection[str] | None = None) -> None:
        """Bring back what is away.

        Args:
            tags: "weights", "kv_cache" or both; None is both.

        Raises:
            MisuseError: there is no such tag.
            NotNowError: memory or the weights cannot be had; what is not back can be asked for
                again.
        """
        wanted = {KV_CACHE, WEIGHTS} if tags is None else set(tags)
        if not wanted <= {KV_CACHE, WEIGHTS}:
            raise MisuseError(f"tags={sorted(wanted)}: give {WEIGHTS}, {KV_CACHE} or both.")
        started_s = self._clock()
        if WEIGHTS in wanted:
            with advising(STILL_ASLEEP):
                self._bring_weights_back()
        restored_s = self._clock()
        if KV_CACHE in wanted and self._is_kv_away:
            self._wake_kv()
        logger.info(
            "xllm-plugin: %s awake: weights in %.0f ms, KV cache in %.0f ms.",
            " and ".join(sorted(wanted)),
            1e3 * (restored_s - started_s),
            1e3 * (self._clock() - restored_s),
        )

    def _undo(self) -> None:
        if self._owes_kv:
            self._wake_kv()
        self._bring_weights_back()

    def _bring_weights_back(self) -> None:
        if self._weights.is_away:
            if not self._weights.is_kept:
                self._runner.reload_weights()
            self._weights.restore()

    def _drop_kv(self) -> None:
        self._is_kv_away = True  # before the call: it may fail, and what undoes it as well
        self._runner.sleep_kv_cache()

    def _wake_kv(self) -> None:
        self._runner.wake_kv_cache()
        self._is_kv_away = self._owes_kv = False


@contextmanager
def advising(next_step: str) -> Iterator[None]:
    """Say what to do when memory or weights do not come back, whatever keeps them.

    Raises:
        NotNowError: they do not.
    """
    try:
        yield
    except Exception as error:
        raise NotNowError(f"{str(error).rstrip('.')}. {next_step}") from error
