"""A graph from disk or from a child process, put in force between steps; failures leave eager."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xllm_plugin.cpu.graphs import background
from xllm_plugin.cpu.graphs.artefact import ForeignGraphError
from xllm_plugin.cpu.graphs.background import BackgroundGraph, State
from xllm_plugin.cpu.graphs.store import GraphStore, Manifest

FACTS = {"config": "abc"}

MAKES_A_GRAPH = """
import pickle, sys
from xllm_plugin.cpu.graphs.store import GraphStore, Manifest
request = pickle.load(open(sys.argv[1], "rb"))
store = GraphStore(request.root)
building = store.begin(store.key(request.facts))
(building / "model").write_text("graph")
store.finish(building, Manifest(request.facts, {}, "model", [], 1.0, 1.0, 1))
"""
FAILS = "import sys; print('gcc is out of order'); print(); sys.exit(3)"


class Model(torch.nn.Module):  # type: ignore[misc]
    """Stands for vLLM's: one compilable part, called as vLLM's decorator calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        part: Any = self.model
        part.do_not_compile, part.aot_compiled_fn = True, None
        part.forward = lambda x: ("eager", x)

    def run(self, x: int) -> Any:
        part: Any = self.model
        return part.forward(x) if part.do_not_compile else part.aot_compiled_fn(part, x)


@pytest.fixture
def store(tmp_path: Path) -> GraphStore:
    return GraphStore(tmp_path / "graphs")


@pytest.fixture
def make(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BackgroundGraph]:
    monkeypatch.setattr(background, "facts_of", lambda _: FACTS)
    monkeypatch.setattr(background, "bind", lambda *_: lambda _part, x: ("compiled", x))
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=512))

    def graph(script: str = MAKES_A_GRAPH) -> BackgroundGraph:
        return BackgroundGraph(config, store, (sys.executable, "-c", script))

    return graph


def keep(store: GraphStore) -> Path:
    building = store.begin(store.key(FACTS))
    (building / "model").write_text("graph")
    return store.finish(building, Manifest(FACTS, {}, "model", [], 1.0, 1.0, 1)).folder


def finish(graph: BackgroundGraph) -> None:
    assert graph._thread is not None
    graph._thread.join()


def test_eager_serves_until_the_step_after_the_child_has_finished(
    make: Callable[..., BackgroundGraph], store: GraphStore
) -> None:
    model, graph = Model(), make()
    assert not graph.load(model)
    graph.start()
    assert model.run(1) == ("eager", 1)
    finish(graph)
    assert graph.state is State.LOADED
    assert model.run(2) == ("eager", 2), "never within a step"
    graph.between_steps()
    assert str(graph.state) == State.COMPILED
    assert [model.run(3), model.run(4)] == [("compiled", 3), ("compiled", 4)]
    assert not list(store.root.glob("*.request"))


def test_the_next_start_reads_it_and_compiles_nothing(
    make: Callable[..., BackgroundGraph], store: GraphStore
) -> None:
    keep(store)
    model, graph = Model(), make(FAILS)
    assert graph.load(model)
    graph.start()
    assert graph._thread is None
    assert model.run(1) == ("compiled", 1)


def test_a_child_that_fails_is_reported_once_with_its_last_words(
    make: Callable[..., BackgroundGraph], caplog: pytest.LogCaptureFixture
) -> None:
    model, graph = Model(), make(FAILS)
    graph.load(model)
    with caplog.at_level(logging.ERROR, logger="vllm.xllm_plugin"):
        graph.start()
        finish(graph)
        graph.between_steps()
    assert graph.state is State.FAILED
    assert model.run(1) == ("eager", 1)
    (record,) = caplog.records
    assert "up to 512 tokens" in record.message
    assert "code 3: gcc is out of order" in record.message


def test_a_folder_that_cannot_be_written_is_reported(
    make: Callable[..., BackgroundGraph], store: GraphStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.root.write_text("a file is in the way")
    graph = make()
    graph.load(Model())
    graph.start()
    finish(graph)
    assert graph.state is State.FAILED
    assert str(store.root) in caplog.text


@pytest.mark.parametrize("error", [ForeignGraphError("input 3 differs"), RuntimeError("oneDNN")])
def test_a_graph_that_raises_at_first_gives_the_model_back(
    make: Callable[..., BackgroundGraph],
    store: GraphStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(background, "bind", lambda *_: broken)
    keep(store)
    model, graph = Model(), make()
    graph.load(model)
    assert [model.run(1), model.run(2)] == [("eager", 1), ("eager", 2)]
    assert graph.state is State.FAILED
    assert caplog.text.count(str(error)) == 1


def test_a_graph_that_cannot_be_read_is_made_again(
    make: Callable[..., BackgroundGraph], store: GraphStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep(store)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise ForeignGraphError("vllm.model_executor.models.mixtral has changed since")

        patch.setattr(background, "bind", refuse)
        model, graph = Model(), make()
        assert not graph.load(model)
        assert not folder.exists()
    graph.start()
    finish(graph)
    graph.between_steps()
    assert model.run(1) == ("compiled", 1)


def test_without_memory_nothing_is_started(
    make: Callable[..., BackgroundGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(background, "available_bytes", lambda: 2**20)
    graph = make()
    graph.load(Model())
    with caplog.at_level(logging.WARNING, logger="vllm.xllm_plugin"):
        graph.start()
    assert graph._thread is None
    assert "--kv-cache-memory-bytes" in caplog.text


def test_a_configuration_that_cannot_travel_leaves_eager(
    make: Callable[..., BackgroundGraph], store: GraphStore, caplog: pytest.LogCaptureFixture
) -> None:
    class Local:
        scheduler_config = SimpleNamespace(max_num_batched_tokens=512)

    make()
    graph = BackgroundGraph(Local(), store)
    graph.load(Model())
    graph.start()
    assert graph.state is State.FAILED
    assert "another process" in caplog.text


def test_the_child_may_run_where_the_process_may() -> None:
    assert background._cpus() >= os.sched_getaffinity(0)


def test_the_binding_of_the_engine_is_not_the_child_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PLACES", "{0}")
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")
    found = background._environment()
    assert found["OMP_NUM_THREADS"] == "1"
    assert "OMP_PLACES" not in found
    assert "GOMP_CPU_AFFINITY" not in found
