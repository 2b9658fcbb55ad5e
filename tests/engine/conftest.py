"""Runs a driver, a script with an engine of its own, and reads what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models import prepare


@pytest.fixture(scope="session")
def drive() -> Callable[..., dict[str, Any]]:
    """Runs `DRIVER.py MODEL ARGUMENTS...` of this folder; gives its JSON, or fails with its log."""

    def run(driver: str, *arguments: str, **environment: str) -> dict[str, Any]:
        script = Path(__file__).with_name(f"{driver}.py")
        done = subprocess.run(
            [sys.executable, str(script), str(prepare("tiny-llama")), *arguments],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "XLLM_PLATFORM": "xllm",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
        return found

    return run
