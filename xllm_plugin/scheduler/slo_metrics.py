"""What is counted under the policy `slo`, and the snapshot's section that carries it."""

from __future__ import annotations

import bisect
from collections import Counter
from typing import Final

import msgspec

from xllm_plugin.scheduler.plan import Bound, Plan
from xllm_plugin.scheduler.promise import Promise, ServiceClass

__all__ = [
    "OTHER_TENANTS",
    "PREDICTOR_SECTION",
    "SLACK_EDGES_MS",
    "SLO_SECTION",
    "Attainment",
    "SloMetrics",
    "SloSnapshot",
]

SLO_SECTION: Final = "slo"
PREDICTOR_SECTION: Final = "predictor"
"""Holds a `StepModel`."""

SLACK_EDGES_MS: Final = (
    -1000.0,
    -500.0,
    -200.0,
    -100.0,
    -50.0,
    -20.0,
    0.0,
    20.0,
    50.0,
    100.0,
    200.0,
    500.0,
    1000.0,
)
MAX_TENANTS: Final = 64
OTHER_TENANTS: Final = "other"
"""Tenants beyond the first 64 share one label: a metric's labels must stay bounded."""


class Attainment(msgspec.Struct, frozen=True, kw_only=True):
    """Finished requests of one class and tenant; aborted ones do not count.

    Attributes:
        service_class: online or offline.
        tenant: of the requests, or `OTHER_TENANTS`.
        num_finished: all.
        num_kept: within both targets.
        num_ttft_missed: first token too late.
        num_tpot_missed: tokens too slow on average.
    """

    service_class: str
    tenant: str
    num_finished: int
    num_kept: int
    num_ttft_missed: int
    num_tpot_missed: int


class SloSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The section `slo`.  Totals count from the engine's start.

    Attributes:
        attainment: by class and tenant.
        slack_counts: online tokens by how long before they were due they came; one more than
            `SLACK_EDGES_MS`, not cumulative, late ones first.
        slack_sum_ms: of the same.
        model_error: mean relative error of the step-time model, 0 to 1.
        is_model_reliable: False while budgets are cautious.
        predicted_ms: of all steps that were measured, in sum.
        measured_ms: of the same steps.
        num_planned: steps.
        planning_ms: spent on plans, in sum.
        bounds: planned steps by what kept them from being larger.
        num_held: requests held for a step, by class.
        num_preempted: requests that gave up their blocks for more urgent ones, by plan.
        num_late: online requests in the queue whose TTFT can no longer be met, now.
        num_invalid: requests whose promise could not be read and was replaced by the default.
        offline_tokens: tokens computed for offline requests, prompts included.
    """

    attainment: tuple[Attainment, ...] = ()
    slack_counts: tuple[int, ...] = (0,) * (len(SLACK_EDGES_MS) + 1)
    slack_sum_ms: float = 0.0
    model_error: float = 1.0
    is_model_reliable: bool = False
    predicted_ms: float = 0.0
    measured_ms: float = 0.0
    num_planned: int = 0
    planning_ms: float = 0.0
    bounds: dict[str, int] = {}
    num_held: dict[str, int] = {}
    num_preempted: int = 0
    num_late: int = 0
    num_invalid: int = 0
    offline_tokens: int = 0


class SloMetrics:
    """The counters; written by the engine's thread alone."""

    def __init__(self) -> None:
        self.predicted_ms = 0.0
        self.measured_ms = 0.0
        self.num_invalid = 0
        self.offline_tokens = 0
        self._slack_counts = [0] * (len(SLACK_EDGES_MS) + 1)
        self._slack_sum_ms = 0.0
        # Finished, kept, TTFT missed, TPOT missed.
        self._attainment: dict[tuple[str, str], list[int]] = {}
        self._tenants: set[str] = set()
        self._num_planned = 0
        self._planning_ms = 0.0
        self._bounds = Counter[str]({bound.value: 0 for bound in Bound})
        self._num_held = Counter[str]({kind.value: 0 for kind in ServiceClass})
        self._num_preempted = 0
        self._num_late = 0

    def record_plan(self, plan: Plan, held: Counter[str], duration_ms: float) -> None:
        """Count one planned step and the requests that it left out, by class."""
        self._num_planned += 1
        self._planning_ms += duration_ms
        self._bounds[plan.bound.value] += 1
        self._num_held.update(held)
        self._num_preempted += len(plan.preempt)
        self._num_late = plan.num_late

    def record_slack(self, slack_ms: float, num_tokens: int) -> None:
        """Count tokens of an online request that came `slack_ms` before they were due."""
        self._slack_counts[bisect.bisect_left(SLACK_EDGES_MS, slack_ms)] += num_tokens
        self._slack_sum_ms += slack_ms * num_tokens

    def record_finished(self, promise: Promise, ttft_ms: float, tpot_ms: float) -> None:
        """Count a finished request."""
        is_ttft_missed, is_tpot_missed = ttft_ms > promise.ttft_ms, tpot_ms > promise.tpot_ms
        key = (promise.service_class.value, self._label(promise.tenant))
        counts = self._attainment.setdefault(key, [0, 0, 0, 0])
        counts[0] += 1
        counts[1] += not (is_ttft_missed or is_tpot_missed)
        counts[2] += is_ttft_missed
        counts[3] += is_tpot_missed

    def snapshot(self, model_error: float, *, is_model_reliable: bool) -> SloSnapshot:
        """All of it as it is now."""
        return SloSnapshot(
            attainment=tuple(
                Attainment(
                    service_class=service_class,
                    tenant=tenant,
                    num_finished=counts[0],
                    num_kept=counts[1],
                    num_ttft_missed=counts[2],
                    num_tpot_missed=counts[3],
                )
                for (service_class, tenant), counts in self._attainment.items()
            ),
            slack_counts=tuple(self._slack_counts),
            slack_sum_ms=self._slack_sum_ms,
            model_error=model_error,
            is_model_reliable=is_model_reliable,
            predicted_ms=self.predicted_ms,
            measured_ms=self.measured_ms,
            num_planned=self._num_planned,
            planning_ms=self._planning_ms,
            bounds=dict(self._bounds),
            num_held=dict(self._num_held),
            num_preempted=self._num_preempted,
            num_late=self._num_late,
            num_invalid=self.num_invalid,
            offline_tokens=self.offline_tokens,
        )

    def _label(self, tenant: str) -> str:
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) >= MAX_TENANTS:
            return OTHER_TENANTS
        self._tenants.add(tenant)
        return tenant
