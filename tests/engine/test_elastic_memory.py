"""An elastic KV cache answers what a fixed one answers, and takes the memory of what it keeps."""

from __future__ import annotations

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


def test_resident_memory_is_that_of_live_blocks(elastic: dict[str, Any]) -> None:
    """The null block's slab stays."""
    memory = elastic["memory"]
    assert memory["is_rss_of_live_blocks"]
    assert memory["most_bytes"] > 8 * memory["slab_bytes"]
    assert memory["idle_bytes"] == memory["after_bytes"] == memory["slab_bytes"]
    assert memory["num_resident_slabs"] == 1


@pytest.fixture(scope="module")
def contiguous(drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return drive(
        "elastic_driver",
        XLLM_XTENSOR__ENABLED="1",
        XLLM_XTENSOR__FORM="contiguous",
        XLLM_XTENSOR__SLAB_BLOCKS="2",
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_contiguous_requests_are_answered_the_same(
    fixed: dict[str, Any], contiguous: dict[str, Any], scenario: str
) -> None:
    found, expected = contiguous[scenario], fixed[scenario]
    if scenario == "prefix_caching":  # whole slabs alone are shared
        assert all(0 < a <= b for a, b in zip(found["cached"], expected["cached"], strict=True))
        found, expected = found["tokens"], expected["tokens"]
    assert found == expected


def test_contiguous_requests_have_plain_ranges_as_block_tables(
    elastic: dict[str, Any], contiguous: dict[str, Any]
) -> None:
    assert contiguous["pool"] == "ContiguousBlockPool"
    assert contiguous["memory"]["preemptions"] > 0
    assert contiguous["tables"]["plain_ranges"] == contiguous["tables"]["all"] > 100
    assert elastic["tables"]["plain_ranges"] < elastic["tables"]["all"], "the test can tell"


def test_contiguous_requests_share_the_memory_of_prefixes(contiguous: dict[str, Any]) -> None:
    memory = contiguous["memory"]
    assert memory["num_aliases"] > 0
    assert memory["is_rss_of_live_blocks"]
    assert memory["idle_bytes"] == memory["after_bytes"] == memory["slab_bytes"]


LATENT = ("elastic_driver", "bfloat16", "16")


@pytest.mark.full
def test_latent_attention_answers_the_same_from_blocks_that_are_no_whole_pages(
    drive: Callable[..., dict[str, Any]],
) -> None:
    """Experts have no float32 on a CPU: only what forms the same batches has to be equal.

    vLLM caches no prefixes of such models there.
    """
    fixed = drive(*LATENT, model="tiny-deepseek-v3")
    elastic = drive(*LATENT, model="tiny-deepseek-v3", XLLM_XTENSOR__ENABLED="1")
    assert elastic["pool"] == "ElasticBlockPool"
    for scenario in ("chunked_prefill", "prefix_caching"):
        assert elastic[scenario] == fixed[scenario]
    assert elastic["memory"]["preemptions"] > 0
    assert elastic["memory"]["is_rss_of_live_blocks"]
    assert elastic["memory"]["after_bytes"] == elastic["memory"]["slab_bytes"]


@pytest.mark.full
def test_contiguous_requests_of_native_layers_are_answered_the_same_ahead_and_after_sleep(
    drive: Callable[..., dict[str, Any]],
) -> None:
    found = drive("contiguous_driver")
    fixed, contiguous = found["fixed"], found["contiguous"]
    assert (fixed["pool"], contiguous["pool"]) == ("BlockPool", "ContiguousBlockPool")
    assert len({tuple(tokens) for tokens in fixed["answers"]}) > 3
    assert contiguous["answers"] == fixed["answers"]
    assert contiguous["after_sleep"] == contiguous["answers"]


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
