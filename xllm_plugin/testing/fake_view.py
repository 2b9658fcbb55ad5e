"""An instance before a routing policy, without a fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xllm_plugin.service.speed import Speed

__all__ = ["FAST", "FakeView"]

FAST: Final = Speed(
    ttft_base_s=0.01, prefill_s_per_token=2e-4, tpot_base_s=0.02, tpot_s_per_request=4e-4
)


@dataclass
class FakeView:
    """An `InstanceView` whose fields are set by hand."""

    name: str
    name_hash: int = 0
    capacity: float = 1.0
    in_flight: int = 0
    offline_requests: int = 0
    outstanding_tokens: int = 0
    foreign_requests: int = 0
    prefill_tokens: float = 0.0
    speed: Speed = FAST
