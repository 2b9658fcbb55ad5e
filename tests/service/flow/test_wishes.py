"""Promises: read here as an instance reads them."""

from __future__ import annotations

import pytest

from xllm_plugin.scheduler.promise import Promise, ServiceClass
from xllm_plugin.service.flow.wishes import (
    HEADERS,
    NO_WISHES,
    for_tenant,
    read_wishes,
    with_ttft_left,
)
from xllm_plugin.service.policy import Slo
from xllm_plugin.service.replies import Refusal


def test_the_headers_are_those_of_an_instance() -> None:
    promises = pytest.importorskip("xllm_plugin.instance.promises")
    assert {name.decode(): key for name, key in HEADERS.items()} == promises.HEADERS


def test_nothing_said_is_nothing_promised() -> None:
    assert read_wishes({}, None, None) is NO_WISHES
    assert read_wishes({}, "no dict", True) is NO_WISHES
    assert (NO_WISHES.max_wait_s, NO_WISHES.slo) == (float("inf"), None)


def test_the_body_wins_over_headers_and_both_over_the_field_of_vllm() -> None:
    wishes = read_wishes(
        {"xllm_tenant": "header", "xllm_class": "offline"}, {"xllm_tenant": "body"}, -3
    )
    assert wishes.promise == Promise(tenant="body", service_class=ServiceClass.OFFLINE, priority=-3)
    assert wishes.has_tenant
    assert read_wishes({"xllm_priority": "2"}, None, -3).promise.priority == 2


def test_only_a_promise_that_was_asked_for_bounds_the_wait() -> None:
    assert read_wishes({"xllm_tpot_ms": "5"}, None, None).max_wait_s == float("inf")
    assert read_wishes({"xllm_ttft_ms": "250"}, None, None).max_wait_s == 0.25
    offline = {"xllm_ttft_ms": "250", "xllm_class": "offline"}
    assert read_wishes(offline, None, None).max_wait_s == float("inf")


@pytest.mark.parametrize(
    ("headers", "xargs", "slo"),
    [
        ({"xllm_ttft_ms": "250"}, None, Slo(ttft_s=0.25)),
        ({"xllm_ttft_ms": "250"}, {"xllm_tpot_ms": 20}, Slo(0.25, 0.02)),
        ({"xllm_ttft_ms": "250"}, {"xllm_ttft_ms": 500}, Slo(ttft_s=0.5)),
        ({"xllm_class": "online", "xllm_priority": "-1", "xllm_tenant": "t"}, None, None),
        ({"xllm_class": "offline"}, {"xllm_ttft_ms": 250}, Slo(is_offline=True)),
    ],
)
def test_a_policy_weighs_what_the_request_has_named_itself(
    headers: dict[str, str], xargs: dict[str, int] | None, slo: Slo | None
) -> None:
    """No default stands in for what it does not say, and offline targets do not count."""
    wishes = read_wishes(headers, xargs, None)
    assert wishes.slo == slo
    assert for_tenant(wishes, "other").slo == slo


def test_a_wrong_value_is_named_where_it_stood() -> None:
    with pytest.raises(Refusal, match=r"^x-xllm-ttft-ms is 'soon'") as caught:
        read_wishes({"xllm_ttft_ms": "soon"}, None, None)
    assert (caught.value.status, caught.value.param) == (400, "x-xllm-ttft-ms")
    with pytest.raises(Refusal, match=r"^xllm_class is 'never'"):
        read_wishes({"xllm_class": "online"}, {"xllm_class": "never"}, None)


def test_what_has_waited_is_promised_less() -> None:
    head = b"POST /v1/x HTTP/1.1\r\nhost: h\r\nX-Xllm-TTFT-ms: 500\r\nx-other: 1\r\n\r\n"
    assert with_ttft_left(head, 120.7) == head.replace(b"500", b"120")
    assert with_ttft_left(head, -3.0) == head.replace(b"500", b"1"), "an instance takes no 0"
    without = head.replace(b"X-Xllm-TTFT-ms: 500\r\n", b"")
    assert with_ttft_left(without, 120.0) == without
