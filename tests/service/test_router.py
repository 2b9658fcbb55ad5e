"""What the router makes of a request for its policy."""

from __future__ import annotations

import pytest

from xllm_plugin.service.flow.wishes import NO_WISHES, read_wishes
from xllm_plugin.service.policy import Slo
from xllm_plugin.service.router import Router
from xllm_plugin.testing.fake_exchange import FakeExchange

pytestmark = pytest.mark.looks_inside

NEVER = float("inf")


def slo_of(request: FakeExchange) -> Slo | None:
    return Router._asked(request).slo  # type: ignore[arg-type]


def asking(**headers: str) -> FakeExchange:
    """At second 0."""
    request = FakeExchange("m", b"", draw=0)
    request.wishes = read_wishes(headers, None, None)
    return request


def test_who_names_no_promise_has_none() -> None:
    request = asking()
    assert request.wishes is NO_WISHES
    assert slo_of(request) is None


def test_time_to_the_first_token_runs_from_the_arrival() -> None:
    """Before another attempt, or out of the queue, less of it is left; in the end below 0."""
    request = asking(xllm_ttft_ms="500", xllm_tpot_ms="20")
    for waited_s, left_s in ((0.0, 0.5), (0.2, 0.3), (0.8, -0.3)):
        request.started_s = -waited_s
        assert slo_of(request) == (pytest.approx(left_s), 0.02, False)


def test_a_stream_that_goes_on_elsewhere_has_had_its_first_token() -> None:
    request = asking(xllm_ttft_ms="500", xllm_tpot_ms="20")
    request.ttft_s = 0.1
    assert slo_of(request) == (NEVER, 0.02, False)


def test_offline_work_stays_offline() -> None:
    request = asking(xllm_class="offline", xllm_ttft_ms="500")
    request.started_s = -9.0
    assert slo_of(request) == Slo(is_offline=True)
