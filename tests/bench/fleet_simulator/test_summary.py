"""Figures count every request, and refuse a run that has lost one."""

from __future__ import annotations

import pytest

from xllm_plugin.bench.fleet_simulator.summary import Promise, Served, quantile, summarise
from xllm_plugin.errors import InternalError


def test_quantiles_are_values_that_were_seen() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0.0, 0.25, 0.5, 0.9, 1.0)] == [1, 1, 2, 4, 4]


def test_a_promise_is_about_both_times() -> None:
    served = [
        Served(0, 0.0, 10, 11, ttft_s=1.0, done_s=2.0, cached_tokens=5),
        Served(1, 0.0, 10, 11, ttft_s=1.0, done_s=9.0),
        Served(2, 0.0, 10, 11, ttft_s=3.0, done_s=3.1),
        Served(3, 1.0, 10, 1, ttft_s=1.0, done_s=2.0),
    ]
    summary = summarise(served, [3.0, 1.0], Promise(ttft_s=1.5, tpot_s=0.5), span_s=4.0)
    assert summary.goodput == 0.5
    assert summary.tpot_p90_s == pytest.approx(0.8)
    assert summary.hit_share == pytest.approx(5 / 40)
    assert summary.imbalance == pytest.approx(1.5)
    assert summary.busy_share == pytest.approx(0.5)


def test_a_lost_request_is_no_figure() -> None:
    with pytest.raises(InternalError, match="number 7"):
        summarise([Served(7, 0.0, 1, 1, ttft_s=1.0)], [1.0], Promise(1, 1), 1.0)
