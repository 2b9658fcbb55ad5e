"""Attention and layers of the NPU family on the emulated device, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.full]

SOURCE = """
from types import SimpleNamespace
import torch, torch_npu
from torch.nn import functional as F
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec
result = {"platform": type(current_platform).__name__, "vllm device": current_platform.device_type}
torch.manual_seed(0)

from xllm_plugin.npu.attention import NpuAttention, NpuAttentionBackend, NpuMetadataBuilder
from xllm_plugin.npu.kernels import compute_slot_mapping

heads, kv_heads, dim, blocks = 4, 2, 64, 7
spec = FullAttentionSpec(block_size=128, num_kv_heads=kv_heads, head_size=dim, dtype=torch.bfloat16)
spec = NpuAttentionBackend.customize_spec(spec)
memory = torch.full((blocks, 128, kv_heads, 256), torch.nan, dtype=torch.bfloat16, device="npu")
cache = memory.transpose(1, 2)  # [blocks, heads, 128, K and V], as vLLM shows it
result["page bytes"] = spec.page_size_bytes == memory[0].numel() * 2
builder = NpuMetadataBuilder(spec, [], None, torch.device("npu"))
table = torch.tensor([[3, 1, 0], [6, 0, 0], [2, 4, 5]], dtype=torch.int32)

def step(attention, starts, ends, states):
    "One step: request i goes from starts[i] to ends[i]; returns the outputs of each."
    lengths = [e - s for s, e in zip(starts, ends)]
    query_start = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(s, e) for s, e in zip(starts, ends)])
    slots = torch.empty(512, dtype=torch.int64, device="npu")
    compute_slot_mapping(
        num_tokens=len(positions), max_num_tokens=512, query_start_loc_ptr=query_start.npu(),
        positions_ptr=positions.npu(), block_table_ptr=table.npu(),
        block_table_stride=table.stride(0), slot_mapping_ptr=slots,
        KV_CACHE_BLOCK_SIZE=128, TOTAL_CP_WORLD_SIZE=1, TOTAL_CP_RANK=0,
        CP_KV_CACHE_INTERLEAVE_SIZE=1, PAD_ID=-1, BLOCK_SIZE=1024)
    common = SimpleNamespace(
        num_reqs=3, num_actual_tokens=len(positions), query_start_loc_cpu=query_start,
        seq_lens_cpu_upper_bound=torch.tensor(ends), block_table_tensor=table.npu(),
        slot_mapping=slots)
    parts = [torch.cat([s[a:b] for s, a, b in zip(one, starts, ends)]).npu() for one in states]
    output = torch.empty(len(positions) + 3, heads, dim, dtype=torch.bfloat16, device="npu")
    parts = [F.pad(part, (0, 0, 0, 0, 0, 3)) for part in parts]  # rows of padding behind
    attention.forward(None, *parts, cache, builder.build(0, common), output)
    return output[: len(positions)].cpu().split(lengths)

ends = [200, 5, 300]
def random_states(n):
    return [torch.randn(length + 1, n, dim, dtype=torch.bfloat16) for length in ends]
states = [random_states(heads), random_states(kv_heads), random_states(kv_heads)]

def outputs_are_right(window):
    with set_current_vllm_config(VllmConfig()):
        attention = NpuAttention(heads, dim, dim ** -0.5, kv_heads, sliding_window=window)
    memory.fill_(torch.nan)
    parts = [
        step(attention, [0, 0, 0], [196, 4, 299], states),  # prompts, two of them in chunks
        step(attention, [196, 4, 299], ends, states),  # a chunk beside decodes
    ]
    if window is not None:
        memory[2] = torch.nan  # of the third request, keys 0 to 127: vLLM frees such a block
    parts.append(step(attention, ends, [end + 1 for end in ends], states))  # decodes alone
    right = []
    for i, end in enumerate(ends):
        q, k, v = (one[i].double().transpose(0, 1)[None] for one in states)
        distance = torch.arange(end + 1).unsqueeze(1) - torch.arange(end + 1)
        mask = (distance >= 0) & (distance < (window or end + 1))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0]
        found = torch.cat([part[i] for part in parts]).double()
        right.append(torch.allclose(found, expected.transpose(0, 1), 1e-2, 1e-2))
    return right
result["window"] = outputs_are_right(100)
result["window of one"] = outputs_are_right(1)
result["attention"] = outputs_are_right(None)
kept = memory.cpu()
result["block is its own bytes"] = [bool(kept[block].isnan().all()) for block in (0, 1, 2)]
with set_current_vllm_config(VllmConfig()):
    attention = NpuAttention(heads, dim, dim ** -0.5, kv_heads)
output = torch.ones(4, heads, dim, dtype=torch.bfloat16, device="npu")
attention.forward(None, output, output, output, cache, None, output)
result["profiling"] = output.sum().item()

with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))):
    from xllm_plugin.npu import operators  # registers
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import get_rope
    norm, act = RMSNorm(64, 1e-5, dtype=torch.bfloat16).npu(), SiluAndMul()
    rope = get_rope(64, max_position=512, is_neox_style=True, dtype=torch.bfloat16,
                    rope_parameters={"rope_theta": 1e4, "rope_type": "default"}).npu()
    result["classes"] = [type(layer).__name__ for layer in (norm, act, rope)]
    x, residual = (torch.randn(9, 64, dtype=torch.bfloat16).npu() for _ in range(2))
    norm.weight.data.uniform_(0.5, 1.5)
    positions = torch.randint(0, 500, (9,)).npu()
    query, key = (torch.randn(9, n * 64, dtype=torch.bfloat16).npu() for n in (4, 2))
    pairs = {
        "norm": (norm(x), norm.forward_native(x.clone())),
        "add and norm": (norm(x, residual), norm.forward_native(x.clone(), residual.clone())),
        "swiglu": (act(x), act.forward_native(x)),
        "rope": (rope(positions, query, key), rope.forward_native(positions, query, key)),
    }
    flat = lambda out: out if isinstance(out, tuple) else (out,)
    result["layers"] = {
        name: all(torch.allclose(a.cpu().float(), b.cpu().float(), 0.02, 0.02)
                  for a, b in zip(flat(ours), flat(theirs), strict=True))
        for name, (ours, theirs) in pairs.items()
    }
"""


def test_steps_of_mixed_requests_and_layers(on_device: Callable[..., Any]) -> None:
    """Cache memory is NaN at first: whatever reads a slot that was not written shows."""
    found = on_device(SOURCE, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    assert found == {
        "platform": "XllmNpuPlatform",
        "vllm device": "npu",
        "page bytes": True,
        "window": [True] * 3,
        "window of one": [True] * 3,
        "attention": [True] * 3,
        "block is its own bytes": [True, False, False],
        "profiling": 0.0,
        "classes": ["NpuRMSNorm", "NpuSiluAndMul", "NpuRotaryEmbedding"],
        "layers": {"norm": True, "add and norm": True, "swiglu": True, "rope": True},
    }
