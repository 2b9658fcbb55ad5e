"""The NPU family's filter of logits on the emulated device, against vLLM's own sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.full]

SOURCE = """
from types import SimpleNamespace
import numpy, torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.sample.sampler import Sampler
from xllm_plugin.npu.sampling import filter_on_device

calls = []
torch.manual_seed(0)
rows, vocabulary = 6, 5000
logits = torch.randn(rows, vocabulary) * 3
batch = SimpleNamespace(num_reqs=rows, top_k_cpu=numpy.zeros(16, dtype=numpy.int32))
runner = SimpleNamespace(sampler=Sampler("processed_logits"), input_batch=batch)
filter_on_device(runner)
sampler = runner.sampler.topk_topp_sampler
result = {"class": type(sampler).__name__, "mode": sampler.logprobs_mode, "same": {}, "used": {}}

import xllm_plugin.npu.sampling as module
real = module.torch_npu.npu_top_k_top_p
module.torch_npu.npu_top_k_top_p = lambda *a: calls.append(1) or real(*a)

def sample(k, p):
    calls.clear()
    if k is not None:
        batch.top_k_cpu[:rows] = k
        batch.top_k_cpu[rows:] = 4000  # of requests that are gone
        k = torch.tensor(k, dtype=torch.int32)
    p = None if p is None else torch.tensor(p)
    there = [None if one is None else one.npu() for one in (k, p)]
    generators = {row: torch.Generator("npu").manual_seed(row) for row in range(rows)}
    chosen, kept = sampler(logits.npu(), generators, *there)
    expected = apply_top_k_top_p_pytorch(logits.clone(), k, p)
    is_allowed = expected.gather(1, chosen.cpu().long().unsqueeze(1)) > -torch.inf
    return [torch.equal(kept.cpu(), expected), bool(is_allowed.all())], bool(calls)

K, P = [1, 2, 50, 1024, 7, 300], [0.9, 1.0, 0.1, 0.5, 0.99, 0.95]
for name, arguments in {
    "both": (K, P), "k": (K, None), "p": (None, P), "neither": (None, None),
    "one without top-k": ([*K[:5], vocabulary], P), "a large k": ([*K[:5], 1025], None),
}.items():
    result["same"][name], result["used"][name] = sample(*arguments)
batch.num_reqs = 0  # as in vLLM's trial, whose k the batch does not know
calls.clear()
k = torch.full((rows,), vocabulary - 1)
sampler(logits.npu(), {}, k.npu(), torch.tensor(P).npu())
result["trial"] = bool(calls)
"""


def test_it_leaves_the_tokens_that_vllm_leaves(on_device: Callable[..., Any]) -> None:
    found = on_device(SOURCE, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    used = {"both": True, "k": True, "p": True, "neither": False}
    assert found == {
        "class": "NpuTopKTopPSampler",
        "mode": "processed_logits",
        "same": {name: [True, True] for name in (*used, "one without top-k", "a large k")},
        "used": {**used, "one without top-k": False, "a large k": False},
        "trial": False,
    }
