"""Linear layers over packed weights, against torch in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims

shims.install()
torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from xllm_plugin.cpu.native.linear import PackedLinear, can_pack, packing  # noqa: E402

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

EPSILON = 2.0**-8  # half a step of bfloat16, relative


def near(found: Any, expected: Any) -> bool:
    """Whether `found` is `expected`, rounded to bfloat16 once, but for the order of the sum."""
    allowed = expected.abs() * EPSILON + 1e-5 * expected.abs().max()
    return bool(((found.float() - expected).abs() <= allowed).all())


def random(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 12, 96, 97, 200])
@pytest.mark.parametrize(("n", "k"), [(32, 4), (40, 64), (96, 576), (1100, 32), (576, 1536)])
def test_it_multiplies(kernels: Any, num_rows: int, n: int, k: int) -> None:
    torch.manual_seed(n * num_rows)
    weight, x = random(n, k), random(num_rows, k)
    found = PackedLinear(kernels, weight, None)(x, weight, None)
    assert found.shape == (num_rows, n)
    assert near(found, x.float() @ weight.float().T)


def test_leading_dimensions_and_strided_rows(kernels: Any) -> None:
    weight, x = random(64, 32), random(3, 5, 64)[..., ::2]
    found = PackedLinear(kernels, weight, None)(x, weight, None)
    assert found.shape == (3, 5, 64)
    assert near(found, x.float() @ weight.float().T)


def test_no_row_gives_no_row(kernels: Any) -> None:
    assert PackedLinear(kernels, random(64, 32), None)(random(0, 32), None, None).shape == (0, 64)


def test_the_bias_is_added_where_vllm_hands_it_over(kernels: Any) -> None:
    weight, bias, x = random(40, 32), random(40), random(7, 32)
    packed = PackedLinear(kernels, weight, bias)
    product = x.float() @ weight.float().T
    assert near(packed(x, weight, bias), product + bias.float())
    assert near(packed(x, weight, None), product)


def layer(weight: Any, **more: Any) -> Any:
    return SimpleNamespace(weight=torch.nn.Parameter(weight, requires_grad=False), **more)


def test_layers_loaded_meanwhile_are_packed(kernels: Any) -> None:
    from vllm.model_executor.layers import utils

    theirs = utils.dispatch_cpu_unquantized_gemm
    one, head = layer(random(32, 32)), layer(random(32, 32))
    with packing(kernels):
        utils.dispatch_cpu_unquantized_gemm(one, remove_weight=True)
        utils.dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    assert utils.dispatch_cpu_unquantized_gemm is theirs
    assert isinstance(one.cpu_linear, PackedLinear)
    assert one.weight.numel() == 0
    assert head.weight.numel() == 32 * 32


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(32, 32),
        torch.zeros(4, 32, 32, dtype=torch.bfloat16),
        torch.zeros(32, 30, dtype=torch.bfloat16),
        torch.zeros(32, 32, dtype=torch.bfloat16, device="meta"),
    ],
)
def test_other_weights_are_vllm_s_to_pack(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, weight: Any
) -> None:
    from vllm.model_executor.layers import utils

    asked: list[bool] = []
    theirs = "dispatch_cpu_unquantized_gemm"
    monkeypatch.setattr(utils, theirs, lambda _, remove: asked.append(remove))
    assert not can_pack(weight)
    with packing(kernels):
        utils.dispatch_cpu_unquantized_gemm(layer(weight), True)
    assert asked == [True]
