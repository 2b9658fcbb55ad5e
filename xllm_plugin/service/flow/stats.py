"""What has become of requests that had to wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_plugin.service.histogram import Histogram

__all__ = ["FlowStats"]


@dataclass(slots=True)
class FlowStats:
    """Counters of all that has waited."""

    outcomes: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("sent", "expired", "full", "gone"), 0)
    )
    waits: Histogram = field(default_factory=Histogram)
    """How long those waited that were sent."""

    def add(self, other: FlowStats) -> None:
        """Count what another process has counted."""
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] += count
        self.waits.add(other.waits)
