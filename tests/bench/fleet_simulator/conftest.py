"""Instances whose times can be reckoned in the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xllm_plugin.bench.fleet_simulator.profile import StepProfile

MakeProfile = Callable[..., StepProfile]


@pytest.fixture(scope="session")
def make_profile() -> MakeProfile:
    """1 ms a prompt token and 10 ms a step, unless told otherwise."""

    def make(**fields: Any) -> StepProfile:
        known: dict[str, Any] = {
            "name": "test",
            "what": "",
            "source": "",
            "licence": "",
            "changed": "",
            "kv_tokens_from": "",
            "kv_tokens": 10_000,
            "max_step_tokens": 1000,
            "max_requests": 100,
            "base_ms": 10.0,
            "ms_per_prompt_token": 1.0,
            "ms_per_pair": 0.0,
            "ms_per_decode": 0.0,
            "ms_per_context_token": 0.0,
        }
        return StepProfile(**known | fields)

    return make
