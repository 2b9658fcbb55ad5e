"""What the drivers of this folder share: a tiny engine in their process, scenarios, the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from vllm import LLM, SamplingParams


def tiny_engine(model: str, **changes: Any) -> LLM:
    """In this process, with room for a few short requests; `changes` are options of `LLM`."""
    options: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "num_gpu_blocks_override": 33,
        "kv_cache_memory_bytes": 2**27,
        "disable_log_stats": False,
    }
    return LLM(model, **{**options, **changes})


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **changes})


def scenarios(driver: Any) -> Iterator[str]:
    """Every method of the driver's class that does not start with an underscore."""
    return (name for name in vars(type(driver)) if not name.startswith("_"))


def report(found: dict[str, Any]) -> None:
    """The line that the fixture `drive` reads; vLLM may have left one without an end before it."""
    sys.stdout.write(f"\nFOUND {json.dumps(found)}\n")
