"""How fast the server was of late, out of vLLM's own histograms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["LatencyMeter"]

_TTFT = "vllm:time_to_first_token_seconds"
_TPOT = "vllm:inter_token_latency_seconds"
_NAMES = tuple(f"{name}_{part}" for name in (_TTFT, _TPOT) for part in ("sum", "count"))


class LatencyMeter:
    """Means since the last reading.

    Args:
        registry: holds vLLM's metrics; None when several API servers share files
            (`vllm/v1/metrics/prometheus.py`).
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self._registry = registry
        self._last: dict[str, float] = {}

    def read(self) -> tuple[float | None, float | None]:
        """Time to first token and time between tokens, in seconds; None where there was none."""
        now, last = self._totals(), self._last
        self._last = now

        def mean(name: str) -> float | None:
            count = now.get(f"{name}_count", 0.0) - last.get(f"{name}_count", 0.0)
            total = now.get(f"{name}_sum", 0.0) - last.get(f"{name}_sum", 0.0)
            return max(0.0, total / count) if count > 0 else None

        return mean(_TTFT), mean(_TPOT)

    def _totals(self) -> dict[str, float]:
        registry = self._registry
        if registry is None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            metrics = registry.collect()
        else:
            metrics = registry.restricted_registry(_NAMES).collect()
        totals: dict[str, float] = {}
        for metric in metrics:
            for sample in metric.samples:
                if sample.name in _NAMES:
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals
