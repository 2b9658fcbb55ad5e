"""Metric families out of tables: name -> text and value; one sample for each labelled source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["counters", "gauges"]

T = TypeVar("T")
Table = Mapping[str, tuple[str, Callable[[T], float]]]


def gauges(
    table: Table[T], sources: Sequence[tuple[list[str], T]], label_names: Sequence[str]
) -> Iterator[Metric]:
    """A gauge for each entry of `table`.

    Args:
        table: name of a metric -> its text, and its value in a source.
        sources: label values, and what the values are taken from.
        label_names: of those label values.
    """
    return _filled(GaugeMetricFamily, table, sources, label_names)


def counters(
    table: Table[T], sources: Sequence[tuple[list[str], T]], label_names: Sequence[str]
) -> Iterator[Metric]:
    """A counter for each entry, as `gauges`; prometheus_client appends ``_total`` to its name."""
    return _filled(CounterMetricFamily, table, sources, label_names)


def _filled(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    table: Table[T],
    sources: Sequence[tuple[list[str], T]],
    label_names: Sequence[str],
) -> Iterator[Metric]:
    for name, (text, value) in table.items():
        family = kind(name, text, labels=label_names)
        for labels, source in sources:
            family.add_metric(labels, value(source))
        yield family
