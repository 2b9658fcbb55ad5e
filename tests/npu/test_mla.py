"""Latent attention of the NPU family on the emulated device, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.full]

SOURCE = """
from types import SimpleNamespace
import torch
from torch.nn import functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from xllm_plugin.errors import PlatformError
from xllm_plugin.npu.mla import NpuLatentAttention, NpuLatentMetadataBuilder
torch.manual_seed(0)
heads, nope, rope, size, latent, blocks = 4, 64, 64, 96, 512, 7
dtype, scale = torch.bfloat16, (64 + 64) ** -0.5
weight = torch.randn(heads * (nope + size), latent, dtype=dtype) / latent ** 0.5
project = lambda states: (states @ weight.npu().t(), None)
config = VllmConfig()
def attention(**changed):
    with set_current_vllm_config(config):
        return NpuLatentAttention(heads, 576, scale, 1, **{**dict(
            kv_cache_dtype="auto", kv_lora_rank=latent, qk_nope_head_dim=nope,
            qk_rope_head_dim=rope, v_head_dim=size, kv_b_proj=project), **changed})
layer = attention()
builder = NpuLatentMetadataBuilder(None, [], None, torch.device("npu"))
table = torch.tensor([[3, 1, 0], [6, 0, 0], [2, 4, 5]], dtype=torch.int32)
cache = torch.full((blocks, 128, 576), torch.nan, dtype=dtype, device="npu")
w_k, w_v = weight.view(heads, nope + size, latent).split([nope, size], 1)
result = {}

def step(starts, ends, query, latents, ropes):
    "One step, decodes first; returns the outputs of each request."
    lengths = [e - s for s, e in zip(starts, ends)]
    query_start = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    slots = torch.tensor([int(row[t // 128]) * 128 + t % 128
                          for row, s, e in zip(table, starts, ends) for t in range(s, e)])
    common = SimpleNamespace(
        num_reqs=3, num_actual_tokens=sum(lengths), max_query_len=max(lengths),
        query_start_loc_cpu=query_start, seq_lens_cpu_upper_bound=torch.tensor(ends),
        block_table_tensor=table.npu())
    metadata = builder.build(0, common)
    parts = [torch.cat([s[a:b] for s, a, b in zip(one, starts, ends)]).npu()
             for one in (query, latents, ropes)]
    with set_forward_context(metadata, config):
        layer.do_kv_cache_update(parts[1], parts[2], cache, slots.npu(), "auto", None)
    n = metadata.num_decode_tokens
    output = torch.full((sum(lengths), heads * size), torch.nan, dtype=dtype, device="npu")
    if n:
        q_nope, q_rope = parts[0][:n].split([nope, rope], -1)
        into = torch.einsum("bhn,hnl->bhl", q_nope, w_k.npu())
        out, _ = layer.forward_mqa((into, q_rope), cache, metadata, None)
        output[:n] = torch.einsum("bhl,hvl->bhv", out, w_v.npu()).flatten(1)
    if metadata.num_prefills:
        layer.forward_mha(parts[0][n:], None, None, cache, metadata, None, output[n:])
    return output.cpu().view(-1, heads, size).split(lengths), [n, metadata.num_prefills]

ends = [200, 5, 300]
query = [torch.randn(n, heads, nope + rope, dtype=dtype) for n in ends]
latents = [torch.randn(n, latent, dtype=dtype) for n in ends]
ropes = [torch.randn(n, 1, rope, dtype=dtype) for n in ends]
first, kinds = step([0, 0, 0], [199, 4, 250], query, latents, ropes)
second, mixed = step([199, 4, 250], ends, query, latents, ropes)
result["kinds"] = [kinds, mixed]
same = []
for i in range(3):
    keys = torch.einsum("tl,hnl->htn", latents[i].double(), w_k.double())
    keys = torch.cat((keys, ropes[i].double().transpose(0, 1).expand(heads, -1, -1)), -1)
    values = torch.einsum("tl,hvl->htv", latents[i].double(), w_v.double())
    expected = F.scaled_dot_product_attention(
        query[i].double().transpose(0, 1)[None], keys[None], values[None], is_causal=True,
        scale=scale)[0].transpose(0, 1)
    found = torch.cat((first[i], second[i])).double()
    same.append(torch.allclose(found, expected, 3e-2, 3e-2))
result["same"] = same
with set_forward_context(None, config):
    layer.do_kv_cache_update(None, None, cache, None, "auto", None)
try:
    attention(kv_lora_rank=256, sliding_window=9)
except PlatformError as error:
    result["refused"] = str(error)
"""


def test_steps_of_decodes_prompts_and_chunks(on_device: Callable[..., Any]) -> None:
    """Cache memory is NaN at first: whatever reads a slot that was not written shows."""
    found = on_device(SOURCE, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    assert "does not do latents of 256 or a sliding window" in found.pop("refused")
    assert found == {"kinds": [[0, 3], [2, 1]], "same": [True] * 3}
