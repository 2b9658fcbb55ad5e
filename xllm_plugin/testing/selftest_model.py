"""The last of `xllm selftest`: does an engine on the device answer as transformers on the host?

One small model with random weights, in an engine in a process of its own with everything at work at
once: prompts in chunks, paged decodes, and graphs captured at their first use.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xllm_plugin.errors import XllmError
from xllm_plugin.models import prepare
from xllm_plugin.testing.collect import Collection, Settings, collect_in_child
from xllm_plugin.testing.equality import Completion, check_token_equal
from xllm_plugin.testing.float32 import answers_in_float32
from xllm_plugin.testing.selftest import Check

__all__ = ["check_model", "judge"]

MODEL = "tiny-llama"
MAX_TOKENS, NUM_CANDIDATES = 16, 5
STEP_TOKENS = 64
"""Fewer than the longer prompts have, so that they are computed in chunks beside decodes."""

MAX_MARGIN, MAX_DRIFT = 0.25, 0.15
"""In nats, of a token's margin in float32 and of the mean change of log-probs: about twice what
bfloat16 does to this model on a CPU."""

MEMORY_SHARE = 0.05
"""Of the device; the KV cache has a size of its own, and others may hold the rest."""

PATIENCE_S = 1800.0

LINE = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
PROMPTS = ("Name three colours.", LINE, 8 * LINE, 12 * LINE)


def check_model(device: str) -> Iterator[Check]:
    """Ask both sides, and compare.

    Args:
        device: the family's name.
    """
    with tempfile.TemporaryDirectory(prefix="xllm-selftest-") as folder:
        prompts = Path(folder, "prompts.jsonl")
        rows = [{"id": f"p{number}", "text": text} for number, text in enumerate(PROMPTS)]
        prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        try:
            model = prepare(MODEL)
            reference = answers_in_float32(
                model,
                prompts,
                limit=len(PROMPTS),
                max_tokens=MAX_TOKENS,
                num_candidates=NUM_CANDIDATES,
            )
            found = ask_engine(device, model, prompts)
        except XllmError as error:
            yield Check(MODEL, "tokens", problem=str(error))
            return
    yield from judge(reference.completions, found)


def ask_engine(device: str, model: Path, prompts: Path) -> Collection:
    """What an engine on the device answers."""
    settings = Settings(
        model=str(model),
        max_num_seqs=2,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=1024,
        max_tokens=MAX_TOKENS,
        eager=False,
        logprobs=NUM_CANDIDATES,
        gpu_memory_utilization=MEMORY_SHARE,
    )
    environment = {
        "XLLM_DEVICE": device,
        "XLLM_GRAPH__MIN_USES": "1",
        "XLLM_GRAPH__REPLAN_STEPS": "2",
    }
    return collect_in_child(
        settings, prompts, platform="xllm", environment=environment, timeout_s=PATIENCE_S
    )


def judge(expected: tuple[Completion, ...], found: Collection) -> Iterator[Check]:
    """Two checks: the tokens, with the time that one took, and the log-probs."""
    report = check_token_equal(expected, found.completions)
    spread = report.spread
    num_same = spread.num_tokens - spread.num_differing
    num_made = sum(len(one.token_ids) for one in found.completions)
    far = [difference for difference in report.differences if difference.margin is None]
    yield Check(
        MODEL,
        f"{num_same} of {spread.num_tokens} tokens as in float32; us a token",
        spread.max_margin,
        MAX_MARGIN,
        1e6 * found.generate_s / max(num_made, 1),
        problem="; ".join(map(str, far)),
    )
    yield Check(MODEL, "log-probs", spread.mean_abs_logprob_difference, MAX_DRIFT)
