"""An elastic KV cache answers what a fixed one answers, and takes the memory of what it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models import prepare

pytestmark = pytest.mark.engine

DRIVER = Path(__file__).with_name("elastic_driver.py")
SCENARIOS = ("chunked_prefill", "prefix_caching", "preemption", "resized_while_running")


def found_by(**environment: str) -> dict[str, Any]:
    """What the driver found; its log if it fails."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(prepare("tiny-llama"))],
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


@pytest.fixture(scope="module")
def fixed() -> dict[str, Any]:
    return found_by()


@pytest.fixture(scope="module")
def elastic() -> dict[str, Any]:
    return found_by(XLLM_XTENSOR__ENABLED="1")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_answers_are_the_same(
    fixed: dict[str, Any], elastic: dict[str, Any], scenario: str
) -> None:
    assert elastic[scenario] == fixed[scenario]


def test_the_scenarios_were_what_they_are_called(
    fixed: dict[str, Any], elastic: dict[str, Any]
) -> None:
    """Otherwise that both agree would show nothing."""
    assert (fixed["pool"], elastic["pool"]) == ("BlockPool", "ElasticBlockPool")
    assert len({tuple(tokens) for tokens in elastic["chunked_prefill"]}) > 2
    assert all(elastic["prefix_caching"]["cached"])
    assert elastic["memory"]["preemptions"] > fixed["memory"]["preemptions"] == 0


def test_resident_memory_is_that_of_live_blocks(elastic: dict[str, Any]) -> None:
    """The null block's slab stays; a slab here is one block."""
    memory = elastic["memory"]
    assert memory["is_rss_of_live_blocks"]
    assert memory["most_bytes"] > 8 * memory["block_bytes"]
    assert memory["idle_bytes"] == memory["after_bytes"] == memory["block_bytes"]
    assert memory["num_resident_slabs"] == 1
