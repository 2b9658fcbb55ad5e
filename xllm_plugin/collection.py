"""No garbage collection while a server imports.

vLLM and what it needs are about 7,000 modules and a million objects, nearly all of which stay.
Python's collector looks through them 2,000 times meanwhile, for 16 MiB of garbage
(benchmarks/startup/README.md).
"""

from __future__ import annotations

import atexit
import gc

__all__ = ["ImportPause", "import_pause"]


class ImportPause:
    """Python's collector, paused from the choice of the platform until the imports are done."""

    def __init__(self) -> None:
        self._is_paused = False

    def begin(self) -> None:
        """Pause, unless the program itself has.  Safe to repeat."""
        if gc.isenabled():
            gc.disable()
            self._is_paused = True

    def end(self) -> None:
        """Go on as before, for objects made from now on.  Does nothing without a pause.

        Those that are there belong to the program: no later collection looks at them, and none
        writes to memory that a forked engine shares with its server.  vLLM does the same once it
        is ready (vllm/utils/gc_utils.py, `freeze_gc_heap`).
        """
        if self._is_paused:
            self._is_paused = False
            gc.freeze()
            gc.enable()
            # Libraries look for leaks at the end, and would take what is frozen for one.
            atexit.register(gc.unfreeze)


# Of this process; vLLM calls one hook of ours to begin with and another to end with.
import_pause = ImportPause()
