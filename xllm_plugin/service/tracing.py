"""OpenTelemetry: a span a request, from when it is whole to the end of its answer.

The span continues the client's trace (W3C Trace Context), and the instance gets it as its parent,
so that vLLM's own spans (`--otlp-traces-endpoint`) hang below it.  Where spans go and how many are
sampled is set by OpenTelemetry's own variables, `OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_TRACES_SAMPLER` and the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xllm_plugin.errors import PlatformError
from xllm_plugin.service.routes import Kind
from xllm_plugin.service.telemetry import Ending

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from xllm_plugin.service.exchange import Exchange

__all__ = ["Tracing", "exporting_provider"]

_SERVER_ERROR = 500
_MAX_MODEL_CHARS = 256


def exporting_provider() -> TracerProvider:
    """A provider that sends spans by OTLP over HTTP, in batches from a thread of its own.

    Raises:
        PlatformError: the libraries are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise PlatformError(
            f"OpenTelemetry is not installed ({error}): pip install 'xllm-plugin[service,otel]', "
            "or set tracing.enabled=false."
        ) from error
    ours = Resource({SERVICE_NAME: "xllm-service"})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Begins and ends the spans of exchanges.

    Args:
        provider: owns where they go; `close` shuts it down.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("xllm_plugin.service")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, exchange: Exchange) -> None:
        """Start a request's span, and have the instance know of it."""
        noted = exchange.noted
        carrier = {
            name: noted[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in noted
        }
        name = exchange.method.decode("latin-1")
        if exchange.route.kind is Kind.INFERENCE:  # other paths may have names in them
            name = f"{name} {exchange.route.path}"
        exchange.span = self._tracer.start_span(
            name,
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
        )
        outgoing: dict[str, str] = {}
        self._propagator.inject(outgoing, self._trace.set_span_in_context(exchange.span))
        lines = "".join(f"{name}: {value}\r\n" for name, value in outgoing.items())
        start = exchange.head.index(b"\r\n") + 2
        exchange.head = exchange.head[:start] + lines.encode("latin-1") + exchange.head[start:]

    def end(self, exchange: Exchange, ending: Ending) -> None:
        """End it, with what is known of the request by now; no text of it."""
        span = exchange.span
        assert span is not None
        if span.is_recording():
            span.set_attributes(_attributes(exchange, ending))
            if ending is Ending.BROKEN or exchange.status >= _SERVER_ERROR:
                span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(exchange: Exchange, ending: Ending) -> dict[str, Any]:
    """Names of OpenTelemetry's semantic conventions (HTTP, generative AI) where they have one."""
    decision, stream = exchange.decision, exchange.stream
    found = {
        "http.request.method": exchange.method.decode("latin-1"),
        "http.response.status_code": exchange.status,
        "url.path": exchange.route.path,
        "gen_ai.request.model": (exchange.model or "")[:_MAX_MODEL_CHARS] or None,
        "gen_ai.usage.input_tokens": exchange.num_prompt_tokens or None,
        "gen_ai.usage.output_tokens": exchange.num_output_tokens or None,
        "gen_ai.response.id": (stream.id if stream else "") or None,
        "xllm.instances": [instance.name for instance in exchange.visited],
        "xllm.policy": decision.policy if decision else None,
        "xllm.cause": decision.cause if decision else None,
        "xllm.ending": ending.value,
        "xllm.continued": stream.num_resumes if stream else 0,
        "xllm.ttft_ms": round(exchange.ttft_s * 1e3, 2) if exchange.ttft_s > 0 else None,
    }
    return {name: value for name, value in found.items() if value is not None}
