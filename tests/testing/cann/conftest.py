"""Child processes that see the emulated device, or the reason why there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.testing.cann import Emulator, EmulatorUnavailableError, find_emulator

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    try:
        return find_emulator()
    except EmulatorUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def on_device(emulator: Emulator) -> Callable[..., Any]:
    """Runs Python that leaves its findings in `result`, a JSON value, in a process of its own."""

    def run(source: str, *, operators: bool = False, **variables: str) -> Any:
        program = f"result = None\n{textwrap.dedent(source)}\nimport json, sys\n"
        program += "print('RESULT', json.dumps(result))\n"
        environment = emulator.environment(operators=operators)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**environment, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(done.stdout.rpartition("RESULT ")[2])

    return run
