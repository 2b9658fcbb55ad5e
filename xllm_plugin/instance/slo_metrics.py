"""The metrics of the policy `slo`, from the snapshot's section of that name; empty without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric

from xllm_plugin.channel.messages import Snapshot
from xllm_plugin.instance.families import counters, gauges
from xllm_plugin.scheduler.slo_metrics import SLACK_EDGES_MS, SLO_SECTION, Attainment, SloSnapshot

__all__ = ["slo_families"]

Labelled = Sequence[tuple[list[str], SloSnapshot]]

_GAUGES: dict[str, tuple[str, Callable[[SloSnapshot], float]]] = {
    "xllm:step_model_error_ratio": (
        "Mean relative error of the step-time model, 0 to 1.",
        lambda slo: slo.model_error,
    ),
    "xllm:step_model_reliable": (
        "1 if plans follow the step-time model, 0 while budgets are cautious.",
        lambda slo: float(slo.is_model_reliable),
    ),
    "xllm:num_requests_late": (
        "Online requests that wait and can no longer meet their TTFT.",
        lambda slo: slo.num_late,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[SloSnapshot], float]]] = {
    "xllm:steps_predicted_seconds": (
        "Predicted duration of all measured steps.",
        lambda slo: slo.predicted_ms / 1000,
    ),
    "xllm:steps_measured_seconds": (
        "Measured duration of the same steps.",
        lambda slo: slo.measured_ms / 1000,
    ),
    "xllm:plans": ("Steps that were planned.", lambda slo: slo.num_planned),
    "xllm:planning_seconds": ("Time spent on plans.", lambda slo: slo.planning_ms / 1000),
    "xllm:planned_preemptions": (
        "Requests that gave up their KV blocks for more urgent ones, by plan.",
        lambda slo: slo.num_preempted,
    ),
    "xllm:promises_invalid": (
        "Requests whose promise could not be read and was replaced by the default.",
        lambda slo: slo.num_invalid,
    ),
    "xllm:offline_tokens": (
        "Tokens computed for offline requests, prompts included.",
        lambda slo: slo.offline_tokens,
    ),
}
_ATTAINMENT: dict[str, tuple[str, Callable[[Attainment], float]]] = {
    "xllm:slo_requests_finished": ("Requests that have finished.", lambda a: a.num_finished),
    "xllm:slo_requests_kept": ("Of these, within both targets.", lambda a: a.num_kept),
    "xllm:slo_ttft_missed": ("Of these, with a late first token.", lambda a: a.num_ttft_missed),
    "xllm:slo_tpot_missed": ("Of these, too slow a token.", lambda a: a.num_tpot_missed),
}


def slo_families(
    known: Iterable[tuple[list[str], Snapshot]], label_names: Sequence[str]
) -> Iterator[Metric]:
    """The families for engines with `label_names`' values and their snapshots."""
    planned = [
        (labels, slo)
        for labels, snapshot in known
        if (slo := snapshot.section(SLO_SECTION, SloSnapshot)) is not None
    ]
    yield from gauges(_GAUGES, planned, label_names)
    yield from counters(_COUNTERS, planned, label_names)
    yield from _by_class_and_tenant(planned, label_names)
    yield _by(planned, label_names, "xllm:plan_bounds", "bound", lambda slo: slo.bounds)
    yield _by(planned, label_names, "xllm:requests_held", "service_class", lambda slo: slo.num_held)
    yield _slack(planned, label_names)


def _by_class_and_tenant(planned: Labelled, label_names: Sequence[str]) -> Iterator[Metric]:
    groups = [
        ([*labels, group.service_class, group.tenant], group)
        for labels, slo in planned
        for group in slo.attainment
    ]
    return counters(_ATTAINMENT, groups, (*label_names, "service_class", "tenant"))


_TEXTS = {
    "xllm:plan_bounds": "Planned steps by what kept them from being larger.",
    "xllm:requests_held": "Requests left out of a step with their KV blocks kept, by class.",
}


def _by(
    planned: Labelled,
    label_names: Sequence[str],
    name: str,
    label: str,
    counts: Callable[[SloSnapshot], dict[str, int]],
) -> Metric:
    counter = CounterMetricFamily(name, _TEXTS[name], labels=(*label_names, label))
    for labels, slo in planned:
        for key, count in counts(slo).items():
            counter.add_metric([*labels, key], count)
    return counter


def _slack(planned: Labelled, label_names: Sequence[str]) -> Metric:
    histogram = HistogramMetricFamily(
        "xllm:slack_seconds",
        "How long before they were due online tokens came; late ones are below 0.",
        labels=label_names,
    )
    edges = [*(str(edge_ms / 1000) for edge_ms in SLACK_EDGES_MS), "+Inf"]
    for labels, slo in planned:
        buckets = list(zip(edges, accumulate(slo.slack_counts), strict=True))
        histogram.add_metric(labels, buckets, slo.slack_sum_ms / 1000)
    return histogram
