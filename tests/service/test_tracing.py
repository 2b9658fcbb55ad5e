"""A span a request: whose child it is, what the instance gets, what it says at its end."""

from __future__ import annotations

import re
from typing import Any

import pytest

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs xllm-plugin[otel]")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

from xllm_plugin.service.tracing import Tracing, exporting_provider  # noqa: E402
from xllm_plugin.testing.fake_instance import FakeInstance  # noqa: E402
from xllm_plugin.testing.fake_streams import Death, FakeModel, stream_instance  # noqa: E402
from xllm_plugin.testing.service_harness import Harness, request, serving  # noqa: E402

STREAM = b'{"model":"fake","stream":true,"prompt":"hush"}'
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def traced(harness: Harness) -> InMemorySpanExporter:
    """Have `harness` trace into a list."""
    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    harness.proxy.use_tracing(Tracing(provider))
    return exporter


def test_the_instance_continues_the_clients_trace_below_our_span(run: Any) -> None:
    async def check() -> None:
        instance = FakeInstance()
        async with serving(instance) as harness:
            exporter = traced(harness)
            headers = f"traceparent: {PARENT}\r\ntracestate: a=1\r\n".encode()
            await harness.ask(request(b'{"model":"fake"}', headers=headers))
            await harness.settle()
            (span,) = exporter.get_finished_spans()
            assert span.name == "POST /v1/completions"
            assert span.kind is SpanKind.SERVER
            assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
            assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
            head = instance.requests[0].head
            (given,) = re.findall(rb"traceparent: ([^\r]*)", head)
            assert given.decode() == PARENT.replace(
                PARENT.split("-")[2], f"{span.context.span_id:016x}"
            )
            assert head.count(b"tracestate: a=1\r\n") == 1
            assert span.attributes["gen_ai.request.model"] == "fake"
            assert span.attributes["http.response.status_code"] == 200
            assert span.attributes["xllm.instances"] == (f"127.0.0.1:{instance.port}",)

    run(check())


def test_without_tracing_the_clients_header_goes_through_as_it_is(run: Any) -> None:
    async def check() -> None:
        instance = FakeInstance()
        async with serving(instance) as harness:
            headers = f"traceparent: {PARENT}\r\n".encode()
            await harness.ask(request(b'{"model":"fake"}', headers=headers))
            assert instance.requests[0].headers()["traceparent"] == PARENT

    run(check())


def test_a_continued_stream_is_one_span_and_its_text_is_in_none(run: Any) -> None:
    async def check() -> None:
        model = FakeModel([b"a", b"b", b"c"])
        one, two = stream_instance(model, Death(400)), stream_instance(model)
        async with serving(one, two) as harness:
            exporter = traced(harness)
            await harness.ask(request(STREAM))
            await harness.settle()
            (span,) = exporter.get_finished_spans()
            assert len(span.attributes["xllm.instances"]) == 2
            assert span.attributes["xllm.continued"] == 1
            assert span.attributes["gen_ai.usage.output_tokens"] == 3
            sent = [each.requests[0].headers()["traceparent"] for each in (one, two)]
            assert sent[0] == sent[1]
            assert "hush" not in span.to_json()

    run(check())


@pytest.mark.parametrize("parent", ["", "nonsense", PARENT[:-2]])
def test_a_wrong_parent_begins_a_trace_of_its_own(run: Any, parent: str) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            exporter = traced(harness)
            headers = f"traceparent: {parent}\r\n".encode()
            await harness.ask(request(b'{"model":"fake"}', headers=headers))
            (span,) = exporter.get_finished_spans()
            assert span.parent is None

    run(check())


def test_an_error_of_ours_is_an_error_of_the_span(run: Any) -> None:
    async def check() -> None:
        dying = stream_instance(FakeModel([b"a", b"b"]), Death(200), resumes=False)
        async with serving(dying) as harness:
            exporter = traced(harness)
            await harness.ask(request(STREAM))
            await harness.settle()
            (span,) = exporter.get_finished_spans()
            assert span.status.status_code is StatusCode.ERROR
            assert span.attributes["xllm.ending"] == "broken"

    run(check())


def test_what_is_exported_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = exporting_provider()
    assert provider.resource.attributes["service.name"] == "xllm-service"
    provider.shutdown()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    provider = exporting_provider()
    assert provider.resource.attributes["service.name"] == "mine"
    provider.shutdown()
