"""Which layers are taken over; a refusal says what the kernels do not do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims

shims.install()
torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul  # noqa: E402
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm  # noqa: E402
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl  # noqa: E402

from xllm_plugin.cpu.native import layers  # noqa: E402
from xllm_plugin.cpu.native.layers import (  # noqa: E402
    UnsupportedLayerError,
    Workspace,
    check,
    layer_struct,
    take_over,
)
from xllm_plugin.cpu.native.library import Linear  # noqa: E402
from xllm_plugin.cpu.native.linear import PackedLinear  # noqa: E402

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

HIDDEN, HEADS, HEAD, WIDE = 64, 2, 32, 96


def bare(cls: type, **attributes: Any) -> Any:
    """An instance of one of vLLM's modules with these attributes and nothing else."""
    found = cls.__new__(cls)
    if isinstance(found, torch.nn.Module):
        torch.nn.Module.__init__(found)
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def norm(size: int, cls: type = RMSNorm, **attributes: Any) -> Any:
    weight = torch.ones(size, dtype=torch.bfloat16)
    known = {"has_weight": True, "variance_size_override": None, "variance_epsilon": 1e-5}
    return bare(cls, weight=weight, **(known | attributes))


def linear(n: int, k: int, **attributes: Any) -> Any:
    packed = PackedLinear.__new__(PackedLinear)
    packed.struct = Linear(1, None, n, k)
    return SimpleNamespace(
        **({"cpu_linear": packed, "skip_bias_add": False, "tp_size": 1} | attributes)
    )


def rotary(cls: type = RotaryEmbedding, **attributes: Any) -> Any:
    cos_sin = torch.ones(8, HEAD, dtype=torch.bfloat16)
    known = {"is_neox_style": True, "head_size": HEAD, "rotary_dim": HEAD}
    return bare(cls, cos_sin_cache=cos_sin, **(known | attributes))


def attn(**attributes: Any) -> Any:
    known = {
        "impl": bare(CPUAttentionBackendImpl),
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "query_quant": None,
        "head_size": HEAD,
        "head_size_v": HEAD,
        "num_heads": HEADS,
        "num_kv_heads": 1,
        "layer_name": "layers.0.attn",
    }
    return SimpleNamespace(**(known | attributes))


class LlamaDecoderLayer(torch.nn.Module):  # type: ignore[misc]
    """A layer as vLLM would build it; `changes` replace parts of it, by "attention.name"."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        attention = {
            "qkv_proj": linear((HEADS + 2) * HEAD, HIDDEN),
            "o_proj": linear(HIDDEN, HEADS * HEAD),
            "rotary_emb": rotary(),
            "attn": attn(),
        }
        mlp = {
            "gate_up_proj": linear(2 * WIDE, HIDDEN),
            "down_proj": linear(HIDDEN, WIDE),
            "act_fn": bare(SiluAndMul),
        }
        own = {"input_layernorm": norm(HIDDEN), "post_attention_layernorm": norm(HIDDEN)}
        for name, value in changes.items():
            part = own if name in own else mlp if name in mlp else attention
            part[name] = value
        self.self_attn, self.mlp = SimpleNamespace(**attention), SimpleNamespace(**mlp)
        for name, value in own.items():
            setattr(self, name, value)


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, *decoder_layers: Any) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(decoder_layers)
        self.norm = norm(HIDDEN)


@pytest.fixture(autouse=True)
def known_class(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{LlamaDecoderLayer.__module__}.{LlamaDecoderLayer.__qualname__}"
    monkeypatch.setattr(layers, "LAYER_CLASSES", frozenset({path}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_norm": norm(HEAD), "k_norm": norm(HEAD)}, {"rotary_emb": rotary(rotary_dim=16)}],
)
def test_a_plain_layer_is_known(changes: dict[str, Any]) -> None:
    check(LlamaDecoderLayer(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"o_proj": linear(HIDDEN, 64, cpu_linear=torch.nn.functional.linear)}, "packed bfloat16"),
        ({"down_proj": SimpleNamespace(skip_bias_add=False, tp_size=1)}, "packed bfloat16"),
        ({"qkv_proj": linear(128, HIDDEN, skip_bias_add=True)}, "added elsewhere"),
        ({"down_proj": linear(HIDDEN, WIDE, tp_size=2)}, "share the work"),
        ({"input_layernorm": norm(HIDDEN, GemmaRMSNorm)}, "not a plain RMSNorm"),
        ({"input_layernorm": norm(HIDDEN, has_weight=False)}, "not a plain RMSNorm"),
        ({"q_norm": norm(HEAD, variance_size_override=8)}, "not a plain RMSNorm"),
        ({"k_norm": norm(HEAD + 8)}, "not a plain RMSNorm"),
        ({"act_fn": bare(GeluAndMul)}, "not SwiGLU"),
        ({"rotary_emb": rotary(MRotaryEmbedding)}, "rotary embedding is not a plain one"),
        ({"rotary_emb": rotary(is_neox_style=False)}, "rotary embedding is not a plain one"),
        ({"attn": attn(impl=object())}, "not vLLM's own"),
        ({"attn": attn(attn_type="encoder_only")}, "not vLLM's own"),
        ({"attn": attn(kv_sharing_target_layer_name="layers.0")}, "not vLLM's own"),
        ({"attn": attn(query_quant=object())}, "not vLLM's own"),
        ({"attn": attn(head_size_v=16)}, "not vLLM's own"),
        ({"down_proj": linear(HIDDEN, 80)}, "multiple of 32 wide"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=words):
        check(LlamaDecoderLayer(**changes))


def test_all_layers_and_the_last_norm_are_taken_over() -> None:
    model = Model(LlamaDecoderLayer(), LlamaDecoderLayer())
    assert take_over(SimpleNamespace(), model) == 2
    assert sum("forward" in vars(module) for module in model.modules()) == 3


def test_one_unknown_layer_leaves_all_as_they_are() -> None:
    model = Model(LlamaDecoderLayer(), LlamaDecoderLayer(act_fn=bare(GeluAndMul)))
    with pytest.raises(UnsupportedLayerError, match="SwiGLU"):
        take_over(SimpleNamespace(), model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_of_other_layers_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="no layer of a known kind"):
        take_over(SimpleNamespace(), torch.nn.Linear(2, 2))


def test_weights_outlive_what_vllm_puts_in_their_place() -> None:
    """The kernels have addresses alone; a reload gives the modules other weights."""
    module = LlamaDecoderLayer()
    packed = module.mlp.down_proj.cpu_linear
    take_over(SimpleNamespace(), Model(module))
    module.mlp.down_proj.cpu_linear = None
    assert any(kept is packed for kept in module.forward._linears)


def test_the_description_has_every_part() -> None:
    module = LlamaDecoderLayer(q_norm=norm(HEAD), k_norm=norm(HEAD))
    struct = layer_struct(module)
    assert (struct.qkv.k, struct.out.n, struct.gate_up.n, struct.down.k) == (64, 64, 192, 96)
    assert struct.query_norm == module.self_attn.q_norm.weight.data_ptr()
    assert struct.cos_sin == module.self_attn.rotary_emb.cos_sin_cache.data_ptr()
    assert (struct.num_heads, struct.num_kv_heads, struct.head_size) == (HEADS, 1, HEAD)
    assert layer_struct(LlamaDecoderLayer()).query_norm is None


def test_the_workspace_grows_and_does_not_shrink() -> None:
    space = Workspace(hidden=4, qkv=8, attention=4, intermediate=16)
    space.resize(100)
    assert space.qkv.shape == (128, 8)
    before = space.activated
    space.resize(7)
    assert space.activated is before
    space.resize(1000)
    assert space.activated.shape == (1000, 16)
