"""Operators on the emulated device, against plain torch on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.npu

ATEN = """
import torch
result = {}
torch.manual_seed(0)
layer = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))
x = torch.randn(5, 16)
with torch.no_grad():
    here = layer(x)
    there = layer.to("npu")(x.to("npu"))
result["layer"] = [str(there.device), torch.equal(there.cpu(), here)]

t = torch.arange(12, dtype=torch.int32, device="npu").view(3, 4)
result["views"] = t.t()[1:3, ::2].contiguous().tolist()
t[1].add_(100)
t[:, 0] = -1
result["in place"] = t.tolist()
t.copy_(torch.ones(3, 4, dtype=torch.int64))
result["converted"] = [t.dtype == torch.int32, int(t.sum())]
out = torch.empty(0, dtype=torch.int64, device="npu")
torch.cumsum(t, 1, out=out)
result["out"] = out.tolist()
values, indices = torch.sort(torch.tensor([3.0, 1.0, 2.0], device="npu"), descending=True)
result["sorted"] = [values.tolist(), indices.tolist()]
result["indexed"] = t[torch.tensor([0, 2])].shape[0]
result["to host"] = [str(t.to("cpu").device), str(t.float().device), t[0, 0].item()]
result["on both"] = [torch.zeros(2, device="npu").add(1).tolist(), (t > 0).all().item()]

def drawn(seed):
    generator = torch.Generator("npu").manual_seed(seed)
    first = torch.empty(4, device="npu").exponential_(generator=generator)
    return first.tolist() + torch.empty(4, device="npu").exponential_(generator=generator).tolist()
result["drawn"] = [drawn(1) == drawn(1), drawn(1) != drawn(2), len(set(drawn(1)))]
try:
    torch.ones(3, device="npu") + torch.ones(3)
except RuntimeError as error:
    result["mixed"] = str(error)
"""


def test_aten_runs_on_the_device(on_device: Callable[..., Any]) -> None:
    found = on_device(ATEN, operators=True)
    assert found == {
        "layer": ["npu:0", True],
        "views": [[1, 9], [2, 10]],
        "in place": [[-1, 1, 2, 3], [-1, 105, 106, 107], [-1, 9, 10, 11]],
        "converted": [True, 12],
        "out": [[1, 2, 3, 4]] * 3,
        "sorted": [[3.0, 2.0, 1.0], [0, 2, 1]],
        "indexed": 2,
        "to host": ["cpu", "npu:0", 1],
        "on both": [[1.0, 1.0], True],
        "drawn": [True, True, 8],
        "mixed": found["mixed"],
    }
    assert "on the same device" in found["mixed"]


PREAMBLE = """
import inspect, torch, torch_npu
from torch.nn import functional as F
result = {}
torch.manual_seed(0)
npu = lambda *tensors: tuple(t.to("npu") for t in tensors)
def close(found, expected, tolerance=1e-2):
    return torch.allclose(found.cpu().float(), expected.float(), tolerance, tolerance)
def refused(call):
    try:
        call()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return str(error)
    return "accepted"
"""

DENSE = """
x, residual, gamma = torch.randn(6, 64), torch.randn(6, 64), torch.rand(64)
y, rstd = torch_npu.npu_rms_norm(*npu(x, gamma), epsilon=1e-5)
result["rms_norm"] = [close(y, F.rms_norm(x, (64,), gamma, 1e-5), 1e-5), list(rstd.shape)]
y, _, total = torch_npu.npu_add_rms_norm(*npu(x, residual, gamma), 1e-5)
result["add_rms_norm"] = [
    close(y, F.rms_norm(x + residual, (64,), gamma, 1e-5), 1e-5), close(total, x + residual, 1e-6)
]
result["swiglu"] = close(torch_npu.npu_swiglu(x.npu()), F.silu(x[:, :32]) * x[:, 32:], 1e-5)

heads, size, positions = 3, 64, torch.tensor([0, 5, 2, 9])
angles = torch.outer(torch.arange(10.0), 10000 ** (-torch.arange(0, 32, 2) / 32))
cache = torch.cat((angles.cos(), angles.sin()), -1)
query, key = torch.randn(4, heads * size), torch.randn(4, size)
def turned(states, order):
    states = states.view(4, -1, size).double()
    pairs = torch.complex(*order(states[..., :32]))
    pairs = pairs * torch.exp(1j * angles[positions].double()).unsqueeze(1)
    return pairs
for mode, order in (("half", lambda s: s.chunk(2, -1)),
                    ("interleave", lambda s: (s[..., ::2], s[..., 1::2]))):
    q, k = torch_npu.npu_mrope(
        *npu(positions, query, key, cache), size, mrope_section=[0, 0, 0], rotary_mode=mode)
    same = []
    for found, states in ((q, query), (k, key)):
        found = found.cpu().view(4, -1, size)
        pairs = turned(states, order)
        same += [
            torch.allclose(torch.complex(*order(found[..., :32].double())), pairs, 1e-5, 1e-5),
            torch.equal(found[..., 32:], states.view(4, -1, size)[..., 32:]),
        ]
    result["mrope " + mode] = all(same)

X, G = npu(x, gamma)
result["refused"] = {
    "keyword": refused(lambda: torch_npu.npu_rms_norm(X, G, eps=1e-5)),
    "host": refused(lambda: torch_npu.npu_rms_norm(X, gamma)),
    "dtype": refused(lambda: torch_npu.npu_rms_norm(X, G.half())),
    "rank": refused(lambda: torch_npu.npu_rms_norm(X[0], G)),
    "shape": refused(lambda: torch_npu.npu_add_rms_norm(X, X[:3], G)),
    "halves": refused(lambda: torch_npu.npu_swiglu(X[:, :63])),
    "rotary dim": refused(
        lambda: torch_npu.npu_mrope(*npu(positions, query, key, cache[:, :8]), size)),
    "position": refused(lambda: torch_npu.npu_mrope(*npu(positions + 9, query, key, cache), size)),
    "not emulated": refused(lambda: torch_npu.npu_gelu(X)),
}
"""


def test_dense_operators_against_plain_torch(on_device: Callable[..., Any]) -> None:
    found = on_device(PREAMBLE + DENSE, operators=True)
    refused = found.pop("refused")
    assert found == {
        "rms_norm": [True, [6, 1]],
        "add_rms_norm": [True, True],
        "swiglu": True,
        "mrope half": True,
        "mrope interleave": True,
    }
    for name, part in {
        "keyword": "eps",
        "host": "on the same device",
        "dtype": "gamma is torch.float16",
        "rank": "1 dimensions",
        "shape": "x1 is (6, 64), x2 is (3, 64)",
        "halves": "no two halves",
        "rotary dim": "rotary_dim 8",
        "position": "are not cached",
        "not emulated": "npu_gelu is not emulated",
    }.items():
        assert part in refused[name], (name, refused[name])


SAMPLING = """
rows, vocabulary = 4, 2000
logits = torch.randn(rows, vocabulary)
k = torch.tensor([1, 7, 1024, 300], dtype=torch.int32)
p = torch.tensor([0.5, 1.0, 0.9, 0.01])
def kept(logits, k, p):
    "The formula of the documentation, a row at a time."
    left = []
    for row, k_, p_ in zip(logits, k, p):
        order = row.argsort(descending=True)[:k_]
        probs = row[order].double().softmax(-1)
        before = probs.cumsum(-1) - probs
        left.append(set(order[before < p_ - 1e-12].tolist()))
    return left
def filtered(k, p):
    found = torch_npu.npu_top_k_top_p(
        logits.npu(), None if p is None else p.npu(), None if k is None else k.npu()).cpu()
    stay = found != -torch.inf
    left = [set(row.nonzero()[:, 0].tolist()) for row in stay]
    return bool((found[stay] == logits[stay]).all()), left
everything, all_p = [vocabulary] * rows, [1.0] * rows
result = {
    "both": filtered(k, p) == (True, kept(logits, k, p)),
    "k": filtered(k, None) == (True, kept(logits, k, all_p)),
    "p": filtered(None, p) == (True, kept(logits, everything, p)),
    "one stays": [len(one) for one in filtered(None, p * 0)[1]],
}
result["refused"] = {
    "neither": refused(lambda: torch_npu.npu_top_k_top_p(logits.npu())),
    "large k": refused(lambda: torch_npu.npu_top_k_top_p(logits.npu(), None, k.npu() + 1)),
    "int64": refused(lambda: torch_npu.npu_top_k_top_p(logits.npu(), None, k.long().npu())),
    "dtype of p": refused(lambda: torch_npu.npu_top_k_top_p(logits.npu(), p.half().npu())),
    "rows": refused(lambda: torch_npu.npu_top_k_top_p(logits.npu(), p[:2].npu())),
    "keyword": refused(lambda: torch_npu.npu_top_k_top_p(logits.npu(), top_k=k.npu())),
}
"""


def test_top_k_and_top_p_against_their_formula(on_device: Callable[..., Any]) -> None:
    found = on_device(PREAMBLE + SAMPLING, operators=True)
    refused = found.pop("refused")
    assert found == {"both": True, "k": True, "p": True, "one stays": [1] * 4}
    for name, part in {
        "neither": "neither p nor k",
        "large k": "k is outside 1 to 1024",
        "int64": "k is torch.int64",
        "dtype of p": "p is torch.float16",
        "rows": "p is (2,)",
        "keyword": "top_k",
    }.items():
        assert part in refused[name], (name, refused[name])


ATTENTION = """
from math import ceil
block, heads, kv_heads, dim, dtype = 128, 8, 2, 128, torch.bfloat16
table = torch.tensor([[3, 1, 9], [6, 0, 0], [2, 4, 5]], dtype=torch.int32)
num_keys, num_queries = [200, 5, 300], [4, 5, 1]  # a chunk, a whole prompt, a decode
keys = [torch.randn(n, kv_heads, dim, dtype=dtype) for n in num_keys]
values = [torch.randn(n, kv_heads, dim, dtype=dtype) for n in num_keys]
caches = npu(*(torch.zeros(10, block, kv_heads, dim, dtype=dtype) for _ in range(2)))
for row, k, v in zip(table, keys, values):
    slots = torch.tensor([int(row[t // block]) * block + t % block for t in range(len(k))])
    torch_npu.npu_scatter_pa_kv_cache(*npu(k, v), *caches, slots.npu(), cache_mode="Norm")
result["scattered"] = [
    torch.equal(caches[0].cpu()[3], keys[0][:128]), torch.equal(caches[1].cpu()[4][:72],
    values[2][128:200]), bool((caches[0].cpu()[7:9] == 0).all())]

query = torch.randn(sum(num_queries), heads, dim, dtype=dtype)
mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
flat = [cache.view(10, block, -1) for cache in caches]
def attend(query=query, flat=flat, **changed):
    arguments = dict(
        num_query_heads=heads, num_key_value_heads=kv_heads, input_layout="TND", sparse_mode=3,
        atten_mask=mask.npu(), actual_seq_qlen=[4, 9, 10], actual_seq_kvlen=num_keys,
        block_table=table.npu(), block_size=block, softmax_scale=dim ** -0.5)
    return torch_npu.npu_fused_infer_attention_score_v2(
        query.npu(), *flat, **{**arguments, **changed})
out, lse = attend(return_softmax_lse=True)
start, same, same_lse = 0, [], []
for n, m, k, v in zip(num_queries, num_keys, keys, values):
    q = query[start:start + n].double().transpose(0, 1)
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    k, v = (t.double().transpose(0, 1) for t in (k, v))
    expected = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)[0]
    same.append(close(out[start:start + n], expected.transpose(0, 1)))
    scores = q @ k.repeat_interleave(4, 0).transpose(1, 2) * dim ** -0.5
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    same_lse.append(close(lse[start:start + n, :, 0], expected.t(), 1e-4))
    start += n
result["attention"], result["lse"] = same, same_lse
result["shapes"] = [list(out.shape), str(out.dtype), list(lse.shape), attend()[1].numel()]
K, V = npu(keys[1], values[1])
slot = torch.arange(5)
scatter = lambda *args, **kw: torch_npu.npu_scatter_pa_kv_cache(*args, **kw)
result["refused"] = {
    "v1 keyword": refused(lambda: attend(num_heads=8)),
    "float32": refused(lambda: attend(query.float())),
    "head dim": refused(lambda: attend(query[..., :64].contiguous())),
    "strided": refused(lambda: attend(query.transpose(0, 1).contiguous().npu().transpose(0, 1))),
    "block size": refused(lambda: attend(block_size=64)),
    "no mask": refused(lambda: attend(atten_mask=None)),
    "wrong mask": refused(lambda: attend(atten_mask=mask.t().contiguous().npu())),
    "no running sum": refused(lambda: attend(actual_seq_qlen=[4, 5, 1])),
    "int64 table": refused(lambda: attend(block_table=table.long().npu())),
    "short table": refused(lambda: attend(block_table=table[:, :1].contiguous().npu())),
    "layout": refused(lambda: attend(input_layout="BSH")),
    "default cache mode": refused(lambda: scatter(K, V, *caches, slot.npu())),
    "slot": refused(lambda: scatter(K, V, *caches, (slot - 1).npu(), cache_mode="Norm")),
    "slot twice": refused(lambda: scatter(K, V, *caches, (slot * 0).npu(), cache_mode="Norm")),
    "key dtype": refused(lambda: scatter(K.float(), V, *caches, slot.npu(), cache_mode="Norm")),
}
"""


def test_paged_attention_against_plain_torch(on_device: Callable[..., Any]) -> None:
    found = on_device(PREAMBLE + ATTENTION, operators=True)
    refused = found.pop("refused")
    assert found == {
        "scattered": [True] * 3,
        "attention": [True] * 3,
        "lse": [True] * 3,
        "shapes": [[10, 8, 128], "torch.bfloat16", [10, 8, 1], 0],
    }
    for name, part in {
        "v1 keyword": "num_heads",
        "float32": "query is torch.float32",
        "head dim": "head dimension of 128 or 512, not 64",
        "strided": "query is not contiguous",
        "block size": "block_size 64",
        "no mask": "needs a mask",
        "wrong mask": "above the diagonal",
        "no running sum": "no running sum",
        "int64 table": "block_table is torch.int64",
        "short table": "do not fit",
        "layout": "'BSH' is not emulated",
        "default cache mode": "'PA_NZ' is not emulated",
        "slot": "outside the cache",
        "slot twice": "named twice",
        "key dtype": "cache is torch.bfloat16",
    }.items():
        assert part in refused[name], (name, refused[name])


LATENT = """
block, heads, latent_dim, rope_dim, dtype = 128, 4, 512, 64, torch.bfloat16
table, num_keys = torch.tensor([[3, 1], [6, 0]], dtype=torch.int32), [200, 5]
latents = torch.randn(8, block, 1, latent_dim, dtype=dtype)
ropes = torch.randn(8, block, 1, rope_dim, dtype=dtype)
scale = (latent_dim + rope_dim) ** -0.5
mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
def expected(queries, keys, values):
    n, m = len(queries), len(keys)
    q, k, v = (t.double().transpose(0, 1) for t in (queries, keys, values))
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen, enable_gqa=True, scale=scale)[0].transpose(0, 1)
def own(cache, request):
    return cache[table[request].long()].flatten(0, 1)[:num_keys[request]]

def decode(lengths, **changed):
    total = sum(lengths)
    query, rope = torch.randn(total, heads, latent_dim), torch.randn(total, heads, rope_dim)
    query, rope = query.to(dtype), rope.to(dtype)
    pages, rope_pages = (t.flatten(2).npu() for t in (latents, ropes))
    arguments = dict(
        query_rope=rope.npu(), key_rope=rope_pages, num_query_heads=heads, num_key_value_heads=1,
        input_layout="TND", actual_seq_qlen=torch.tensor(lengths).cumsum(0).tolist(),
        actual_seq_kvlen=num_keys, block_table=table.npu(), block_size=block, softmax_scale=scale)
    if max(lengths) > 1:
        arguments |= dict(sparse_mode=3, atten_mask=mask.npu())
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        query.npu(), pages, pages, **{**arguments, **changed})
    parts = torch.cat((query, rope), -1).split(lengths)
    wanted = [expected(part, torch.cat((own(latents, i), own(ropes, i)), -1), own(latents, i))
              for i, part in enumerate(parts)]
    return close(out, torch.cat(wanted), 2e-2)
result["latent"] = [decode([1, 1]), decode([3, 2])]

num_queries, lengths = [4, 5], [200, 5]
query, query_rope = torch.randn(9, heads, 128, dtype=dtype), torch.randn(9, heads, 64, dtype=dtype)
key, value = (torch.randn(205, heads, 128, dtype=dtype) for _ in range(2))
key_rope = torch.randn(205, heads, 64, dtype=dtype)
def prefill(**changed):
    arguments = dict(
        query_rope=query_rope.npu(), key_rope=key_rope.npu(), num_query_heads=heads,
        num_key_value_heads=heads, input_layout="TND", sparse_mode=3, atten_mask=mask.npu(),
        actual_seq_qlen=[4, 9], actual_seq_kvlen=[200, 205], softmax_scale=scale)
    return torch_npu.npu_fused_infer_attention_score_v2(
        *npu(query, key, value), **{**arguments, **changed})[0]
both = [torch.cat((a, b), -1) for a, b in ((query, query_rope), (key, key_rope))]
parts = zip(both[0].split(num_queries), both[1].split(lengths), value.split(lengths))
result["packed"] = close(prefill(), torch.cat([expected(*part) for part in parts]), 2e-2)
result["refused"] = {
    "no rope": refused(lambda: decode([1, 1], query_rope=None, key_rope=None)),
    "one rope": refused(lambda: decode([1, 1], query_rope=None)),
    "mask of one query": refused(lambda: decode([1, 1], sparse_mode=3, atten_mask=mask.npu())),
    "no mask": refused(lambda: decode([3, 2], sparse_mode=0, atten_mask=None)),
    "long": refused(lambda: decode([17, 1])),
    "no pages": refused(lambda: decode([1, 1], block_table=None, actual_seq_kvlen=[1024, 1024])),
    "lengths, not sums": refused(lambda: prefill(actual_seq_kvlen=[200, 5])),
}
"""


@pytest.mark.full
def test_latent_attention_against_plain_torch(on_device: Callable[..., Any]) -> None:
    found = on_device(PREAMBLE + LATENT, operators=True)
    refused = found.pop("refused")
    assert found == {"latent": [True, True], "packed": True}
    for name, part in {
        "no rope": "not (8, 128, 128)",
        "one rope": "only one of query_rope and key_rope",
        "mask of one query": "need sparse mode 0",
        "no mask": "need sparse mode 3",
        "long": "17 queries",
        "no pages": "actual_seq_kvlen ends at 1024 of 8",
        "lengths, not sums": "actual_seq_kvlen is no running sum",
    }.items():
        assert part in refused[name], (name, refused[name])


WRITTEN = """
heads, tokens, blocks, dtype = 4, 6, 3, torch.bfloat16
angles = torch.outer(torch.randint(0, 99, (tokens,)).double(), 1e4 ** -(torch.arange(32) / 32))
cos, sin = (torch.cat((half, half), -1).to(dtype) for half in (angles.cos(), angles.sin()))
def turned(x):
    "[..., tokens, 64]: neighbours are the pairs; all first ones, then all second ones."
    pairs = torch.view_as_complex(x.double().unflatten(-1, (32, 2)).contiguous())
    pairs = pairs * torch.exp(1j * angles)
    return torch.cat((pairs.real, pairs.imag), -1)
x = torch.randn(1, heads, tokens, 64).to(dtype)
whole = [t.view(1, 1, tokens, 64).npu() for t in (cos, sin)]
result["turned"] = close(torch_npu.npu_interleave_rope(x.npu(), *whole), turned(x), 2e-2)
by_token = [t.view(tokens, 1, 1, 64) for t in whole]
q = x[0].transpose(0, 1).unsqueeze(2).contiguous()  # [tokens, heads, 1, 64]
found = torch_npu.npu_interleave_rope(q.npu(), *by_token).squeeze(2).transpose(0, 1)
result["turned by token"] = close(found, turned(x[0]), 2e-2)

kv, gamma = torch.randn(1, 1, tokens, 576).to(dtype), torch.rand(512).to(dtype)
slots = torch.tensor([0, 383, 128, 5, 200, 127])
def write(kv=kv, gamma=gamma, slots=slots, angles=whole, blocks=blocks, **changed):
    caches = [torch.full((blocks, 128, 1, size), 9.0, dtype=dtype).npu() for size in (64, 512)]
    given = npu(kv, gamma), npu(slots)
    out = torch_npu.npu_kv_rmsnorm_rope_cache(
        *given[0], *angles, *given[1], *caches, **{**dict(cache_mode="PA_BNSD"), **changed})
    return caches, out
ropes, latents = kv[0, 0, :, 512:], kv[0, 0, :, :512].float()
wanted = [turned(ropes), F.rms_norm(latents, (512,), gamma.float(), 1e-5)]
caches, out = write(is_output_kv=True)
result["given back"] = [a.data_ptr() == b.data_ptr() for a, b in zip(caches, out)]
result["written"] = [
    close(one.cpu().flatten(0, 2)[slots], expected, 2e-2) for one, expected in zip(caches, wanted)]
result["others"] = [int((one.cpu().flatten(0, 2) == 9).all(-1).sum()) for one in caches]
result["output"] = [close(one[0, 0], expected, 2e-2) for one, expected in zip(out[2:], wanted)]
result["no output"] = [bool(one.isnan().all()) for one in write()[1][2:]]
apart = [t.view(tokens, 1, 1, -1) for t in (kv, *whole)]
result["refused"] = {
    "default mode": refused(lambda: write(cache_mode="Norm")),
    "scale": refused(lambda: write(k_rope_scale=torch.ones(64).npu())),
    "size": refused(lambda: write(kv[..., :575].contiguous())),
    "angles": refused(lambda: write(angles=by_token)),
    "int32 slots": refused(lambda: write(slots=slots.int())),
    "slots": refused(lambda: write(slots=slots[:5])),
    "outside": refused(lambda: write(slots=slots + 1)),
    "twice": refused(lambda: write(slots=slots * 0)),
    "blocks": refused(lambda: write(apart[0], angles=apart[1:])),
    "v2's keyword": refused(lambda: write(k_cache_dtype=27)),
    "heads of angles": refused(lambda: torch_npu.npu_interleave_rope(
        x.npu(), *(t.expand(1, heads, -1, -1).contiguous() for t in whole))),
    "strided": refused(lambda: torch_npu.npu_interleave_rope(
        x[0].transpose(0, 1).unsqueeze(2).npu(), *by_token)),
}
"""


@pytest.mark.full
def test_what_latent_attention_caches_against_plain_torch(on_device: Callable[..., Any]) -> None:
    found = on_device(PREAMBLE + WRITTEN, operators=True)
    refused = found.pop("refused")
    assert found == {
        "turned": True,
        "turned by token": True,
        "given back": [True, True],
        "written": [True, True],
        "others": [3 * 128 - 6] * 2,
        "output": [True, True],
        "no output": [True, True],
    }
    for name, part in {
        "default mode": "cache_mode 'Norm' is not emulated",
        "scale": "not emulated: k_rope_scale",
        "size": "kv is (1, 1, 6, 575)",
        "angles": "cos is (6, 1, 1, 64), not (1, 1, 6, 64)",
        "int32 slots": "index is torch.int32",
        "slots": "one slot for each of 6 tokens",
        "outside": "outside the cache",
        "twice": "named twice",
        "blocks": "3 blocks, where 6 are asked for",
        "v2's keyword": "k_cache_dtype",
        "heads of angles": "cos is (1, 4, 6, 64)",
        "strided": "x is not contiguous",
    }.items():
        assert part in refused[name], (name, refused[name])


EXPERTS = """
tokens, experts, k, hidden, width = 7, 8, 2, 64, 32
logits, bias = torch.randn(tokens, experts), torch.randn(experts)
weights, chosen, scores = torch_npu.npu_moe_gating_top_k(logits.npu(), k=k, out_flag=True)
expected = logits.softmax(-1).topk(k)
result["softmax"] = [close(weights, expected.values, 1e-6), close(scores, logits.softmax(-1), 1e-6),
                     torch.equal(chosen.cpu(), expected.indices.int())]
weights, chosen, _ = torch_npu.npu_moe_gating_top_k(
    logits.npu(), k=k, bias=bias.npu(), k_group=1, group_count=2, group_select_mode=1, norm_type=1,
    routed_scaling_factor=2.5)
same = []
for row, w, e in zip(logits.sigmoid(), weights.cpu(), chosen.cpu()):
    biased = row + bias
    best = max(range(2), key=lambda g: biased[4 * g:4 * g + 4].topk(2).values.sum())
    wanted = 4 * best + biased[4 * best:4 * best + 4].topk(k).indices
    same.append(sorted(wanted.tolist()) == sorted(e.tolist())
                and torch.allclose(w, 2.5 * row[e.long()] / row[e.long()].sum()))
result["sigmoid"] = all(same)

x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
weight = torch.randn(experts, width, hidden, dtype=torch.bfloat16)
def route(chosen=chosen, **changed):
    return torch_npu.npu_moe_init_routing_v2(x.npu(), chosen, **{**dict(
        active_num=chosen.numel(), expert_num=experts, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, experts], quant_mode=-1,
        row_idx_type=0), **changed})
rows, places, counts, _ = route()
flat = chosen.cpu().flatten().long()
result["routed"] = [
    torch.equal(rows.cpu()[places.cpu().long()], x.repeat_interleave(k, 0)),
    torch.equal(flat[places.cpu().long().argsort()], flat.sort().values),
    torch.equal(counts.cpu(), flat.bincount(minlength=experts)), str(counts.dtype)]
def product(weight=weight.npu().transpose(1, 2), **changed):
    return torch_npu.npu_grouped_matmul([rows], [weight], **{**dict(
        group_list=counts, split_item=2, group_type=0, group_list_type=1), **changed})
(out,) = product()
by_choice = out.cpu()[places.cpu().long()].view(tokens, k, width)
expected = torch.einsum("th,tkwh->tkw", x.float(), weight.float()[chosen.cpu().long()])
result["product"] = close(by_choice, expected, 5e-2)
probs = weights.bfloat16()
back = torch_npu.npu_moe_token_unpermute(out, places, probs=probs)
summed = (by_choice.float() * probs.cpu().float().unsqueeze(-1)).sum(1)
result["summed"] = close(back, summed, 2e-2)
result["refused"] = {
    "small groups": refused(lambda: torch_npu.npu_moe_gating_top_k(
        logits.npu(), k=1, group_count=4)),
    "bias": refused(lambda: torch_npu.npu_moe_gating_top_k(
        logits.npu(), k=1, bias=bias.bfloat16().npu())),
    "int64": refused(lambda: route(chosen.long())),
    "no counts": refused(lambda: route(expert_tokens_num_flag=False)),
    "outside": refused(lambda: route(chosen + 8)),
    "sums": refused(lambda: product(group_list=counts.cumsum(0))),
    "int32 counts": refused(lambda: product(group_list=counts.int())),
    "shape": refused(lambda: product(weight.npu())),
    "float32 probs": refused(lambda: torch_npu.npu_moe_token_unpermute(out, places, probs=weights)),
}
"""


@pytest.mark.full
def test_experts_against_plain_torch(on_device: Callable[..., Any]) -> None:
    found = on_device(PREAMBLE + EXPERTS, operators=True)
    refused = found.pop("refused")
    assert found == {
        "softmax": [True] * 3,
        "sigmoid": True,
        "routed": [True, True, True, "torch.int64"],
        "product": True,
        "summed": True,
    }
    for name, part in {
        "small groups": "8 experts in 4 groups",
        "bias": "bias is torch.bfloat16",
        "int64": "expert_idx is torch.int64",
        "no counts": "expert_tokens_num_flag",
        "outside": "outside the range",
        "sums": "groups of",
        "int32 counts": "group_list is torch.int32",
        "shape": "(14, 64) by (8, 32, 64)",
        "float32 probs": "probs is torch.float32",
    }.items():
        assert part in refused[name], (name, refused[name])


def test_every_emulated_operator_has_the_wheels_own_parameters(
    on_device: Callable[..., Any],
) -> None:
    """A name, order or default that is not the schema's would let a wrong call pass."""
    wrong = on_device(
        """
        import inspect, torch
        from xllm_plugin.testing.cann.device.contract import EMULATED
        result = {}
        for name, function in EMULATED.items():
            schema = getattr(torch.ops.npu, name).default._schema
            ours = dict(inspect.signature(function).parameters)
            rest = [n for n, p in ours.items() if p.kind is p.VAR_KEYWORD]
            theirs = [a.name for a in schema.arguments]
            for n in rest:
                del ours[n]
            bad = [n for n in ours if n not in theirs]
            bad += [n for n in theirs if n not in ours and not rest]
            for a in schema.arguments:
                if a.name not in ours:
                    continue
                p = ours[a.name]
                default = a.default_value if a.has_default_value() else p.empty
                if p.default != default or (p.kind is p.KEYWORD_ONLY) != a.kwarg_only:
                    bad.append(a.name)
            positional = [a.name for a in schema.arguments if not a.kwarg_only]
            if positional != [n for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY]:
                bad.append("order")
            if bad:
                result[name] = bad
        """,
        operators=True,
    )
    assert wrong == {}
