"""A dense model answers on the emulated device as the CPU family answers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from xllm_plugin.models import prepare
from xllm_plugin.testing.cann import Emulator
from xllm_plugin.testing.collect import Settings, collect_in_child
from xllm_plugin.testing.equality import check_near_ties, measure

pytestmark = [pytest.mark.npu, pytest.mark.engine, pytest.mark.full]

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "benchmarks" / "equality" / "data" / "prompts.jsonl"


def test_tokens_are_the_cpus_but_for_near_ties(emulator: Emulator) -> None:
    """Chunked prompts in mixed batches, so that every kind of step is met."""
    settings = Settings(
        model=str(prepare("tiny-llama")),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=1024,
        max_tokens=16,
        limit=8,
    )
    environment = emulator.environment({"PYTHONPATH": str(ROOT), "XLLM_DEVICE": "npu"})
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] += os.pathsep + os.environ["LD_LIBRARY_PATH"]
    npu = collect_in_child(settings, PROMPTS, platform="xllm", environment=environment)
    assert npu.platform == "xllm_plugin.npu.platform.XllmNpuPlatform"
    on_cpu = {"XLLM_DEVICE": "cpu"}
    cpu = collect_in_child(settings, PROMPTS, platform="xllm", environment=on_cpu)
    alone = collect_in_child(
        replace(settings, max_num_seqs=1), PROMPTS, platform="xllm", environment=on_cpu
    )
    yardstick = measure(cpu.completions, alone.completions)
    report = check_near_ties(cpu.completions, npu.completions, yardstick)
    assert report.equal, report.summary()
    texts = {completion.token_ids for completion in npu.completions}
    assert len(texts) > 4, "the model says the same whatever it is asked: equality shows nothing"
