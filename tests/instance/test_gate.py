"""The gate before the engine, with vLLM's own errors where it is installed."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from xllm_plugin.instance import gate
from xllm_plugin.instance.config import AdmissionConfig
from xllm_plugin.instance.forecast import Forecast
from xllm_plugin.instance.metrics import admission_counter
from xllm_plugin.instance.promises import PromiseMiddleware, RequestContext, current_request
from xllm_plugin.instance.waiting import WaitingList
from xllm_plugin.scheduler.predictor import StepModel, StepShape, Work
from xllm_plugin.scheduler.promise import Promise
from xllm_plugin.worker.resumed import RESUMED_ARG


class FakeEngineClient:
    """Records what reaches the engine; its `generate` is an async generator, as vLLM's."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, str, dict[str, Any]]] = []
        self.output_processor = SimpleNamespace(request_states={}, external_req_ids={})

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        self.calls.append((prompt, sampling_params, request_id, options))
        return self._outputs()

    async def _outputs(self) -> Any:
        yield "output"


class Stand:
    """A gate with its parts at hand, and a clock set by the test."""

    def __init__(
        self, client: FakeEngineClient, forecast: Forecast | None = None, **settings: Any
    ) -> None:
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.waiting = WaitingList({}, by_deadline=False)
        admission = gate.Admission(
            AdmissionConfig.model_validate(settings),
            self.waiting,
            lambda: forecast,
            gate.phases_of(client),
            admission_counter(self.registry),
            clock=lambda: self.now_s,
        )
        gate.install(client, Promise(), admission)

    def count(self, outcome: str) -> float | None:
        labels = {"service_class": "online", "outcome": outcome}
        return self.registry.get_sample_value("xllm:admissions_total", labels)


@pytest.fixture
def engine_client() -> FakeEngineClient:
    client = FakeEngineClient()
    Stand(client)
    return client


def make_params(**extra_args: Any) -> Any:
    return SimpleNamespace(extra_args=extra_args or None)


def call(client: FakeEngineClient, params: Any, **headers: str) -> Any:
    token = current_request.set(RequestContext(promise_args=headers))
    try:
        return client.generate({"prompt_token_ids": [1]}, params, "r", priority=3)
    finally:
        current_request.reset(token)


def test_headers_join_the_sampling_parameters(engine_client: FakeEngineClient) -> None:
    params = make_params()
    outputs = call(engine_client, params, xllm_ttft_ms="500")
    ((prompt, found, request_id, options),) = engine_client.calls
    assert (prompt, request_id, options) == ({"prompt_token_ids": [1]}, "r", {"priority": 3})
    assert found is params
    assert params.extra_args == {"xllm_ttft_ms": "500"}
    assert hasattr(outputs, "__anext__")


def test_the_body_wins_field_by_field(engine_client: FakeEngineClient) -> None:
    params = make_params(xllm_ttft_ms=200, other="kept")
    call(engine_client, params, xllm_ttft_ms="500", xllm_tenant="a")
    assert params.extra_args == {"xllm_ttft_ms": 200, "xllm_tenant": "a", "other": "kept"}


def test_a_request_that_promises_nothing_is_left_as_it_is(
    engine_client: FakeEngineClient,
) -> None:
    params = make_params()
    call(engine_client, params)
    assert params.extra_args is None


def test_a_call_outside_of_a_request_passes(engine_client: FakeEngineClient) -> None:
    """Websockets and vLLM's own warm-up have no HTTP request around them."""
    engine_client.generate("prompt", make_params(xllm_class="offline"), "r")
    assert len(engine_client.calls) == 1


@pytest.mark.engine  # imports vLLM
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("xllm_ttft_ms", -1),
        ("xllm_ttft_ms", float("nan")),
        ("xllm_tpot_ms", [1]),
        ("xllm_class", "batch"),
        ("xllm_tenant", "a" * 65),
        ("xllm_tenat", "a"),
        (RESUMED_ARG, [1, 2]),
    ],
)
def test_a_wrong_body_stops_before_the_engine(
    key: str, value: Any, engine_client: FakeEngineClient
) -> None:
    exceptions = pytest.importorskip("vllm.exceptions")
    with pytest.raises(exceptions.VLLMValidationError, match=key) as caught:
        call(engine_client, make_params(**{key: value}))
    assert caught.value.parameter == f"vllm_xargs.{key}"
    assert engine_client.calls == []


def make_forecast() -> Forecast:
    """An engine that takes one millisecond for each token of a prompt."""
    work = Work(weight_ms=1, token_ms=1, kv_token_ms=0, pair_ms=0, overhead_ms=0)
    factors = (0.0,) * 6 + (1.0, 0.0)
    model = StepModel(work=work, factors=factors, error=0.0, num_samples=100)
    return Forecast(model, StepShape(), chunk_tokens=100)


def serve(client: FakeEngineClient, num_tokens: int, **xargs: Any) -> Callable[..., httpx.Response]:
    """An app with vLLM's error handlers, whose handler hands `num_tokens` to the engine."""
    pytest.importorskip("vllm")
    from fastapi import FastAPI
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    app.add_middleware(PromiseMiddleware)
    init_exception_handler(app)

    @app.post("/ask")
    async def ask() -> list[str]:
        prompt = {"type": "token", "prompt_token_ids": [0] * num_tokens}
        outputs = client.generate(prompt, make_params(**xargs), "r")
        return [output async for output in outputs]

    async def post(**headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post("/ask", headers=named)

    return lambda **headers: asyncio.run(post(**headers))


@pytest.mark.engine  # imports vLLM
def test_what_is_at_risk_is_served_with_a_header() -> None:
    client = FakeEngineClient()
    stand = Stand(client, make_forecast())
    ask = serve(client, 800)
    assert "x-xllm-slo" not in ask().headers
    response = ask(x_xllm_ttft_ms="500")
    assert response.status_code == 200
    assert response.headers["x-xllm-slo"] == "at-risk; predicted-ttft-ms=800"
    assert (stand.count("admitted"), stand.count("at_risk")) == (1, 1)
    assert len(stand.waiting) == 0


@pytest.mark.engine  # imports vLLM
def test_what_is_refused_is_429_with_retry_after() -> None:
    client = FakeEngineClient()
    stand = Stand(client, make_forecast(), at_risk="refuse")
    stand.waiting.add("before", Promise(), 2500, 0.0)
    response = serve(client, 400)()
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.headers["x-xllm-slo"] == "refused; predicted-ttft-ms=2900"
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (429, "Too Many Requests")
    assert "2900 ms are expected" in error["message"]
    assert client.calls == []
    assert stand.count("ttft") == 1


@pytest.mark.engine  # imports vLLM
def test_a_request_that_is_always_late_is_not_to_be_tried_again() -> None:
    client = FakeEngineClient()
    Stand(client, make_forecast(), at_risk="refuse")
    response = serve(client, 1500)()
    assert response.status_code == 429
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["retry-after"] == "60"


def test_later_prompts_of_an_admitted_request_wait_and_are_not_refused() -> None:
    client = FakeEngineClient()
    stand = Stand(client, online={"max_requests": 1})
    context = RequestContext()
    token = current_request.set(context)
    try:
        for number in range(3):
            client.generate({"prompt_token_ids": [1] * 5}, make_params(), f"r-{number}")
    finally:
        current_request.reset(token)
    assert stand.waiting.look(Promise(), 0.0).num_tokens == 15
    for end in context.at_end:
        end()
    assert len(stand.waiting) == 0


@pytest.mark.engine  # imports vLLM
def test_requests_with_their_first_token_make_room() -> None:
    """VLLM's own account is asked, at most every 10 ms."""
    exceptions = pytest.importorskip("vllm.exceptions")
    client = FakeEngineClient()
    stand = Stand(client, online={"max_requests": 1})
    call(client, make_params())
    processor = client.output_processor
    processor.external_req_ids["r"] = ["r-1", "r-2"]
    for name, waits in (("r-1", False), ("r-2", True)):
        processor.request_states[name] = SimpleNamespace(is_prefilling=waits)
    stand.now_s = 0.02
    with pytest.raises(exceptions.GracefulHTTPError, match="The queue is full"):
        call(client, make_params())
    processor.request_states["r-2"].is_prefilling = False
    stand.now_s = 0.04
    call(client, make_params())
    assert len(client.calls) == 2


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [
        ({"type": "token", "prompt_token_ids": [1, 2, 3]}, 3),
        ({"type": "embeds", "prompt_embeds": [[0.0], [0.0]]}, 2),
        ({"type": "enc_dec"}, 0),
        ("text", 0),
    ],
)
def test_a_prompt_is_counted_in_tokens(prompt: Any, num_tokens: int) -> None:
    assert gate.prompt_tokens(prompt) == num_tokens


@pytest.mark.engine  # imports vLLM
def test_a_wrong_promise_is_vllms_own_400() -> None:
    """What the gate raises in a handler becomes an answer that names the field."""
    client = FakeEngineClient()
    Stand(client)
    client.output_processor = None  # not asked before the promise is right
    response = serve(client, 1, xllm_ttft_ms=-1)()
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "vllm_xargs.xllm_ttft_ms"
    assert "accepted is a number of milliseconds over 0" in error["message"]
