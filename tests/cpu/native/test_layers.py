"""Which layers and models are taken over; a refusal says what the kernels do not do."""

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

from xllm_plugin.cpu.native import model as native_model  # noqa: E402
from xllm_plugin.cpu.native.layers import (  # noqa: E402
    UnsupportedLayerError,
    check,
    layer_struct,
)
from xllm_plugin.cpu.native.library import DecoderLayer, Linear  # noqa: E402
from xllm_plugin.cpu.native.linear import PackedLinear  # noqa: E402
from xllm_plugin.cpu.native.model import (  # noqa: E402
    NativeLayer,
    NativeModel,
    NativeNorm,
    full_refusal,
    take_over,
)
from xllm_plugin.cpu.native.scratch import Scratch  # noqa: E402

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


def impl(**attributes: Any) -> Any:
    known = {
        "scale": 0.5,
        "sliding_window": -1,
        "logits_soft_cap": 0,
        "alibi_slopes": None,
        "sinks": None,
        "is_fp8_kv_cache": False,
    }
    return bare(CPUAttentionBackendImpl, **(known | attributes))


def attn(**attributes: Any) -> Any:
    known = {
        "impl": impl(),
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
        self.aux_hidden_state_layers: tuple[int, ...] = ()


@pytest.fixture(autouse=True)
def known_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in (("LAYER_CLASSES", LlamaDecoderLayer), ("MODEL_CLASSES", Model)):
        path = f"{cls.__module__}.{cls.__qualname__}"
        monkeypatch.setattr(native_model, name, frozenset({path}))


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


def test_the_description_has_every_part() -> None:
    module = LlamaDecoderLayer(q_norm=norm(HEAD), k_norm=norm(HEAD))
    struct = layer_struct(module)
    assert (struct.qkv.k, struct.out.n, struct.gate_up.n, struct.down.k) == (64, 64, 192, 96)
    assert struct.query_norm == module.self_attn.q_norm.weight.data_ptr()
    assert struct.cos_sin == module.self_attn.rotary_emb.cos_sin_cache.data_ptr()
    heads = struct.heads
    assert (heads.num_heads, heads.num_kv_heads, heads.head_size) == (HEADS, 1, HEAD)
    assert heads.scale == 0.5
    assert layer_struct(LlamaDecoderLayer()).query_norm is None


def replaced(model: Any) -> list[type]:
    """What stands in for a `forward`."""
    return [type(module.forward) for module in model.modules() if "forward" in vars(module)]


def test_a_plain_model_runs_as_one_call() -> None:
    model = Model(LlamaDecoderLayer(), LlamaDecoderLayer())
    assert full_refusal(model) is None
    assert take_over(SimpleNamespace(), model, is_full=True) == 2
    assert replaced(model) == [NativeModel]


def test_or_as_its_layers_and_the_last_norm() -> None:
    model = Model(LlamaDecoderLayer(), LlamaDecoderLayer())
    assert take_over(SimpleNamespace(), model, is_full=False) == 2
    assert replaced(model) == [NativeLayer, NativeLayer, NativeNorm]


@pytest.mark.parametrize("is_full", [True, False])
def test_one_unknown_layer_leaves_all_as_they_are(is_full: bool) -> None:
    model = Model(LlamaDecoderLayer(), LlamaDecoderLayer(act_fn=bare(GeluAndMul)))
    with pytest.raises(UnsupportedLayerError, match="SwiGLU"):
        full_refusal(model)
    with pytest.raises(UnsupportedLayerError, match="SwiGLU"):
        take_over(SimpleNamespace(), model, is_full=is_full)
    assert replaced(model) == []


def test_a_model_of_other_layers_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="no layer of a known kind"):
        full_refusal(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"impl": impl(sliding_window=64)}, "window"),
        ({"impl": impl(logits_soft_cap=30.0)}, "capped or biased"),
        ({"impl": impl(alibi_slopes=torch.ones(HEADS))}, "capped or biased"),
        ({"impl": impl(sinks=torch.ones(HEADS))}, "capped or biased"),
        ({"impl": impl(is_fp8_kv_cache=True)}, "quantised"),
        ({"impl": impl(scale=0.25)}, "differ in their heads"),
        ({"num_kv_heads": 2}, "differ in their heads"),
    ],
)
def test_attention_of_another_kind_stays_vllm_s(changes: dict[str, Any], words: str) -> None:
    odd = LlamaDecoderLayer(attn=attn(**changes))
    assert words in str(full_refusal(Model(LlamaDecoderLayer(), odd)))


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"aux_hidden_state_layers": (1,)}, "hidden states"),
        ({"norm": norm(HIDDEN, GemmaRMSNorm)}, "last norm"),
        ({"norm": norm(HIDDEN, variance_epsilon=1e-6)}, "last norm"),
        ({"layers": torch.nn.ModuleList()}, "no layer"),
    ],
)
def test_a_stack_of_another_kind_is_not_one_call(attributes: dict[str, Any], words: str) -> None:
    model = Model(LlamaDecoderLayer())
    for name, value in attributes.items():
        setattr(model, name, value)
    try:
        refusal = full_refusal(model)
    except UnsupportedLayerError as unsupported:
        refusal = str(unsupported)
    assert words in str(refusal)


def test_heads_that_the_kernels_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own attention takes multiples of 16."""
    wide = attn(head_size=48, head_size_v=48)
    layer = LlamaDecoderLayer(attn=wide, rotary_emb=rotary(head_size=48))
    assert "its heads are of 48" in str(full_refusal(Model(layer)))


@pytest.mark.parametrize("is_full", [True, False])
def test_weights_outlive_what_vllm_puts_in_their_place(is_full: bool) -> None:
    """The kernels have addresses alone; a reload gives the modules other weights."""
    module = LlamaDecoderLayer()
    model, packed = Model(module), module.mlp.down_proj.cpu_linear
    take_over(SimpleNamespace(), model, is_full=is_full)
    module.mlp.down_proj.cpu_linear = None
    kept = model.forward._linears[0] if is_full else module.forward._linears
    assert any(linear is packed for linear in kept)


def test_the_scratch_grows_and_does_not_shrink() -> None:
    layer = DecoderLayer(qkv=Linear(k=32, n=96), down=Linear(k=64))
    layer.heads.num_heads, layer.heads.head_size = 1, 32
    scratch = Scratch(layer)
    scratch.resize(100)
    assert scratch.qkv.shape == (128, 96)
    assert scratch.struct.qkv == scratch.qkv.data_ptr()
    before = scratch.attention
    scratch.resize(7)
    assert scratch.attention is before
    scratch.resize(1000)
    assert scratch.attention.shape == (1000, 32)
    assert scratch.struct.attention == scratch.attention.data_ptr()
