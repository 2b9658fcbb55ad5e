"""A decoder layer, in halves and whole, against the same layer written in torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest

from xllm_plugin import shims

shims.install()
torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from xllm_plugin.cpu.native.library import Batch, DecoderLayer, Heads  # noqa: E402
from xllm_plugin.cpu.native.linear import PackedLinear  # noqa: E402
from xllm_plugin.cpu.native.scratch import Scratch  # noqa: E402

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

HIDDEN, HEADS, KV_HEADS, HEAD, WIDE, EPSILON = 96, 6, 2, 32, 160, 1e-5
QKV = (HEADS + 2 * KV_HEADS) * HEAD
POSITIONS, SCALE = 768, 0.3


def random(*shape: int, scale: float = 1.0) -> Any:
    return (torch.randn(*shape) * scale).to(torch.bfloat16)


def close(found: Any, expected: Any, steps: int = 2) -> bool:
    """Within some steps of bfloat16 of the largest value: sums are rounded in another order."""
    largest = expected.abs().max() * steps * 2.0**-7
    return bool((found.float() - expected.float()).abs().max() <= largest)


@pytest.fixture(autouse=True)
def the_same_numbers_each_time() -> None:
    torch.manual_seed(0)


@dataclass
class Layer:
    """Weights of one layer, and the layer in torch with every rounding that vLLM makes."""

    has_bias: bool
    has_head_norm: bool
    rotary_dim: int = HEAD
    has_all_biases: bool = False

    def __post_init__(self) -> None:
        self.qkv, self.out = random(QKV, HIDDEN, scale=0.1), random(HIDDEN, HEADS * HEAD, scale=0.1)
        self.gate_up = random(2 * WIDE, HIDDEN, scale=0.1)
        self.down = random(HIDDEN, WIDE, scale=0.1)
        self.bias = random(QKV) if self.has_bias else None
        sizes = (HIDDEN, 2 * WIDE, HIDDEN)
        self.biases = [random(size) if self.has_all_biases else None for size in sizes]
        self.norm1, self.norm2, self.query_norm, self.key_norm = (
            1 + random(size, scale=0.1) for size in (HIDDEN, HIDDEN, HEAD, HEAD)
        )
        angles = torch.rand(POSITIONS, self.rotary_dim // 2) * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(torch.bfloat16)

    def norm(self, x: Any, weight: Any) -> Any:
        x = x.float()
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
        return scaled.to(torch.bfloat16) * weight

    def rotate(self, heads: Any, positions: Any) -> Any:
        half = self.rotary_dim // 2
        cos, sin = self.cos_sin[positions].float().unsqueeze(1).split(half, -1)
        first, second = heads[..., :half].float(), heads[..., half : 2 * half].float()
        low, high = first * cos - second * sin, second * cos + first * sin
        turned = torch.cat((low, high), -1).to(torch.bfloat16)
        return torch.cat((turned, heads[..., 2 * half :]), -1)

    def before(self, x: Any, residual: Any, positions: Any) -> tuple[Any, Any]:
        total = x.float() if residual is None else x.float() + residual.float()
        normed = self.norm(total, self.norm1)
        qkv = normed.float() @ self.qkv.float().T
        qkv = (qkv if self.bias is None else qkv + self.bias.float()).to(torch.bfloat16)
        heads = qkv.view(len(x), -1, HEAD)
        query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
        if self.has_head_norm:
            query, key = self.norm(query, self.query_norm), self.norm(key, self.key_norm)
        query, key = self.rotate(query, positions), self.rotate(key, positions)
        return torch.cat((query, key, value), 1).reshape(len(x), -1), total.to(torch.bfloat16)

    def after(self, attention: Any, residual: Any) -> tuple[Any, Any]:
        out, gate_up, down = (0 if bias is None else bias.float() for bias in self.biases)
        projected = (attention.float() @ self.out.float().T + out).to(torch.bfloat16)
        total = projected.float() + residual.float()
        normed = self.norm(total, self.norm2)
        both = (normed.float() @ self.gate_up.float().T + gate_up).to(torch.bfloat16)
        gate, up = both.float().chunk(2, -1)
        activated = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)
        y = activated.float() @ self.down.float().T + down
        return y.to(torch.bfloat16), total.to(torch.bfloat16)

    def native(self, kernels: Any) -> DecoderLayer:
        weights = (self.qkv, self.out, self.gate_up, self.down)
        biases = (self.bias, *self.biases)
        pack = [
            PackedLinear(kernels, weight, bias)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        self.kept = pack
        heads = (self.query_norm, self.key_norm) if self.has_head_norm else (None, None)
        return DecoderLayer(
            *(linear.struct for linear in pack),
            self.norm1.data_ptr(),
            self.norm2.data_ptr(),
            *(None if norm is None else norm.data_ptr() for norm in heads),
            self.cos_sin.data_ptr(),
            None,
            EPSILON,
            Heads(HEADS, KV_HEADS, HEAD, SCALE),
            self.rotary_dim,
        )


def scratch_for(struct: DecoderLayer, num_tokens: int) -> Scratch:
    scratch = Scratch(struct)
    scratch.resize(num_tokens)
    return scratch


LAYERS = {
    "llama": Layer(False, False),
    "qwen2": Layer(True, False),
    "qwen3": Layer(False, True),
    "every bias": Layer(True, False, has_all_biases=True),
    "half of a head rotated": Layer(False, False, rotary_dim=HEAD // 2),
}


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 97])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_first", [True, False])
def test_up_to_the_attention(kernels: Any, name: str, num_tokens: int, is_first: bool) -> None:
    layer = LAYERS[name]
    x = random(num_tokens, HIDDEN)
    residual = None if is_first else random(num_tokens, HIDDEN, scale=4)
    positions = torch.randint(0, 64, (num_tokens,))
    total = torch.empty_like(x)
    expected_qkv, expected_total = layer.before(x, residual, positions)
    struct = layer.native(kernels)
    scratch = scratch_for(struct, num_tokens)
    kernels.before_attention(
        ctypes.byref(struct),
        ctypes.byref(scratch.struct),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        total.data_ptr(),
        positions.data_ptr(),
        num_tokens,
    )
    assert torch.equal(total, expected_total)
    assert close(scratch.qkv[:num_tokens], expected_qkv)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 97, 193])
@pytest.mark.parametrize("name", ["llama", "every bias"])
def test_from_the_attention_on(kernels: Any, name: str, num_tokens: int) -> None:
    layer = LAYERS[name]
    attention, residual = random(num_tokens, HEADS * HEAD), random(num_tokens, HIDDEN, scale=4)
    expected_y, expected_total = layer.after(attention, residual)
    y, struct = torch.empty_like(residual), layer.native(kernels)
    scratch = scratch_for(struct, num_tokens)
    scratch.attention[:num_tokens] = attention
    kernels.after_attention(
        ctypes.byref(struct),
        ctypes.byref(scratch.struct),
        residual.data_ptr(),
        y.data_ptr(),
        num_tokens,
    )
    assert close(residual, expected_total)
    assert close(y, expected_y)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("num_rows", [1, 8, 9, 70])
def test_the_norm(kernels: Any, num_rows: int, with_residual: bool) -> None:
    layer = LAYERS["llama"]
    x, residual = random(num_rows, HIDDEN), random(num_rows, HIDDEN)
    y, total = torch.empty_like(x), torch.empty_like(x)
    kernels.norm(
        x.data_ptr(),
        residual.data_ptr() if with_residual else None,
        total.data_ptr() if with_residual else None,
        layer.norm1.data_ptr(),
        EPSILON,
        y.data_ptr(),
        HIDDEN,
        num_rows,
    )
    expected = x.float() + residual.float() if with_residual else x.float()
    assert close(y, layer.norm(expected, layer.norm1))
    if with_residual:
        assert torch.equal(total, expected.to(torch.bfloat16))


class Requests:
    """Requests that grow step by step, and a paged cache of two layers that starts full of NaN."""

    def __init__(self, block_size: int, number: int) -> None:
        per_request = POSITIONS // block_size
        self.block_size = block_size
        shape = (2, per_request * number, KV_HEADS, block_size, 2 * HEAD)
        self.cache = torch.full(shape, float("nan"), dtype=torch.bfloat16)
        blocks = torch.randperm(per_request * number, dtype=torch.int32)
        self.block_table = blocks.view(number, per_request)
        self.inputs = [random(0, HIDDEN) for _ in range(number)]

    def step(self, kernels: Any, layer: Layer, *num_queries: int) -> list[Any]:
        """Feed so many new tokens of each request to two layers and a norm; its outputs."""
        news = [random(number, HIDDEN) for number in num_queries]
        starts = [len(old) for old in self.inputs]
        self.inputs = [torch.cat(pair) for pair in zip(self.inputs, news, strict=True)]
        # The one after the last is a token that no request has.
        x = torch.cat([*news, random(1, HIDDEN)])
        positions = torch.cat(
            [torch.arange(start, start + len(new)) for start, new in zip(starts, news, strict=True)]
            + [torch.zeros(1, dtype=torch.int64)]
        )
        owners = torch.repeat_interleave(torch.arange(len(news)), torch.tensor(num_queries))
        blocks = self.block_table[owners, positions[:-1] // self.block_size].long()
        slots = blocks * self.block_size + positions[:-1] % self.block_size
        query_start = torch.tensor([0, *accumulate(num_queries)], dtype=torch.int32)
        seq_lens = torch.tensor([len(all_) for all_ in self.inputs], dtype=torch.int32)
        batch = Batch(
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            query_start=query_start.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block_table=self.block_table.data_ptr(),
            block_table_stride=self.block_table.stride(0),
            block_stride=self.cache.stride(1),
            head_stride=self.cache.stride(2),
            block_size=self.block_size,
            num_tokens=len(x),
            num_seqs=len(news),
        )
        struct = layer.native(kernels)
        structs = (DecoderLayer * 2)(struct, struct)
        for one, cache in zip(structs, self.cache, strict=True):
            one.cache = cache.data_ptr()
        scratch, y = scratch_for(structs[0], len(x)), torch.empty_like(x)
        kernels.forward(
            structs,
            2,
            layer.norm1.data_ptr(),
            ctypes.byref(batch),
            ctypes.byref(scratch.struct),
            x.data_ptr(),
            scratch.residual.data_ptr(),
            scratch.hidden.data_ptr(),
            y.data_ptr(),
        )
        assert y.isfinite().all()
        return list(y[:-1].split(num_queries))


def attention(qkv: Any) -> Any:
    """Causal attention of one request, all its tokens at once."""
    query, key, value = (
        part.transpose(0, 1)
        for part in qkv.float().view(len(qkv), -1, HEAD).split((HEADS, KV_HEADS, KV_HEADS), 1)
    )
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
    )
    return found.transpose(0, 1).reshape(len(qkv), -1).to(torch.bfloat16)


def two_layers(layer: Layer, x: Any) -> Any:
    """What `Requests.step` should give, from all tokens of one request."""
    residual, positions = None, torch.arange(len(x))
    for _ in range(2):
        qkv, residual = layer.before(x, residual, positions)
        x, residual = layer.after(attention(qkv), residual)
    return layer.norm(x.float() + residual.float(), layer.norm1)


STEPS = {
    "prefill, then decode": [(40, 7, 1), (1, 1, 1), (1, 1, 1)],
    "in chunks, beside decodes": [(130, 33, 5), (97, 1, 1), (1, 64, 1), (1, 1, 1)],
    "contexts in several parts": [(255, 256, 520), (1, 1, 1), (1, 1, 1)],
    "several queries a decode, as with drafts": [(254, 300, 31), (4, 3, 2), (2, 4, 3)],
    "requests that have no part in a step": [(50, 2, 3), (0, 20, 1)],
}


@pytest.mark.parametrize("block_size", [32, 128, 256])
@pytest.mark.parametrize("name", STEPS)
def test_layers_with_their_attention(kernels: Any, name: str, block_size: int) -> None:
    layer = LAYERS["llama"]
    requests = Requests(block_size, 3)
    for num_queries in STEPS[name]:
        found = requests.step(kernels, layer, *num_queries)
        for inputs, outputs in zip(requests.inputs, found, strict=True):
            expected = two_layers(layer, inputs)
            if len(outputs) > 0:
                assert close(outputs, expected[-len(outputs) :], steps=4)


def test_a_request_s_attention_does_not_depend_on_its_company(kernels: Any) -> None:
    """Parts are cut by a request's own length: no batch changes the order of its sums."""
    layer = LAYERS["llama"]
    torch.manual_seed(1)
    together = Requests(128, 2)
    both = [together.step(kernels, layer, *queries)[0] for queries in [(300, 300), (6, 6)]]
    torch.manual_seed(1)
    alone = Requests(128, 2)
    for expected, queries in zip(both, [(300, 0), (6, 0)], strict=True):
        # The same numbers for the first request; those of the second are drawn and dropped.
        (found, _) = alone.step(kernels, layer, *queries)
        random(queries[0], HIDDEN)
        assert torch.equal(found, expected)


def test_a_run_without_requests_has_an_attention_of_zeros(kernels: Any) -> None:
    layer = LAYERS["every bias"]
    x, struct = random(5, HIDDEN), layer.native(kernels)
    positions = torch.arange(5)
    scratch, y = scratch_for(struct, 5), torch.empty_like(x)
    scratch.attention.fill_(float("nan"))
    kernels.forward(
        struct,
        1,
        layer.norm2.data_ptr(),
        ctypes.byref(Batch(positions=positions.data_ptr(), num_tokens=5)),
        ctypes.byref(scratch.struct),
        x.data_ptr(),
        scratch.residual.data_ptr(),
        scratch.hidden.data_ptr(),
        y.data_ptr(),
    )
    last, residual = layer.after(torch.zeros(5, HEADS * HEAD), x)
    assert close(y, layer.norm(last.float() + residual.float(), layer.norm2))
