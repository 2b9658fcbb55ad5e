"""How much memory this process has, and how much another may take."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["available_bytes", "resident_bytes"]


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int:
    """Of this process (proc(5), statm)."""
    return int(statm.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """On the machine, and in this control group (v2) as a container sees its own.

    What the group uses for file contents that can be read again counts as available.
    """
    machine = _number(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text("ascii")) * 1024
    try:
        limit = int((cgroup / "memory.max").read_text("ascii"))
        used = int((cgroup / "memory.current").read_text("ascii"))
        files = _number(r"^inactive_file (\d+)", (cgroup / "memory.stat").read_text("ascii"))
    except (OSError, ValueError):  # no group, or its limit is "max"
        return machine
    return min(machine, limit - used + files)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1]) if found else 0
