"""Admission: each rule alone, and that no tenant can keep another one out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.instance.admission import Outcome, Verdict, decide
from xllm_plugin.instance.config import AdmissionConfig
from xllm_plugin.instance.forecast import Forecast
from xllm_plugin.instance.waiting import QueueView, WaitingList, WaitingRequest
from xllm_plugin.scheduler.predictor import StepModel, StepShape, Work
from xllm_plugin.scheduler.promise import Promise, ServiceClass

ONLINE = Promise(ttft_ms=1000)
OFFLINE = Promise(ttft_ms=1000, service_class=ServiceClass.OFFLINE)


def make_forecast() -> Forecast:
    """An engine that takes one millisecond for each token of a prompt."""
    work = Work(weight_ms=1, token_ms=1, kv_token_ms=0, pair_ms=0, overhead_ms=0)
    factors = (0.0,) * 6 + (1.0, 0.0)
    model = StepModel(work=work, factors=factors, error=0.0, num_samples=100)
    return Forecast(model, StepShape(), chunk_tokens=100)


def ask(
    num_tokens: int = 10,
    queue: QueueView | None = None,
    promise: Promise = ONLINE,
    forecast: Forecast | None = None,
    **settings: object,
) -> Verdict:
    config = AdmissionConfig.model_validate(settings)
    return decide(promise, num_tokens, queue or QueueView(), forecast, config)


def test_by_default_all_are_admitted() -> None:
    queue = QueueView(num_requests=10**6, num_tokens=10**9, ahead_tokens=10**9)
    assert ask(10**6, queue) == Verdict(Outcome.ADMITTED)
    assert ask(10**6, queue, forecast=make_forecast()).outcome is Outcome.AT_RISK
    assert ask(10**6, queue, OFFLINE, make_forecast()) == Verdict(Outcome.ADMITTED)


def test_a_full_queue_of_its_class_refuses() -> None:
    queue = QueueView(num_requests=4, num_tokens=4000)
    verdict = ask(10, queue, online={"max_requests": 4})
    assert verdict.outcome is Outcome.QUEUE_FULL
    assert "4 requests of class online wait" in verdict.message
    assert "admission.online.max_requests" in verdict.message
    assert verdict.retry_after_s == 1
    assert ask(10, queue, OFFLINE, online={"max_requests": 4}).outcome is Outcome.ADMITTED
    late = ask(10, queue, OFFLINE, make_forecast(), offline={"max_tokens": 4005})
    assert late.outcome is Outcome.QUEUE_FULL
    assert late.retry_after_s == 4  # 4,000 tokens at 1 ms each


def test_one_request_over_the_bound_passes_an_empty_queue() -> None:
    assert ask(500, online={"max_tokens": 100}).outcome is Outcome.ADMITTED


def test_what_is_at_risk_is_admitted_or_refused_as_configured() -> None:
    queue = QueueView(num_tokens=2500, ahead_tokens=2500)
    risky = ask(100, queue, forecast=make_forecast())
    assert (risky.outcome, risky.ttft_ms) == (Outcome.AT_RISK, 2600)
    assert risky.outcome.is_admitted
    refused = ask(100, queue, forecast=make_forecast(), at_risk="refuse")
    assert (refused.outcome, refused.ttft_ms) == (Outcome.TTFT, 2600)
    assert refused.retry_after_s == 2  # in 1.6 s enough of the queue is gone
    assert "2600 ms are expected" in refused.message


def test_a_request_that_is_late_even_alone_is_told_so() -> None:
    verdict = ask(1500, forecast=make_forecast(), at_risk="refuse")
    assert verdict.outcome is Outcome.TTFT_ALONE
    assert "a prompt of 1500 tokens takes about 1500 ms here even alone" in verdict.message
    assert verdict.retry_after_s == 60


def test_without_a_forecast_nothing_is_at_risk() -> None:
    assert ask(10**6, at_risk="refuse").outcome is Outcome.ADMITTED


def test_offline_requests_promise_no_time() -> None:
    queue = QueueView(ahead_tokens=10**6)
    assert ask(10, queue, OFFLINE, make_forecast(), at_risk="refuse").outcome is Outcome.ADMITTED


def test_a_tenant_over_its_share_of_the_queue_is_refused() -> None:
    queue = QueueView(num_tokens=45, tenant_tokens=45, tenant_share=0.5)
    verdict = ask(10, queue, Promise(tenant="a"), online={"max_tokens": 100})
    assert verdict.outcome is Outcome.TENANT_SHARE
    assert "Tenant 'a' has its share of the queue" in verdict.message
    assert ask(5, queue, online={"max_tokens": 100}).outcome is Outcome.ADMITTED
    nothing = QueueView(num_tokens=10, tenant_tokens=0, tenant_share=0.5)
    assert ask(90, nothing, online={"max_tokens": 100}).outcome is Outcome.ADMITTED


def test_a_tenant_over_its_share_of_the_promised_time_is_refused() -> None:
    """1,000 ms promised, 100 of them its own prompt: half of 900 are the tenant's."""
    queue = QueueView(num_tokens=451, tenant_tokens=451, tenant_share=0.5, ahead_tokens=451)
    verdict = ask(100, queue, forecast=make_forecast(), at_risk="refuse")
    assert verdict.outcome is Outcome.TENANT_SHARE
    assert ask(100, queue, forecast=make_forecast()).outcome is Outcome.ADMITTED
    within = QueueView(num_tokens=440, tenant_tokens=440, tenant_share=0.5, ahead_tokens=440)
    assert ask(100, within, forecast=make_forecast(), at_risk="refuse").outcome.is_admitted


class Server:
    """A queue that is served in order of arrival, one millisecond a token."""

    def __init__(self, config: AdmissionConfig) -> None:
        self.config = config
        self.waiting = WaitingList(config.tenant_weights, by_deadline=False)
        self.order: list[WaitingRequest] = []
        self.now_ms = 0.0
        self.busy_until_ms = 0.0

    def ask(self, tenant: str, num_tokens: int) -> Outcome:
        promise = Promise(tenant=tenant)
        now_s = self.now_ms / 1000
        queue = self.waiting.look(promise, now_s)
        outcome = decide(promise, num_tokens, queue, make_forecast(), self.config).outcome
        if outcome.is_admitted:
            self.order.append(self.waiting.add("r", promise, num_tokens, now_s))
        return outcome

    def advance(self, elapsed_ms: float) -> None:
        self.now_ms += elapsed_ms
        while self.order and self.busy_until_ms <= self.now_ms:
            request = self.order.pop(0)
            self.waiting.discard(request)
            self.busy_until_ms = max(self.busy_until_ms, self.now_ms - elapsed_ms)
            self.busy_until_ms += request.num_tokens


BOUND_TOKENS = 1000
CONFIGS = {
    "bounded queue": AdmissionConfig.model_validate(
        {"online": {"max_tokens": BOUND_TOKENS}, "tenant_weights": {"a": 1, "b": 1}}
    ),
    "promised time": AdmissionConfig.model_validate(
        {"at_risk": "refuse", "tenant_weights": {"a": 1, "b": 1}}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@settings(deadline=None, max_examples=50)
@given(
    greedy_tokens=st.lists(st.integers(1, 200), min_size=1, max_size=20),
    modest_tokens=st.integers(1, 100),
    tries=st.integers(1, 10),
)
def test_a_greedy_tenant_does_not_keep_a_modest_one_out(
    name: str, greedy_tokens: list[int], modest_tokens: int, tries: int
) -> None:
    """Once the modest tenant is known and the old queue is served, none of its requests is refused.

    It asks for up to a third of the engine; the other asks for more than all of it, several times
    between any two of its requests.
    """
    server = Server(CONFIGS[name])
    for step in range(60):
        for _ in range(tries):
            server.ask("a", greedy_tokens[step % len(greedy_tokens)])
        outcome = server.ask("b", modest_tokens)
        if server.now_ms > 2 * BOUND_TOKENS:
            assert outcome.is_admitted
        server.advance(max(200, 3 * modest_tokens))


@settings(deadline=None, max_examples=20)
@given(weight=st.sampled_from([1.0, 2.0, 4.0]), num_tokens=st.integers(10, 40))
def test_tenants_that_always_ask_fill_their_shares(weight: float, num_tokens: int) -> None:
    """Also after one of them had the whole queue for itself."""
    config = AdmissionConfig.model_validate(
        {"online": {"max_tokens": BOUND_TOKENS}, "tenant_weights": {"a": weight, "b": 1}}
    )
    server = Server(config)
    for _ in range(2 * BOUND_TOKENS // num_tokens):
        ask_all_that_fits(server, num_tokens)
    ask_all_that_fits(server, num_tokens, advance=False)
    for tenant, share in (("a", weight / (weight + 1)), ("b", 1 / (weight + 1))):
        found = server.waiting.look(Promise(tenant=tenant), server.now_ms / 1000)
        assert found.tenant_share == pytest.approx(share)
        assert 0 <= share * BOUND_TOKENS - found.tenant_tokens < num_tokens


def ask_all_that_fits(server: Server, num_tokens: int, *, advance: bool = True) -> None:
    for tenant in ("a", "b"):
        while server.ask(tenant, num_tokens).is_admitted:
            pass
    if advance:
        server.advance(num_tokens)


def test_inventing_names_wins_nothing() -> None:
    server = Server(CONFIGS["bounded queue"])
    for step in range(300):
        server.ask(f"invented-{step}", 10)
    assert server.waiting.look(Promise(tenant="a"), 0.0).num_tokens == BOUND_TOKENS
    server.ask("a", 10)
    server.advance(600)
    assert server.ask("a", 10).is_admitted
    assert server.ask("one-more-name", 200) is Outcome.TENANT_SHARE
