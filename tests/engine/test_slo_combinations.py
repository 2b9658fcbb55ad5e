"""LoRA, images, speculative decoding and KV connectors answer the same under the policy slo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.full]

COMBINATIONS = {
    "lora": ("tiny-llama", 24),
    "multimodal": ("tiny-llava", 16),
    "speculation": ("tiny-llama", 20),
    "connector": ("tiny-llama", 20),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_tokens_are_those_of_vllm_s_own_order(
    name: str, drive: Callable[..., dict[str, Any]]
) -> None:
    model, num_requests = COMBINATIONS[name]
    found = drive("slo_combinations_driver", name, model=model)
    scenario = found[name]
    assert [request for request, _ in scenario["ours"]] == [f"{i:03}" for i in range(num_requests)]
    assert scenario["ours"] == scenario["theirs"]
    assert scenario["counts"]["planned"] > 0
    assert set(scenario["leftovers"].values()) == {0}
