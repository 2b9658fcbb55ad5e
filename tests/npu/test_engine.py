"""Models answer on the emulated device as the CPU family answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models import prepare
from xllm_plugin.testing.cann import Emulator
from xllm_plugin.testing.collect import Settings, collect_in_child
from xllm_plugin.testing.equality import check_near_ties, measure

pytestmark = [pytest.mark.npu, pytest.mark.engine, pytest.mark.full]

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "benchmarks" / "equality" / "data" / "prompts.jsonl"
ON_CPU = {"XLLM_DEVICE": "cpu"}


def device_environment(emulator: Emulator) -> dict[str, str]:
    environment = emulator.environment({"PYTHONPATH": str(ROOT), "XLLM_DEVICE": "npu"})
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] += os.pathsep + os.environ["LD_LIBRARY_PATH"]
    return environment


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3-moe", "tiny-deepseek-v3", "smollm2"])
def test_tokens_are_the_cpus_but_for_near_ties(emulator: Emulator, model: str) -> None:
    """Chunked prompts in mixed batches, so that every kind of step is met."""
    settings = Settings(
        model=str(prepare(model)),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=1024,
        max_tokens=16,
        limit=8,
    )
    environment = device_environment(emulator)
    npu = collect_in_child(settings, PROMPTS, platform="xllm", environment=environment)
    assert npu.platform == "xllm_plugin.npu.platform.XllmNpuPlatform"
    if "deepseek" in model:  # vLLM's CPU platform has no chunked prompts with latent attention
        settings = replace(settings, max_num_batched_tokens=1024)
    cpu = collect_in_child(settings, PROMPTS, platform="xllm", environment=ON_CPU)
    alone = replace(settings, max_num_seqs=1)
    alone_on_cpu = collect_in_child(alone, PROMPTS, platform="xllm", environment=ON_CPU)
    yardstick = measure(cpu.completions, alone_on_cpu.completions)
    report = check_near_ties(cpu.completions, npu.completions, yardstick)
    assert report.equal, report.summary()
    texts = {completion.token_ids for completion in npu.completions}
    assert len(texts) > 4, "the model says the same whatever it is asked: equality shows nothing"


CACHED = """
import os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import vllm
engine = vllm.LLM(model=MODEL, max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=100,
                  kv_cache_memory_bytes=2**27, max_logprobs=5)
sampling = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=5)
prompts = [{"prompt_token_ids": [(7 * i * i + n) % 40000 for i in range(300)]} for n in (1, 2)]
def answers():
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    return [[list(o.outputs[0].token_ids), o.num_cached_tokens,
             [at[t].logprob for t, at in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)]]
            for o in outputs]
result = [answers(), answers()]
"""


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-deepseek-v3"])
def test_a_cached_prefix_is_as_good_as_a_computed_one(
    on_device: Callable[..., Any], model: str
) -> None:
    source = f"MODEL = {str(prepare(model))!r}\n{CACHED}"
    first, again = on_device(source, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    for (tokens, cached, scores), (same_tokens, hit, same_scores) in zip(first, again, strict=True):
        assert (cached, hit) == (0, 256)
        assert tokens == same_tokens
        assert scores == pytest.approx(same_scores, abs=0.1)
    assert first[0][0] != first[1][0]
