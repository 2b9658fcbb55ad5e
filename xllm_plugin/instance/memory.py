"""The elastic KV cache as a server shows it: the body of `GET /xllm/memory`, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from prometheus_client.metrics_core import GaugeMetricFamily, Metric, SummaryMetricFamily

from xllm_plugin.channel.messages import Reading, Snapshot
from xllm_plugin.instance.families import counters, gauges
from xllm_plugin.xtensor.messages import MEMORY_SECTION, MemoryReport, MemorySection, PoolSection

__all__ = ["MemoryReading", "memory_families", "memory_readings"]

_GAUGES: dict[str, tuple[str, Callable[[MemorySection], float]]] = {
    "xllm:kv_memory_budget_bytes": (
        "Memory that the elastic KV cache may take.",
        lambda section: section.budget_bytes,
    ),
    "xllm:kv_memory_resident_bytes": (
        "Memory behind KV blocks that are used, cached or ready to be.",
        lambda section: section.resident_bytes,
    ),
    "xllm:kv_memory_draining_bytes": (
        "The part of it that is beyond the budget and goes when requests end.",
        lambda section: section.num_draining_slabs * section.slab_bytes,
    ),
    "xllm:kv_memory_fragmentation_ratio": (
        "Share of the resident memory that is neither used nor cached, 0 to 1.",
        lambda section: section.fragmentation,
    ),
}
_POOL_GAUGES: dict[str, tuple[str, Callable[[PoolSection], float]]] = {
    "xllm:kv_memory_pool_bytes": (
        "Memory that all members of the machine's pool together may take.",
        lambda pool: pool.total_bytes,
    ),
    "xllm:kv_memory_pool_free_bytes": (
        "The part of it that no member has leased.",
        lambda pool: pool.free_bytes,
    ),
    "xllm:kv_memory_pool_leased_bytes": (
        "The part of it that this engine has leased.",
        lambda pool: pool.leased_bytes,
    ),
    "xllm:kv_memory_pool_unmet_bytes": (
        "What members of the pool wait for.",
        lambda pool: pool.unmet_bytes,
    ),
    "xllm:kv_memory_pool_members": (
        "Engines in the pool.",
        lambda pool: len(pool.members),
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[MemoryReport], float]]] = {
    "xllm:kv_memory_pages_created": (
        "Pages taken from the system.",
        lambda pages: pages.num_created,
    ),
    "xllm:kv_memory_pages_released": (
        "Pages given back to the system.",
        lambda pages: pages.num_released,
    ),
    "xllm:kv_memory_pages_mapped": ("Pages mapped.", lambda pages: pages.num_maps),
    "xllm:kv_memory_pages_unmapped": ("Pages unmapped.", lambda pages: pages.num_unmaps),
    "xllm:kv_memory_pages_reused": (
        "Pages taken that were still mapped.",
        lambda pages: pages.num_reused,
    ),
    "xllm:kv_memory_pages_premapped": (
        "Pages mapped before they were asked for.",
        lambda pages: pages.num_premapped,
    ),
    "xllm:kv_memory_premap_failures": (
        "Times that the device refused to map pages ahead.",
        lambda pages: pages.num_premap_failures,
    ),
}
_SUMMARIES: dict[str, tuple[str, Callable[[MemoryReport], tuple[int, float]]]] = {
    "xllm:kv_memory_commit_seconds": (
        "Time a step waited for memory, mapped anew or still mapped.",
        lambda pages: (pages.num_commits, pages.commit_s),
    ),
    "xllm:kv_memory_release_seconds": (
        "Time a step took to give memory up, which is unmapped later.",
        lambda pages: (pages.num_releases, pages.release_s),
    ),
    "xllm:kv_memory_map_seconds": (
        "Time the device took to map a batch of pages, whoever waited for it.",
        lambda pages: (pages.num_map_calls, pages.map_s),
    ),
    "xllm:kv_memory_unmap_seconds": (
        "Time the device took to unmap a batch of pages, mostly beside the steps.",
        lambda pages: (pages.num_unmap_calls, pages.unmap_s),
    ),
}


class MemoryReading(msgspec.Struct, frozen=True, kw_only=True):
    """One engine in the body of `GET /xllm/memory`.

    Attributes:
        dp_rank: of the engine.
        is_elastic: whether its KV cache takes and gives memory (`xtensor.enabled`).
        budget_bytes: that it may take.
        resident_bytes: behind blocks that are used, cached or ready to be.
        fragmentation: share of that which is neither used nor cached.
        pool_free_bytes: that no member of the machine's pool has leased; None without a pool.
        memory: the snapshot's section.
        error: why there is nothing to tell.
    """

    dp_rank: int
    is_elastic: bool = False
    budget_bytes: int | None = None
    resident_bytes: int | None = None
    fragmentation: float | None = None
    pool_free_bytes: int | None = None
    memory: MemorySection | None = None
    error: str | None = None


def memory_readings(readings: Iterable[Reading]) -> tuple[MemoryReading, ...]:
    """What each engine said about its memory."""
    return tuple(map(_memory_reading, readings))


def _memory_reading(reading: Reading) -> MemoryReading:
    section = _section(reading.snapshot)
    if section is None:
        return MemoryReading(dp_rank=reading.dp_rank, error=reading.error)
    return MemoryReading(
        dp_rank=reading.dp_rank,
        is_elastic=True,
        budget_bytes=section.budget_bytes,
        resident_bytes=section.resident_bytes,
        fragmentation=section.fragmentation,
        pool_free_bytes=None if section.pool is None else section.pool.free_bytes,
        memory=section,
        error=reading.error,
    )


def _section(snapshot: Snapshot | None) -> MemorySection | None:
    return None if snapshot is None else snapshot.section(MEMORY_SECTION, MemorySection)


def memory_families(
    known: Sequence[tuple[list[str], Snapshot]], label_names: Sequence[str]
) -> Iterator[Metric]:
    """Metric families of engines whose KV cache is elastic; without samples where none is.

    Args:
        known: label values and snapshot of each engine.
        label_names: of those values.
    """
    sections = [(labels, section) for labels, snap in known if (section := _section(snap))]
    pages = [(labels, section.pages) for labels, section in sections if section.pages]
    pools = [(labels, section.pool) for labels, section in sections if section.pool]
    yield from gauges(_GAUGES, sections, label_names)
    yield from gauges(_POOL_GAUGES, pools, label_names)
    yield _pages_by_state(pages, label_names)
    yield from counters(_COUNTERS, pages, label_names)
    for name, (text, measured) in _SUMMARIES.items():
        summary = SummaryMetricFamily(name, text, labels=label_names)
        for labels, report in pages:
            summary.add_metric(labels, *measured(report))
        yield summary


def _pages_by_state(pages: list[tuple[list[str], Any]], label_names: Sequence[str]) -> Metric:
    family = GaugeMetricFamily(
        "xllm:kv_memory_pages", "Pages of the KV cache, by state.", labels=[*label_names, "state"]
    )
    for labels, report in pages:
        for state in ("free", "allocated", "mapped", "retired", "reusable"):
            family.add_metric([*labels, state], getattr(report, f"num_{state}"))
    return family
