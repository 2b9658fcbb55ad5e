"""The child process's manners."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

SHOW = """
import os, sys
from xllm_plugin.cpu.graphs import compiler
compiler.PATIENCE_S = 0.05
compiler.step_back()
compiler.end_with_parent()
print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.nice(0) >= compiler.NICE)
print(open("/proc/self/oom_score_adj").read().strip())
compiler.stop_waiting(os.getpid())
print("goes on")
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_it_takes_only_what_nobody_wants_and_goes_first() -> None:
    result = run(SHOW)
    assert result.stdout.splitlines() == ["True True", "1000", "goes on"], result.stderr


def test_a_request_of_another_parent_is_not_served(tmp_path: Path) -> None:
    """Its engine died before the child could ask to end with it."""
    from xllm_plugin.cpu.graphs.compiler import Request

    path = tmp_path / "request"
    cpus = frozenset(os.sched_getaffinity(0))
    path.write_bytes(pickle.dumps(Request("no configuration", {}, tmp_path, -1, cpus)))
    result = run(
        "import sys; from xllm_plugin.cpu.graphs.compiler import main; main(sys.argv[1])", str(path)
    )
    assert result.returncode == 0, result.stderr
    assert not path.exists()
    assert not list(tmp_path.glob("*/manifest.json"))
