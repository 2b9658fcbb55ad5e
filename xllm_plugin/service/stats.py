"""Counters of one instance, as they are shown and as processes tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from xllm_plugin.service.histogram import Histogram

__all__ = ["Stats", "add_counts"]

K = TypeVar("K")


def add_counts(counts: dict[K, int], more: Mapping[K, int]) -> None:
    """Add counters by key."""
    for key, count in more.items():
        counts[key] = counts.get(key, 0) + count


@dataclass(slots=True)
class Stats:
    """Counters of one instance, over all its incarnations."""

    answered: dict[int, int] = field(default_factory=dict)
    """By status."""
    errors: dict[str, int] = field(default_factory=dict)
    """Attempts that ended without a whole answer, by reason."""
    retries: int = 0
    """Attempts that failed here and went on elsewhere."""
    resumes: int = 0
    """Streams that broke here and were to go on elsewhere."""
    hedges: dict[str, int] = field(default_factory=dict)
    """Requests sent here as another instance was silent, by what became of that."""
    bytes_to: int = 0
    bytes_from: int = 0
    output_tokens: int = 0
    ttft: Histogram = field(default_factory=Histogram)
    """Of streams: from a whole request to the first bytes of its answer's body."""
    tpot: Histogram = field(default_factory=Histogram)
    """Of streams whose tokens are known: mean time of a token after the first."""
    duration: Histogram = field(default_factory=Histogram)
    """Of complete answers: from a whole request to their end."""

    def count_error(self, reason: str) -> None:
        """Count one attempt that failed."""
        self.errors[reason] = self.errors.get(reason, 0) + 1

    def count_hedge(self, outcome: str) -> None:
        """Count one hedge that has ended: `won` or `lost`."""
        self.hedges[outcome] = self.hedges.get(outcome, 0) + 1

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        times = (self.ttft, self.tpot, self.duration)
        counts = (self.retries, self.resumes, self.bytes_to, self.bytes_from, self.output_tokens)
        by_kind = (self.answered, self.errors, self.hedges)
        return not (any(by_kind) or any(counts) or any(one.sum_s for one in times))

    def take(self) -> Stats:
        """What was counted so far; this object, which several may hold, begins anew."""
        taken, fresh = replace(self), Stats()
        for one in fields(Stats):
            setattr(self, one.name, getattr(fresh, one.name))
        return taken

    def add(self, other: Stats) -> None:
        """Count what another process has counted."""
        add_counts(self.answered, other.answered)
        add_counts(self.errors, other.errors)
        add_counts(self.hedges, other.hedges)
        self.retries += other.retries
        self.resumes += other.resumes
        self.bytes_to += other.bytes_to
        self.bytes_from += other.bytes_from
        self.output_tokens += other.output_tokens
        self.ttft.add(other.ttft)
        self.tpot.add(other.tpot)
        self.duration.add(other.duration)
