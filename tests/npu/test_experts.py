"""Experts of the NPU family on the emulated device, against vLLM's formulas in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.full]

SOURCE = """
from types import SimpleNamespace
import torch
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from xllm_plugin.errors import PlatformError
from xllm_plugin.npu.experts import NpuExperts, refusal
torch.manual_seed(0)
tokens, experts, k, hidden, width = 9, 8, 2, 64, 32
w13 = torch.randn(experts, 2 * width, hidden, dtype=torch.bfloat16) / 8
w2 = torch.randn(experts, hidden, width, dtype=torch.bfloat16) / 8
x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
logits, bias = torch.randn(tokens, experts, dtype=torch.bfloat16), torch.randn(experts)
method = object.__new__(NpuExperts)

def layer(**changed):
    return SimpleNamespace(**{**dict(
        w13_weight=w13.npu(), w2_weight=w2.npu(), global_num_experts=experts, top_k=k,
        renormalize=True, use_grouped_topk=False, num_expert_group=None, topk_group=None,
        custom_routing_function=None, scoring_func="softmax", routed_scaling_factor=1.0,
        e_score_correction_bias=None, apply_router_weight_on_input=False, swiglu_limit=None,
        activation=MoEActivation.SILU, moe_config=SimpleNamespace(has_bias=False)), **changed})

def expected(one):
    b = one.e_score_correction_bias
    router = object.__new__(CPURouter)
    names = ("top_k", "renormalize", "use_grouped_topk", "num_expert_group", "topk_group",
             "custom_routing_function", "scoring_func", "routed_scaling_factor")
    for name in names:
        setattr(router, name, getattr(one, name))
    router.e_score_correction_bias = None if b is None else b.cpu()
    weights, chosen = router._compute_routing(x, logits.float(), None)
    gate, up = torch.einsum("th,tkwh->tkw", x.float(), w13.float()[chosen.long()]).chunk(2, -1)
    rows = torch.einsum("tkw,tkhw->tkh", F.silu(gate) * up, w2.float()[chosen.long()])
    return (rows * weights.unsqueeze(-1)).sum(1)

result = {"same": {}, "refused": {}}
for name, one in {
    "qwen3": layer(),
    "not renormalised": layer(renormalize=False),
    "deepseek v2": layer(renormalize=False, use_grouped_topk=True, num_expert_group=2,
                         topk_group=1, routed_scaling_factor=1.5),
    "deepseek v3": layer(scoring_func="sigmoid", e_score_correction_bias=bias.npu(),
                         use_grouped_topk=True, num_expert_group=2, topk_group=1,
                         routed_scaling_factor=2.5),
}.items():
    assert refusal(one) is None
    found = NpuExperts.apply_monolithic(method, one, x.npu(), logits.npu())
    result["same"][name] = torch.allclose(found.cpu().float(), expected(one), 3e-2, 3e-2)
for name, changed in {
    "sigmoid": dict(scoring_func="sigmoid", renormalize=False),
    "gelu": dict(activation=MoEActivation.GELU),
    "bias": dict(moe_config=SimpleNamespace(has_bias=True)),
}.items():
    try:
        NpuExperts.create_weights(method, layer(**changed))
    except PlatformError as error:
        result["refused"][name] = str(error)
"""


def test_experts_of_every_kind_of_router(on_device: Callable[..., Any]) -> None:
    found = on_device(SOURCE, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    names = ("qwen3", "not renormalised", "deepseek v2", "deepseek v3")
    assert found["same"] == dict.fromkeys(names, True)
    for name, part in {
        "sigmoid": "sigmoid scores that are not normalised",
        "gelu": "activation gelu",
        "bias": "do not do biases",
    }.items():
        assert part in found["refused"][name]
