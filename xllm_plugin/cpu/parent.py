"""A process that ends with the one that started it (Linux)."""

from __future__ import annotations

import ctypes
import signal

__all__ = ["end_with_parent"]

PR_SET_PDEATHSIG = 1
"""prctl(2)."""


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent's thread that started this process ends.

    A parent that has ended already is the caller's to look for (`os.getppid`).
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
