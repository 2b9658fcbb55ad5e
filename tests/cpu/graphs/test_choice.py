"""Which models are compiled in the background."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module")
def choice() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu.graphs import choice

    return choice


def config(**changes: Any) -> SimpleNamespace:
    """What vLLM's CPU platform makes of a model it compiles."""
    from vllm.config import CompilationMode

    compilation = SimpleNamespace(
        mode=CompilationMode.DYNAMO_TRACE_ONCE,
        custom_ops=["none", "-rotary_embedding"],
        inductor_compile_config={"cpp.dynamic_threads": True},
    )
    values = {
        "additional_config": {},
        "compilation_config": compilation,
        "model_config": SimpleNamespace(is_multimodal_model=False),
        "quant_config": None,
        "lora_config": None,
        "speculative_config": None,
        "weight_transfer_config": None,
        "parallel_config": SimpleNamespace(world_size=1, data_parallel_size=1),
    }
    return SimpleNamespace(**values | changes)


def test_a_model_that_vllm_would_compile_starts_eager_and_is_compiled_as_vllm_does(
    choice: Any,
) -> None:
    found = config()
    assert choice.refusal(found) is None
    assert not choice.compiles_later(found)
    choice.compile_later(found)
    assert choice.compiles_later(found)
    assert found.compilation_config.mode.name == "NONE"
    assert found.compilation_config.custom_ops == ["all", "-rotary_embedding"]
    choice.to_be_compiled(found)
    assert vars(found.compilation_config) == vars(config().compilation_config)


def graph(**settings: Any) -> dict[str, Any]:
    return {"additional_config": {"xllm": {"graph": settings}}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (graph(mode="off"), "graph.mode is off"),
        (graph(background_compile=False), "graph.background_compile is off"),
        ({"model_config": None}, "there is no model"),
        ({"model_config": SimpleNamespace(is_multimodal_model=True)}, "it takes images or sound"),
        ({"quant_config": "awq"}, "it is quantised"),
        ({"lora_config": "r=8"}, "LoRA"),
        ({"speculative_config": "ngram"}, "speculative decoding"),
        ({"weight_transfer_config": "nccl"}, "weights are replaced at run time"),
        (
            {"parallel_config": SimpleNamespace(world_size=2, data_parallel_size=1)},
            "several ranks share the work",
        ),
        (
            {"parallel_config": SimpleNamespace(world_size=1, data_parallel_size=2)},
            "several ranks share the work",
        ),
    ],
)
def test_the_others_are_vllm_s(choice: Any, changes: dict[str, Any], reason: str) -> None:
    assert choice.refusal(config(**changes)) == reason


def test_a_model_that_vllm_does_not_compile_stays_eager(choice: Any) -> None:
    """--enforce-eager, and -O0: vLLM's CPU platform leaves no mark there."""
    found = config()
    found.compilation_config.inductor_compile_config.clear()
    assert choice.refusal(found) == "vLLM does not compile it"


def test_without_a_compiler_inductor_has_nothing_to_build_with(
    choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "find_compiler", lambda: None)
    assert choice.refusal(config()) == "no C++ compiler was found"
