"""Runs a driver, a script with an engine of its own, and reads what it found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models import prepare

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def drive(make_forks: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Runs `DRIVER.py MODEL ARGUMENTS...` of this folder; gives its JSON, or fails with its log."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "XLLM_PLATFORM": "xllm",
    }
    run_fork = make_forks("vllm.entrypoints.llm", environment=environment)

    def run(
        driver: str, *arguments: str, model: str = "tiny-llama", **environment: str
    ) -> dict[str, Any]:
        script = FOLDER / f"{driver}.py"
        said = run_fork(script, str(prepare(model)), *arguments, **environment)
        (line,) = [line for line in said.splitlines() if line.startswith("FOUND ")]
        found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
        return found

    return run
