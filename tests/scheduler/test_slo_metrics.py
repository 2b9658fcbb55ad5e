"""Counters of the policy slo: bounded labels, a histogram that misses no token."""

from __future__ import annotations

from collections import Counter

import msgspec

from xllm_plugin.scheduler.plan import Bound, Plan
from xllm_plugin.scheduler.promise import Promise, ServiceClass
from xllm_plugin.scheduler.slo_metrics import (
    MAX_TENANTS,
    OTHER_TENANTS,
    SLACK_EDGES_MS,
    SloMetrics,
    SloSnapshot,
)


def seen(metrics: SloMetrics) -> SloSnapshot:
    """As it arrives at the other end."""
    snapshot = metrics.snapshot(0.1, is_model_reliable=True)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=SloSnapshot)


def test_nothing_counted_is_the_default() -> None:
    empty = seen(SloMetrics())
    assert empty.bounds == {bound.value: 0 for bound in Bound}
    assert sum(empty.slack_counts) == 0
    assert empty.attainment == ()


def test_promises_are_kept_or_missed_by_either_target() -> None:
    metrics = SloMetrics()
    promise = Promise(ttft_ms=100, tpot_ms=10, tenant="a")
    for ttft_ms, tpot_ms in ((100, 10), (101, 5), (5, 10.1), (200, 20)):
        metrics.record_finished(promise, ttft_ms, tpot_ms)
    metrics.record_finished(Promise(service_class=ServiceClass.OFFLINE), 9e9, 9e9)
    online, offline = seen(metrics).attainment
    assert (online.service_class, online.tenant) == ("online", "a")
    assert (online.num_finished, online.num_kept) == (4, 1)
    assert (online.num_ttft_missed, online.num_tpot_missed) == (2, 2)
    assert (offline.service_class, offline.tenant) == ("offline", "default")


def test_tenants_beyond_the_bound_share_a_label() -> None:
    metrics = SloMetrics()
    for i in range(MAX_TENANTS + 20):
        metrics.record_finished(Promise(tenant=f"t{i}"), 1, 1)
    metrics.record_finished(Promise(tenant="t0"), 1, 1)
    found = {group.tenant: group.num_finished for group in seen(metrics).attainment}
    assert len(found) == MAX_TENANTS + 1
    assert found[OTHER_TENANTS] == 20
    assert found["t0"] == 2


def test_every_token_falls_into_one_bucket() -> None:
    metrics = SloMetrics()
    for slack_ms in (-1e9, *SLACK_EDGES_MS, 1e9):
        metrics.record_slack(slack_ms, 2)
    found = seen(metrics)
    assert sum(found.slack_counts) == 2 * (len(SLACK_EDGES_MS) + 2)
    assert found.slack_counts[0] == 4, "its edge belongs to it, as Prometheus has it"
    assert found.slack_sum_ms == 2 * sum(SLACK_EDGES_MS)


def test_plans_are_counted_by_what_bound_them() -> None:
    metrics = SloMetrics()
    held = Counter({"online": 1, "offline": 2})
    metrics.record_plan(Plan(bound=Bound.TPOT, num_late=4), held, 0.5)
    metrics.record_plan(Plan(bound=Bound.TPOT, preempt=("a",)), Counter(), 0.25)
    found = seen(metrics)
    assert found.bounds["tpot"] == 2
    assert found.num_held == {"online": 1, "offline": 2}
    assert (found.num_preempted, found.num_planned, found.planning_ms) == (1, 2, 0.75)
    assert found.num_late == 0, "the last plan's"
