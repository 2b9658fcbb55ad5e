"""A compiled function, saved and read back: it fits the module it is bound to, or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xllm_plugin.cpu.graphs.artefact import (
    ForeignGraphError,
    bind,
    describe,
    generalise,
    kernels_in,
    load,
    take_inputs,
)
from xllm_plugin.cpu.graphs.compiler import baked_in
from xllm_plugin.cpu.graphs.store import INDUCTOR, MODEL, Manifest, StoredGraph

pytestmark = pytest.mark.engine  # a small compilation, some seconds


class Layer(torch.nn.Module):  # type: ignore[misc]
    """A weight and a batch dimension."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * (x + self.weight.sum(0))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredGraph:
    """A graph compiled for one layer, as the child process compiles a model."""
    folder = tmp_path_factory.mktemp("graph")
    layer, x = Layer(), torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, 0)
    with kernels_in(folder / INDUCTOR), torch.no_grad():
        with torch._dynamo.config.patch(enable_aot_compile=True):
            compiled: Any = torch.compile(
                layer.forward,
                fullgraph=True,
                options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
            )
        function = compiled.aot_compile(((x,), {}))
    assert baked_in(function) == []
    function.save_compiled_function(str(folder / MODEL))
    function = load(folder, layer)
    seen: list[Any] = []
    give_back = take_inputs(function, lambda inputs: seen.append([describe(i) for i in inputs]))
    with torch.no_grad():
        function(layer, x)
        function(layer, torch.randn(9, 8))
    give_back()
    inputs = generalise(seen[0], seen[1])
    return StoredGraph(folder, Manifest({}, {}, "", inputs, wall_s=0, cpu_s=0, peak_bytes=0))


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_it_computes_with_the_weights_of_the_module_it_is_bound_to(
    stored: StoredGraph, num_tokens: int
) -> None:
    layer, x = Layer(), torch.randn(num_tokens, 8)
    function = bind(stored, layer)
    with torch.no_grad():
        torch.testing.assert_close(function(layer, x), layer(x))
        layer.weight.add_(1)
        torch.testing.assert_close(function(layer, x), layer(x))


def test_reading_it_compiles_nothing(stored: StoredGraph) -> None:
    kernels = set(stored.folder.rglob("*.so"))
    assert kernels
    bind(stored, Layer())
    assert set(stored.folder.rglob("*.so")) == kernels


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        pytest.param(Layer(dtype=torch.float64), torch.randn(3, 8), id="type"),
        pytest.param(Layer(width=4), torch.randn(3, 4), id="shape"),
    ],
)
def test_a_module_that_differs_is_refused_before_it_runs(
    stored: StoredGraph, layer: Layer, x: torch.Tensor
) -> None:
    function = bind(stored, layer)
    with torch.no_grad(), pytest.raises(ForeignGraphError, match="compiled for"):
        function(layer, x)


def test_code_that_has_changed_since_is_refused(
    stored: StoredGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inspect.getsource", lambda _: "another text")
    with pytest.raises(ForeignGraphError, match="has changed since"):
        bind(stored, Layer())


def test_what_changes_with_the_batch_is_left_open() -> None:
    one = [["torch.float32", [8, 4], [4, 1]], ["int"]]
    other = [["torch.float32", [24, 4], [4, 1]], ["int"]]
    assert generalise(one, other) == [["torch.float32", [None, 4], [4, 1]], ["int"]]
