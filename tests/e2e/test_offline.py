"""Offline uses of vLLM follow the same choice of platform as its server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

ENGINE_FLAGS = (
    "--enforce-eager",
    *("--max-model-len", "512"),
    *("--kv-cache-memory-bytes", str(2**27)),
)

SCRIPT = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    engine = LLM(
        model=sys.argv[1], enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**27
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    (output,) = engine.generate(["The sun rises in the"], greedy, use_tqdm=False)
    found = {
        "platform": type(current_platform).__module__,
        "token_ids": list(output.outputs[0].token_ids),
    }
    print("FOUND", json.dumps(found))

if __name__ == "__main__":
    main()
"""

CHOICES = {
    "default": ({}, "xllm_plugin."),
    "xllm": ({"XLLM_PLATFORM": "xllm"}, "xllm_plugin."),
    "native": ({"XLLM_PLATFORM": "native"}, "vllm."),
}


def run(*arguments: str, **environment: str) -> str:
    """Output of a child process; its log if it fails."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("XLLM_PLATFORM")}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return log


@pytest.mark.parametrize(
    "choice", ["default", *(pytest.param(c, marks=pytest.mark.full) for c in ("xllm", "native"))]
)
def test_a_users_script_follows_the_choice(choice: str, model: Path, tmp_path: Path) -> None:
    """No flag means xllm, and the variable decides otherwise; the engine has its own process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment, module = CHOICES[choice]
    log = run(str(script), str(model), **environment)
    (line,) = [line for line in log.splitlines() if line.startswith("FOUND ")]
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    assert found["platform"].startswith(module)
    assert len(found["token_ids"]) == 8


@pytest.mark.full
@pytest.mark.parametrize("choice", ["xllm", "native"])
def test_vllm_bench_latency_follows_the_choice(choice: str, model: Path) -> None:
    log = run(
        *("-m", "vllm.entrypoints.cli.main", "bench", "latency"),
        *("--platform", choice, "--model", str(model)),
        *("--input-len", "8", "--output-len", "4", "--batch-size", "2"),
        *("--num-iters", "1", "--num-iters-warmup", "1"),
        *ENGINE_FLAGS,
    )
    assert f"platform {choice}" in log
    assert "Avg latency" in log


@pytest.mark.full
def test_vllm_run_batch_gives_the_same_answers_under_either_platform(
    model: Path, tmp_path: Path
) -> None:
    question = {
        "custom_id": "one",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": str(model),
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0.0,
            "max_tokens": 8,
        },
    }
    batch = tmp_path / "batch.jsonl"
    batch.write_text(json.dumps(question) + "\n")
    answers = {}
    for choice in ("native", "xllm"):
        out = tmp_path / f"{choice}.jsonl"
        log = run(
            *("-m", "vllm.entrypoints.cli.main", "run-batch", "--model", str(model)),
            *("-i", str(batch), "-o", str(out)),
            *ENGINE_FLAGS,
            XLLM_PLATFORM=choice,
        )
        assert f"platform {choice}" in log
        body = json.loads(out.read_text())["response"]["body"]
        answers[choice] = body["choices"][0]["message"]["content"]
    assert answers["xllm"] == answers["native"]
    assert answers["xllm"]
