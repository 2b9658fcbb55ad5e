"""Paths: what is refused in public is refused in every spelling that a server would accept."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from xllm_plugin.service.replies import Refusal
from xllm_plugin.service.routes import CONTROL_ROUTES, Kind, is_control, route_of


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (b"/v1/chat/completions", Kind.INFERENCE),
        (b"/v1/chat/completions?x=1", Kind.INFERENCE),
        (b"http://host:1/v1/completions", Kind.INFERENCE),
        (b"/v1/responses/resp_1/cancel", Kind.RESPONSES),
        (b"/v1/models", Kind.MODELS),
        (b"/v1/models/a/b", Kind.MODELS),
        (b"/health", Kind.HEALTH),
        (b"/v1/sleepers", Kind.OTHER),
        (b"/", Kind.OTHER),
        (b"/sleep", Kind.CONTROL),
        (b"/sleep/?level=2", Kind.CONTROL),
        (b"//sleep", Kind.CONTROL),
        (b"/%73%6Ceep", Kind.CONTROL),
        (b"/prefix/sleep", Kind.CONTROL),
        (b"/prefix/v1/load_lora_adapter", Kind.CONTROL),
        (b"/v1%2Fload_lora_adapter", Kind.CONTROL),
        (b"/fault_tolerance/apply", Kind.CONTROL),
        (b"/xllm/engines", Kind.CONTROL),
        (b"/a/xllm/x", Kind.CONTROL),
        (b"/xllm", Kind.CONTROL),
        (b"HTTP://host/sleep", Kind.CONTROL),
        (b"/metrics", Kind.CONTROL),
        (b"/metrics/x", Kind.CONTROL),
        (b"/metricsx?name=a", Kind.CONTROL),
        (b"/prefix//metrics", Kind.CONTROL),
    ],
)
def test_kinds(target: bytes, kind: Kind) -> None:
    assert route_of(target).kind is kind


@pytest.mark.parametrize(
    "target",
    [b"*", b"sleep", b"/a/../sleep", b"/a/%2e%2e/sleep", b"/sleep;x", b"/x\\sleep", b"/a#b"],
)
def test_ambiguous_targets(target: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        route_of(target)
    assert caught.value.status == 400


def test_every_route_of_vllm_is_known_as_control_or_looked_at() -> None:
    """A new vLLM brings new routes: whoever raises the version looks at each of them."""
    found_vllm = importlib.util.find_spec("vllm")  # its sources are read, nothing is imported
    if found_vllm is None or found_vllm.origin is None:
        pytest.skip("vLLM is not installed")
    source = Path(found_vllm.origin).parent / "entrypoints"
    pattern = re.compile(r'router\.(?:get|post|put|delete|websocket)\(\s*"([^"]+)"')
    found = {path for file in source.rglob("*.py") for path in pattern.findall(file.read_text())}
    assert len(found) > 40
    for_everyone = {
        *("/health", "/ping", "/version", "/tokenizer_info", "/tokenize", "/detokenize"),
        *("/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
        *("/invocations", "/inference/v1/generate", "/generative_scoring", "/v2/embed"),
        *("/cohere/v2/chat", "/cohere/v2/chat/render", "/v1/systemone", "/v1/realtime"),
        *("/v1/models", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/messages/render", "/v1/audio/transcriptions", "/v1/audio/translations"),
        *("/v1/completions", "/v1/completions/render", "/v1/completions/derender"),
        *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/chat/completions/render"),
        *("/v1/chat/completions/derender", "/v1/responses", "/v1/responses/render"),
        *("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
    }
    assert {path for path in found if not is_control(path)} <= for_everyone
    assert CONTROL_ROUTES - {"/fault_tolerance"} <= found
