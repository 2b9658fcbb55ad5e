"""The gate before the engine, with vLLM's own errors where it is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.instance import gate
from xllm_plugin.instance.promises import RequestContext, current_request
from xllm_plugin.scheduler.promise import Promise


class FakeEngineClient:
    """Records what reaches the engine; its `generate` is an async generator, as vLLM's."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, str, dict[str, Any]]] = []

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        self.calls.append((prompt, sampling_params, request_id, options))
        return self._outputs()

    async def _outputs(self) -> Any:
        yield "output"


@pytest.fixture
def engine_client() -> FakeEngineClient:
    client = FakeEngineClient()
    gate.install(client, Promise())
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("xllm_ttft_ms", -1),
        ("xllm_ttft_ms", float("nan")),
        ("xllm_tpot_ms", [1]),
        ("xllm_class", "batch"),
        ("xllm_tenant", "a" * 65),
        ("xllm_tenat", "a"),
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
