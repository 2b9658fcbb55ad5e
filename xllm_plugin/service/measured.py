"""What a process has measured of requests, as it says to another one (`processes/messages.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from xllm_plugin.service.histogram import Histogram

__all__ = ["Measured", "Outcome"]


class Outcome(StrEnum):
    """What became of a stream's promise."""

    KEPT = "kept"
    TTFT_MISSED = "ttft_missed"
    """The first token was late, whatever came then."""
    TPOT_MISSED = "tpot_missed"
    """Only the tokens after it were too slow."""
    FAILED = "failed"
    """Broken, or refused because the service or its instances could not take it."""


@dataclass(slots=True)
class Measured:
    """What the requests of another process have shown since it last said so."""

    num_requests: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=dict)
    ttft: Histogram = field(default_factory=Histogram)
    tpot: Histogram = field(default_factory=Histogram)
