"""The layer around latent attention on the emulated device, against vLLM's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.full]

SOURCE = """
from types import SimpleNamespace
import torch, torch_npu
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.rotary_embedding import get_rope
from xllm_plugin.npu import mla_layer, operators  # register
from xllm_plugin.npu.graph_backend import NpuGraphBackend
from xllm_plugin.npu.mla import NpuLatentMetadataBuilder, regions_of
torch.manual_seed(0)
hidden, heads, nope, size, latent, rank, blocks, dtype = 128, 4, 64, 96, 512, 96, 7, torch.bfloat16
torch.set_default_dtype(dtype)

class Linear(torch.nn.Linear):
    quant_method = None
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False, device="npu", dtype=dtype)
    def forward(self, states):
        return super().forward(states), None

def norm(width):
    made = RMSNorm(width, 1e-5, dtype=dtype).npu()
    made.weight.data.uniform_(0.5, 1.5)
    return made

YARN = {"rope_type": "deepseek_yarn", "rope_theta": 1e4, "factor": 4, "mscale": 1.0,
        "mscale_all_dim": 0.5, "original_max_position_embeddings": 256, "beta_fast": 32,
        "beta_slow": 1}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}

def made(*args, **parts):
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))
    with set_current_vllm_config(config), torch.device("npu"):
        return layer_of(*args, **parts), config

def layer_of(rank, rope_parameters, neox=False, **parts):
    rotary = get_rope(64, max_position=1024, is_neox_style=neox, dtype=dtype,
                      rope_parameters=rope_parameters)
    queries = dict(fused_qkv_a_proj=None, q_a_layernorm=None, q_b_proj=None,
                   kv_a_proj_with_mqa=None, q_proj=None)
    if rank:
        queries |= dict(fused_qkv_a_proj=Linear(hidden, rank + latent + 64),
                        q_a_layernorm=norm(rank), q_b_proj=Linear(rank, heads * (nope + 64)))
    else:
        queries |= dict(kv_a_proj_with_mqa=Linear(hidden, latent + 64),
                        q_proj=Linear(hidden, heads * (nope + 64)))
    modules = MLAModules(**dict(
        kv_a_layernorm=norm(latent), kv_b_proj=Linear(latent, heads * (nope + size)),
        rotary_emb=rotary.npu(), o_proj=Linear(heads * size, hidden), indexer=None,
        is_sparse=False, topk_indices_buffer=None), **queries, **parts)
    layer = MultiHeadLatentAttentionWrapper(
        hidden, heads, (nope + 64) ** -0.5, nope, 64, size, rank, latent, modules, prefix="one")
    layer.mla_attn.process_weights_after_loading(dtype)
    layer.mla_attn._chunked_prefill_workspace_size = 8  # else of a model's configuration
    return layer

table = torch.tensor([[3, 1, 0], [6, 0, 0], [2, 4, 5]], dtype=torch.int32)
builder = NpuLatentMetadataBuilder(None, [], None, torch.device("npu"))

def step(layer, config, forward, starts, ends, states):
    lengths = [e - s for s, e in zip(starts, ends)]
    pairs = [(row, t) for row, s, e in zip(table, starts, ends) for t in range(s, e)]
    slots = torch.tensor([int(row[t // 128]) * 128 + t % 128 for row, t in pairs]).npu()
    positions = torch.tensor([t for _, t in pairs]).npu()
    sums = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    metadata = builder.build(0, SimpleNamespace(
        num_reqs=3, num_actual_tokens=sum(lengths), max_query_len=max(lengths),
        query_start_loc_cpu=torch.tensor(sums, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(ends), block_table_tensor=table.npu()))
    x = torch.cat([one[a:b] for one, a, b in zip(states, starts, ends)]).npu()
    name = layer.mla_attn.layer_name
    def run():
        with set_forward_context({name: metadata}, config, slot_mapping={name: slots}):
            return forward(positions, x)
    return run

ends = [200, 5, 300]
states = [torch.randn(n, hidden) for n in ends]
STEPS = [([0, 0, 0], [199, 4, 250]), ([199, 4, 250], [200, 5, 299]), ([199, 4, 299], ends)]
def outputs(layer, config, forward):
    cache = torch.full((blocks, 1, 128, 576), torch.nan, dtype=dtype, device="npu")
    layer.mla_attn.bind_kv_cache(cache)
    return [step(layer, config, forward, *one, states)().cpu() for one in STEPS], cache

result = {"agree": {}, "fused": [], "differ": []}
with torch.inference_mode():
    for name, rank_here, rope in (("low rank", rank, PLAIN), ("yarn", rank, YARN),
                                  ("full rank", None, PLAIN)):
        layer, config = made(rank_here, rope)
        theirs = lambda *a: MultiHeadLatentAttentionWrapper.forward(layer, *a)
        (found, cache), (wanted, their_cache) = (
            outputs(layer, config, forward) for forward in (layer, theirs))
        result["fused"].append(layer.is_fused)
        result["agree"][name] = [torch.allclose(a.float(), b.float(), 3e-2, 3e-2)
                                 for a, b in zip(found, wanted)]
        same = [torch.equal(a.nan_to_num(), b.nan_to_num())
                for a, b in zip(regions_of(cache[:, 0]), regions_of(their_cache[:, 0]))]
        result["differ"].append(same)

    # A step of decodes on a graph: angles, writes and attention are those of the replay.
    layer, config = made(rank, PLAIN)
    outputs(layer, config, layer)
    decode = step(layer, config, layer, *STEPS[2], states)
    backend = NpuGraphBackend()
    graph = backend.capture(decode)
    cache = layer.mla_attn.kv_cache
    latents, ropes = regions_of(cache)
    at = [(1, 71), (6, 4), (5, 43)]  # where the last tokens of the three are
    kept = [(latents[b, t].clone(), ropes[b, t].clone()) for b, t in at]
    for b, t in at:
        latents[b, t], ropes[b, t] = torch.nan, torch.nan
    backend.lengths = ends
    found = backend.replay(graph).cpu()
    result["replay"] = [
        torch.equal(found, decode().cpu()),
        all(torch.equal(latents[b, t], one) and torch.equal(ropes[b, t], other)
            for (b, t), (one, other) in zip(at, kept))]

    with set_forward_context(None, config):
        result["measuring"] = float(
            (layer(torch.arange(9).npu(), torch.randn(9, hidden).npu()).abs().max()))
    scaled = lambda *a: layer(*a, torch.full((len(a[0]), 1, 1), 0.25, device="npu"))
    theirs = lambda *a: MultiHeadLatentAttentionWrapper.forward(
        layer, *a, torch.full((len(a[0]), 1, 1), 0.25, device="npu"))
    pairs = zip(*(outputs(layer, config, one)[0] for one in (scaled, theirs)))
    result["scaled"] = all(torch.allclose(a.float(), b.float(), 3e-2, 3e-2) for a, b in pairs)
    others = [made(rank, PLAIN, neox=True), made(rank, PLAIN, g_proj=Linear(hidden, heads * size))]
    result["others"] = [one.is_fused for one, _ in others]
    for one, its_config in others:
        result["others"].append(bool(outputs(one, its_config, one)[0][2].isfinite().all()))
"""


def test_a_step_is_that_of_vllms_layer(on_device: Callable[..., Any]) -> None:
    """Cached latents are the same to the bit; ropes are in the operators' order.

    Cache memory is NaN at first: whatever reads a slot that was not written shows.
    """
    found = on_device(SOURCE, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    assert found == {
        "agree": {name: [True] * 3 for name in ("low rank", "yarn", "full rank")},
        "fused": [True] * 3,
        "differ": [[True, False]] * 3,
        "replay": [True, True],
        "measuring": 0.0,
        "scaled": True,
        "others": [False, False, True, True],
    }
