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
    """The null block's slab stays; a slab here is one block."""
    memory = elastic["memory"]
    assert memory["is_rss_of_live_blocks"]
    assert memory["most_bytes"] > 8 * memory["block_bytes"]
    assert memory["idle_bytes"] == memory["after_bytes"] == memory["block_bytes"]
    assert memory["num_resident_slabs"] == 1
