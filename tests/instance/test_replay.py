"""What of a request decides whether its stream can be continued here."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.instance.promises import RequestContext, current_request
from xllm_plugin.instance.resumption import Resumption

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module")
def replay() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.instance import replay

    return replay


def make_params(**extra_args: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(extra_args=extra_args or None)


def test_promises_can_be_continued_and_other_extra_arguments_not(replay: Any) -> None:
    assert replay.refusal(make_params()) is None
    assert replay.refusal(make_params(xllm_ttft_ms=5, xllm_class="offline")) is None
    assert replay.refusal(make_params(xllm_ttft_ms=5, other=1)) == "extra arguments"


def test_the_promise_in_the_headers_holds_for_the_continuation(replay: Any) -> None:
    resumption = Resumption(path="/v1/completions", body=b"{}", id="x", created=1, chunks=[])
    engine, params = replay.ReplayingEngine(None, resumption), make_params(xllm_ttft_ms=5)
    token = current_request.set(RequestContext({"xllm_ttft_ms": "900", "xllm_tenant": "a"}))
    try:
        engine.generate({"type": "token"}, params)
    finally:
        current_request.reset(token)
    assert params.extra_args == {"xllm_ttft_ms": 5, "xllm_tenant": "a"}
