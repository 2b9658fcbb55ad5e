"""An elastic KV cache answers what a fixed one answers, and takes the memory of what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.engine

SCENARIOS = ("chunked_prefill", "prefix_caching", "preemption", "resized_while_running")


@pytest.fixture(scope="module")
def fixed(drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive("elastic_driver")


@pytest.fixture(scope="module")
def elastic(drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive("elastic_driver", XLLM_XTENSOR__ENABLED="1")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_answers_are_the_same(
    fixed: dict[str, Any], elastic: dict[str, Any], scenario: str
) -> None:
    assert elastic[scenario] == fixed[scenario]


def test_the_scenarios_were_what_they_are_called(
    fixed: dict[str, Any], elastic: dict[str, Any]
) -> None:
    """Otherwise that both agree would show nothing."""
    assert (fixed["pool"], elastic["pool"]) == ("BlockPool", "ElasticBlockPool")
    assert len({tuple(tokens) for tokens in elastic["chunked_prefill"]}) > 2
    assert all(elastic["prefix_caching"]["cached"])
    assert elastic["memory"]["preemptions"] > fixed["memory"]["preemptions"] == 0


def test_whoever_listens_to_kv_events_takes_nothing_to_be_cached_that_is_gone(
    elastic: dict[str, Any],
) -> None:
    """Blocks that a smaller budget takes away are evicted by no request."""
    check_events(elastic["memory"])


def check_events(memory: dict[str, Any]) -> None:
    """What a listener takes to be cached is so, and the other way round."""
    assert memory["num_wrongly_held"] == memory["num_not_told"] == 0
    assert memory["num_removed"] > 0
    assert memory["num_cached"] > 0


def check_resident_memory(memory: dict[str, Any]) -> None:
    """It is that of live blocks; the null block's slab stays."""
    assert memory["is_rss_of_live_blocks"]
    assert memory["most_bytes"] > 8 * memory["slab_bytes"]
    assert memory["idle_bytes"] == memory["after_bytes"] == memory["slab_bytes"]
    assert memory["num_resident_slabs"] == 1


def test_resident_memory_is_that_of_live_blocks(elastic: dict[str, Any]) -> None:
    check_resident_memory(elastic["memory"])


@pytest.fixture(scope="module")
def contiguous(drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive(
        "elastic_driver",
        XLLM_XTENSOR__ENABLED="1",
        XLLM_XTENSOR__FORM="contiguous",
        XLLM_XTENSOR__SLAB_BLOCKS="2",
    )


@pytest.mark.full
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_contiguous_requests_are_answered_the_same(
    fixed: dict[str, Any], contiguous: dict[str, Any], scenario: str
) -> None:
    found, expected = contiguous[scenario], fixed[scenario]
    if scenario == "prefix_caching":  # whole slabs alone are shared
        assert all(0 < a <= b for a, b in zip(found["cached"], expected["cached"], strict=True))
        found, expected = found["tokens"], expected["tokens"]
    assert found == expected


@pytest.mark.full
def test_contiguous_requests_have_plain_ranges_as_block_tables(
    elastic: dict[str, Any], contiguous: dict[str, Any]
) -> None:
    assert contiguous["pool"] == "ContiguousBlockPool"
    assert contiguous["memory"]["preemptions"] > 0
    assert contiguous["tables"]["plain_ranges"] == contiguous["tables"]["all"] > 100
    assert elastic["tables"]["plain_ranges"] < elastic["tables"]["all"], "the test can tell"


@pytest.mark.full
def test_contiguous_requests_share_the_memory_of_prefixes(contiguous: dict[str, Any]) -> None:
    memory = contiguous["memory"]
    assert memory["num_aliases"] > 0
    assert memory["is_rss_of_live_blocks"]
    assert memory["idle_bytes"] == memory["after_bytes"] == memory["slab_bytes"]
    check_events(memory)


HYBRID = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 64,
}
LATENT = ("elastic_driver", json.dumps({"dtype": "bfloat16", "block_size": 16}))


@pytest.mark.full
def test_a_hybrid_model_answers_the_same(
    drive: Callable[..., dict[str, Any]], fixed: dict[str, Any]
) -> None:
    """Layers with a sliding window give blocks back while their request runs."""
    # A request has blocks for either kind of layer.
    options = json.dumps({"hf_overrides": HYBRID, "num_gpu_blocks_override": 129})
    hybrid = drive("elastic_driver", options)
    elastic = drive("elastic_driver", options, XLLM_XTENSOR__ENABLED="1")
    assert elastic["groups"] == ["FullAttentionSpec", "SlidingWindowSpec"]
    assert hybrid["chunked_prefill"] != fixed["chunked_prefill"], "the window would not be seen"
    for scenario in SCENARIOS:
        assert elastic[scenario] == hybrid[scenario]
    assert all(elastic["prefix_caching"]["cached"])
    assert elastic["memory"]["preemptions"] > hybrid["memory"]["preemptions"] == 0
    check_resident_memory(elastic["memory"])


SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.mark.full
def test_speculative_decoding_answers_what_a_fixed_cache_answers_without_it(
    drive: Callable[..., dict[str, Any]], fixed: dict[str, Any]
) -> None:
    options = json.dumps({"speculative_config": SPECULATION})
    elastic = drive("elastic_driver", options, XLLM_XTENSOR__ENABLED="1")
    assert elastic["num_drafted"] > 0
    for scenario in SCENARIOS:
        assert elastic[scenario] == fixed[scenario]
    assert elastic["memory"]["preemptions"] > 0
    assert elastic["memory"]["num_wrongly_held"] == 0
    check_resident_memory(elastic["memory"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "block_tokens"),
    [
        pytest.param("tiny-deepseek-v3", 16, id="latent-attention"),  # no whole page a block
        pytest.param("tiny-qwen3-moe", 32, id="experts"),
    ],
)
def test_models_with_experts_answer_the_same_from_as_many_blocks(
    drive: Callable[..., dict[str, Any]], model: str, block_tokens: int
) -> None:
    """Experts have no float32 on a CPU: only what forms the same batches has to be equal.

    So the fixed cache has as many blocks as the elastic one's budget in the scenario with
    preemption, and no prefix is found (vLLM caches none with latent attention on a CPU).
    """
    options = {"dtype": "bfloat16", "block_size": block_tokens, "enable_prefix_caching": False}
    few = {"num_gpu_blocks_override": 20 * 32 // block_tokens}
    fixed = drive("elastic_driver", json.dumps(options | few), model=model)
    elastic = drive("elastic_driver", json.dumps(options), model=model, XLLM_XTENSOR__ENABLED="1")
    assert elastic["pool"] == "ElasticBlockPool"
    for scenario in ("chunked_prefill", "prefix_caching", "preemption"):
        assert elastic[scenario] == fixed[scenario]
    assert elastic["memory"]["preemptions"] == fixed["memory"]["preemptions"] > 0
    check_resident_memory(elastic["memory"])


@pytest.mark.full
def test_contiguous_requests_of_native_layers_are_answered_the_same_ahead_and_after_sleep(
    drive: Callable[..., dict[str, Any]],
) -> None:
    settings = {"enabled": True, "form": "contiguous", "slab_blocks": 2}
    fixed = drive("contiguous_driver", json.dumps({"enabled": False}))
    contiguous = drive("contiguous_driver", json.dumps(settings))
    assert (fixed["pool"], contiguous["pool"]) == ("BlockPool", "ContiguousBlockPool")
    assert len({tuple(tokens) for tokens in fixed["answers"]}) > 3
    assert contiguous["answers"] == fixed["answers"]
    assert contiguous["after_sleep"] == contiguous["answers"]
    assert contiguous["num_native"] == fixed["num_native"] == 1, "the stack of layers"
    assert contiguous["num_cached"] > 0, "prefixes are shown"
    assert contiguous["asleep_bytes"] == 0 < contiguous["awake_bytes"]


@pytest.mark.full
def test_contiguous_requests_of_latent_attention_are_answered_the_same(
    drive: Callable[..., dict[str, Any]],
) -> None:
    fixed = drive(*LATENT, model="tiny-deepseek-v3")
    contiguous = drive(
        *LATENT,
        model="tiny-deepseek-v3",
        XLLM_XTENSOR__ENABLED="1",
        XLLM_XTENSOR__FORM="contiguous",
    )
    assert contiguous["pool"] == "ContiguousBlockPool"
    for scenario in ("chunked_prefill", "prefix_caching"):
        assert contiguous[scenario] == fixed[scenario]
    assert contiguous["tables"]["plain_ranges"] == contiguous["tables"]["all"] > 100
    assert contiguous["memory"]["is_rss_of_live_blocks"]
