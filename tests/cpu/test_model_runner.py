"""The CPU runner: when native code takes the layers over, and when vLLM's own stays."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module", autouse=True)
def module() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu import model_runner

    return model_runner


@pytest.fixture
def runner(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner whose vLLM part only notes what it is asked for; native code would run its model."""
    from vllm.config import CompilationMode

    asked: list[str] = []
    for name in ("load_model", "reload_weights", "warming_up_model"):
        monkeypatch.setattr(
            module.CPUModelRunner, name, lambda self, *_, _name=name: asked.append(_name)
        )
    monkeypatch.setattr(module, "native_refusal", lambda _: None)
    monkeypatch.setattr(module, "compiles_later", lambda _: False)
    monkeypatch.setattr(module, "built_library", lambda: "library")
    monkeypatch.setattr(module, "Kernels", lambda path: f"kernels of {path}")
    monkeypatch.setattr(module, "packing", Noted("packing", asked))
    monkeypatch.setattr(module, "full_refusal", lambda _: found.refusal)
    monkeypatch.setattr(
        module, "take_over", lambda *_, is_full: asked.append(f"take over, {is_full}") or 30
    )
    found = module.XllmCpuModelRunner.__new__(module.XllmCpuModelRunner)
    found.vllm_config, found.model, found.asked = (
        SimpleNamespace(additional_config={}),
        "model",
        asked,
    )
    found.refusal = None
    found.compilation_config = SimpleNamespace(mode=CompilationMode.NONE)
    found.profile_run = lambda: asked.append("profile run")
    return found


class Noted:
    """A context manager that notes when it is entered and left."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self._name, self._asked = name, asked

    def __call__(self, kernels: str) -> Noted:
        assert kernels == "kernels of library"
        return self

    def __enter__(self) -> None:
        self._asked.append(f"{self._name} on")

    def __exit__(self, *_: object) -> None:
        self._asked.append(f"{self._name} off")


PACKED = ["packing on", "{}", "packing off", "take over, True"]


def test_weights_are_packed_while_they_load_and_reload(runner: Any) -> None:
    runner.load_model()
    runner.warming_up_model()
    runner.reload_weights()
    first = [step.format("load_model") for step in PACKED]
    again = [step.format("reload_weights") for step in PACKED]
    assert runner.asked == [*first, "profile run", *again]


def asks_vllm_alone(runner: Any) -> bool:
    runner.load_model()
    runner.warming_up_model()
    runner.reload_weights()
    return bool(runner.asked == ["load_model", "warming_up_model", "reload_weights"])


def test_a_refused_model_is_vllm_s(
    runner: Any, module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "native_refusal", lambda _: "it is quantised")
    with caplog.at_level(logging.INFO, logger="vllm.xllm_plugin"):
        assert asks_vllm_alone(runner)
    assert "it is quantised" in caplog.text


def test_a_model_that_vllm_compiles_is_vllm_s(runner: Any) -> None:
    """The first process may have failed to build what this one could."""
    from vllm.config import CompilationMode

    runner.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
    assert asks_vllm_alone(runner)


def test_kernels_that_are_gone_leave_the_model_to_vllm(
    runner: Any, module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise module.NativeBuildError("the cache cannot be written")

    monkeypatch.setattr(module, "built_library", refuse)
    with caplog.at_level(logging.INFO, logger="vllm.xllm_plugin"):
        assert asks_vllm_alone(runner)
    assert "the cache cannot be written" in caplog.text


def test_a_layer_that_is_not_known_leaves_all_of_them_to_vllm(
    runner: Any, module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> str:
        raise module.UnsupportedLayerError("its activation is not SwiGLU")

    monkeypatch.setattr(module, "full_refusal", refuse)
    with caplog.at_level(logging.WARNING, logger="vllm.xllm_plugin"):
        runner.load_model()
    assert "uncompiled: its activation is not SwiGLU" in caplog.text
    assert "XLLM_GRAPH__MODE=off" in caplog.text


@pytest.mark.parametrize(("mode", "refusal"), [("partial", None), ("auto", "it has a window")])
def test_attention_stays_vllm_s_when_asked_or_needed(
    runner: Any, caplog: pytest.LogCaptureFixture, mode: str, refusal: str | None
) -> None:
    runner.refusal = refusal
    runner.vllm_config.additional_config = {"xllm": {"graph": {"mode": mode}}}
    with caplog.at_level(logging.INFO, logger="vllm.xllm_plugin"):
        runner.load_model()
    assert runner.asked[-1] == "take over, False"
    assert f"around vLLM's attention: {refusal or 'graph.mode is partial'}" in caplog.text


def test_a_model_to_be_compiled_later_serves_eager_meanwhile(
    runner: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph:
        def __init__(self, vllm_config: object) -> None:
            runner.asked.append("graph for the configuration as it was")

        def load(self, model: object) -> None:
            runner.asked.append(f"graph from disk for the {model}")

        def start(self) -> None:
            runner.asked.append("start")

        def between_steps(self) -> None:
            runner.asked.append("between steps")

    monkeypatch.setattr(module, "native_refusal", lambda _: "it is no Llama")
    monkeypatch.setattr(module, "compiles_later", lambda _: True)
    monkeypatch.setattr(module, "BackgroundGraph", Graph)
    monkeypatch.setattr(
        module.CPUModelRunner, "execute_model", lambda self, _: self.asked.append("step")
    )
    runner.load_model()
    runner.warming_up_model()
    runner.start_background_work()
    runner.execute_model("batch")
    assert runner.asked == [
        "graph for the configuration as it was",
        "load_model",
        "graph from disk for the model",
        "profile run",
        "start",
        "between steps",
        "step",
    ]


def test_an_unfinished_prompt_draws_nothing_from_its_seed(
    runner: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would take back two draws of one kind that only a GPU's generators know."""
    import numpy as np
    import torch

    seeded, unfinished = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    runner.input_batch = SimpleNamespace(generators={0: seeded, 2: unfinished})
    runner.discard_request_mask = SimpleNamespace(np=np.array([False, False, True]))

    def draw(self: Any) -> list[float]:
        return [torch.rand(1, generator=g).item() for g in self.input_batch.generators.values()]

    monkeypatch.setattr(module.CPUModelRunner, "_sample", draw)
    monkeypatch.setattr(
        module.CPUModelRunner, "_bookkeeping_sync", lambda self: [*self.input_batch.generators]
    )
    first, again = runner._sample(), runner._sample()
    assert first[0] != again[0]
    assert first[1] == again[1] == first[0]
    assert runner._bookkeeping_sync() == [0]
    assert runner.input_batch.generators == {0: seeded, 2: unfinished}


def test_the_kv_cache_sleeps_whether_elastic_or_fixed(runner: Any) -> None:
    class Memory:
        def sleep(self) -> None:
            runner.asked.append("sleep")

        def wake(self) -> None:
            runner.asked.append("wake")

        def drop(self, calls: object) -> None:
            runner.asked.append("drop")

    runner.sleep_kv_cache()
    runner.wake_kv_cache()
    assert runner.asked == [], "a model without attention has none"
    runner._fixed_memory = Memory()
    runner.sleep_kv_cache()
    runner.wake_kv_cache()
    assert runner.asked == ["drop"], "a fixed one comes back by itself, with its first use"
    runner.elastic_memory = Memory()
    runner.sleep_kv_cache()
    runner.wake_kv_cache()
    assert runner.asked == ["drop", "sleep", "wake"]


def test_weights_that_nothing_could_load_again_are_kept(
    runner: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_model_loader", lambda config: config.loader)
    loader = SimpleNamespace(get_all_weights=lambda: None)
    runner.load_config = SimpleNamespace(load_format="auto", loader=loader)
    runner.speculative_config = runner.lora_config = None
    runner._kernels = object()
    assert runner.reload_refusal() is None
    runner.lora_config = object()
    assert "LoRA" in runner.reload_refusal()
    runner.lora_config, runner.speculative_config = None, object()
    assert "draft" in runner.reload_refusal()
    runner.speculative_config, runner._kernels = None, None
    assert "vLLM's own code" in runner.reload_refusal()
    runner._kernels = object()
    runner.load_config = SimpleNamespace(load_format="dummy", loader=object())
    assert "--load-format dummy" in runner.reload_refusal()
