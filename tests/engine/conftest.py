"""Runs a driver, a script with an engine of its own, and reads what it found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models import prepare

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def ask_fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], str]]:
    """Hands a job to `driving.py`, which has imported vLLM, once for all drivers; its exit code."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "XLLM_PLATFORM": "xllm",
    }
    with (
        (tmp_path_factory.mktemp("driving") / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, str(FOLDER / "driving.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,
        ) as parent,
    ):
        jobs, codes = parent.stdin, parent.stdout
        assert jobs is not None
        assert codes is not None

        def ask(job: Any) -> str:
            jobs.write(json.dumps(job) + "\n")
            jobs.flush()
            return codes.readline().strip() or f"none: see {log.name}"

        yield ask
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)  # a driver that hangs too


@pytest.fixture(scope="session")
def drive(
    ask_fork: Callable[[Any], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Runs `DRIVER.py MODEL ARGUMENTS...` of this folder; gives its JSON, or fails with its log."""

    def run(driver: str, *arguments: str, **environment: str) -> dict[str, Any]:
        log = tmp_path_factory.mktemp(driver) / "log"
        job = {
            "script": str(FOLDER / f"{driver}.py"),
            "arguments": [str(prepare("tiny-llama")), *arguments],
            "environment": environment,
            "log": str(log),
        }
        code = ask_fork(job)
        said = log.read_text() if log.exists() else ""
        assert code == "0", said[-5000:] or code
        (line,) = [line for line in said.splitlines() if line.startswith("FOUND ")]
        found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
        return found

    return run
