"""Fixed or elastic, before and after sleep: an engine answers the same, and sleep frees memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.engine

NATIVE = "tiny-llama"  # its layers and its attention run as native code
EXPERTS = "tiny-qwen3-moe"
VARIANTS = [
    (NATIVE, "async"),
    *(
        pytest.param((model, steps), marks=pytest.mark.full)
        for model, steps in [(NATIVE, "sync"), (EXPERTS, "sync")]
    ),
]


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(scope="module")
def found(variant: tuple[str, str], drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive("variants_driver", *variant)


def test_the_engines_were_what_they_are_called(
    variant: tuple[str, str], found: dict[str, Any]
) -> None:
    """Otherwise that both agree would show nothing."""
    model, steps = variant
    fixed, elastic = found["fixed"], found["elastic"]
    assert (fixed["model"]["is_elastic"], elastic["model"]["is_elastic"]) == (False, True)
    for engine in (fixed, elastic):
        assert engine["model"]["is_native"] is (model == NATIVE)
        assert engine["model"]["thread"].startswith("xllm-model") is (steps == "async")
    assert len({tuple(tokens) for tokens in fixed["answers"]}) > 3


def test_elastic_and_fixed_answer_the_same(found: dict[str, Any]) -> None:
    assert found["elastic"]["answers"] == found["fixed"]["answers"]


@pytest.mark.parametrize("memory", ["fixed", "elastic"])
@pytest.mark.parametrize("level", ["1", "2"])
def test_an_engine_that_slept_answers_as_before(
    variant: tuple[str, str], found: dict[str, Any], memory: str, level: str
) -> None:
    engine = found[memory]
    slept = engine["slept"][level]
    if level == "2" and variant[0] != NATIVE:
        assert "vLLM's own code runs the model's layers" in slept["refused"]
        return
    assert slept["answers"] == engine["answers"]
    weight_bytes = engine["model"]["weight_bytes"]
    assert weight_bytes > 20 * 2**20
    assert slept["before"] - slept["asleep"] > 0.8 * weight_bytes
    assert slept["after"] - slept["asleep"] > 0.8 * weight_bytes
