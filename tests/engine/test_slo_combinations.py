"""Images, speculative decoding and KV connectors answer the same under the policy slo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models import prepare

pytestmark = [pytest.mark.engine, pytest.mark.full]

DRIVER = Path(__file__).with_name("slo_combinations_driver.py")
COMBINATIONS = {
    "multimodal": ("tiny-llava", 16),
    "speculation": ("tiny-llama", 20),
    "connector": ("tiny-llama", 20),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_tokens_are_those_of_vllm_s_own_order(name: str) -> None:
    model, num_requests = COMBINATIONS[name]
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(prepare(model)), name],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "XLLM_PLATFORM": "xllm",
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    scenario = found[name]
    assert [request for request, _ in scenario["ours"]] == [f"{i:03}" for i in range(num_requests)]
    assert scenario["ours"] == scenario["theirs"]
    assert scenario["counts"]["planned"] > 0
    assert set(scenario["leftovers"].values()) == {0}
