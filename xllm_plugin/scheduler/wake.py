"""Waking an idle engine: for a control call that was queued, or because a time has come.

An engine without requests sleeps on its input queue.  vLLM has a message that wakes it and means
nothing else (`EngineCoreRequestType.WAKEUP`), but gives its scheduler no way to the queue; ours is
told of it when the engine first looks for input (seam "engine-wake").  Awake, the engine asks the
scheduler whether there are requests: who has it woken must see to it that the answer is yes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["EngineAlarm", "EngineWaker"]


class EngineWaker:
    """Wakes the engine of this process; does nothing where it has no loop of its own.

    A program that is its own engine (`LLM` without multiprocessing) takes steps when it wants to.
    """

    def __init__(self) -> None:
        self._put: Callable[[Any], None] | None = None
        self._is_pending = False

    def wake(self) -> None:
        """Wake the engine, from any thread."""
        self._is_pending = True
        if self._put is not None:
            from vllm.v1.engine import EngineCoreRequestType

            self._put((EngineCoreRequestType.WAKEUP, None))

    def take(self) -> bool:
        """Whether somebody has woken the engine since the last time; on the engine's thread."""
        was_pending, self._is_pending = self._is_pending, False
        return was_pending

    @property
    def is_pending(self) -> bool:
        """Whether somebody wants a step."""
        return self._is_pending

    def find(self, engine_class: type[Any], scheduler: Any) -> None:
        """Learn the queue when the engine with this scheduler first looks for input.

        Args:
            engine_class: vLLM's `EngineCoreProc`.
            scheduler: that the engine holds.
        """
        look = engine_class._process_input_queue  # noqa: SLF001  seam "engine-wake"

        def first_look(engine: Any) -> Any:
            if engine.scheduler is scheduler:
                self._put = engine.input_queue.put_nowait
                engine_class._process_input_queue = look  # noqa: SLF001
            return look(engine)

        engine_class._process_input_queue = first_look  # noqa: SLF001


class EngineAlarm:
    """Wakes the engine at a time, the next of those it was last set to.

    Args:
        wake: called on the alarm's own thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self, wake: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._wake = wake
        self._clock = clock
        self._at_s = math.inf
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def set(self, at_s: float) -> None:
        """Ring then and not before; infinity is never.  From the engine's thread, at every step."""
        # The thread waits for the earlier time and then looks again, so it need not hear of later.
        with self._changed:
            was_s, self._at_s = self._at_s, at_s
            if at_s >= was_s:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="xllm-alarm", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with self._changed:
            while self._thread is threading.current_thread():
                left_s = self._at_s - self._clock()
                if left_s > 0:
                    self._changed.wait(None if left_s == math.inf else left_s)
                    continue
                self._at_s = math.inf
                self._wake()
