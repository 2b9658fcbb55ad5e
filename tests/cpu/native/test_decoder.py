"""The two halves of a decoder layer, against the same layer written in torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest

from xllm_plugin import shims

shims.install()
torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from xllm_plugin.cpu.native.library import DecoderLayer  # noqa: E402
from xllm_plugin.cpu.native.linear import PackedLinear  # noqa: E402

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

HIDDEN, HEADS, KV_HEADS, HEAD, WIDE, EPSILON = 96, 3, 1, 32, 160, 1e-5
QKV = (HEADS + 2 * KV_HEADS) * HEAD


def random(*shape: int, scale: float = 1.0) -> Any:
    return (torch.randn(*shape) * scale).to(torch.bfloat16)


def close(found: Any, expected: Any) -> bool:
    """Within two steps of bfloat16 of the largest value: sums are rounded in another order."""
    return bool((found.float() - expected.float()).abs().max() <= expected.abs().max() * 2.0**-6)


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
        angles = torch.rand(64, self.rotary_dim // 2) * 6
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
            EPSILON,
            HEADS,
            KV_HEADS,
            HEAD,
            self.rotary_dim,
        )


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
    qkv = torch.empty(num_tokens, QKV, dtype=torch.bfloat16)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    expected_qkv, expected_total = layer.before(x, residual, positions)
    kernels.before_attention(
        ctypes.byref(layer.native(kernels)),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        total.data_ptr(),
        normed.data_ptr(),
        qkv.data_ptr(),
        positions.data_ptr(),
        num_tokens,
    )
    assert torch.equal(total, expected_total)
    assert close(qkv, expected_qkv)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 97, 193])
@pytest.mark.parametrize("name", ["llama", "every bias"])
def test_from_the_attention_on(kernels: Any, name: str, num_tokens: int) -> None:
    layer = LAYERS[name]
    attention, residual = random(num_tokens, HEADS * HEAD), random(num_tokens, HIDDEN, scale=4)
    expected_y, expected_total = layer.after(attention, residual)
    y, scratch = torch.empty_like(residual), residual.new_empty(2, num_tokens, HIDDEN)
    activated = torch.empty(num_tokens, WIDE, dtype=torch.bfloat16)
    kernels.after_attention(
        ctypes.byref(layer.native(kernels)),
        attention.data_ptr(),
        residual.data_ptr(),
        scratch[0].data_ptr(),
        scratch[1].data_ptr(),
        activated.data_ptr(),
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
