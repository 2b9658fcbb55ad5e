"""Which paths go to instances, which the service answers itself, and which it refuses in public."""

from __future__ import annotations

from enum import Enum, auto
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from xllm_plugin.service.replies import Refusal

__all__ = ["CONTROL_ROUTES", "Kind", "Route", "is_control", "route_of"]


class Kind(Enum):
    """What happens with a path."""

    INFERENCE = auto()
    """Sent to an instance, again to another one if the first fails before it has answered."""
    RESPONSES = auto()
    """The same, and the instance that answered owns the response's id."""
    OTHER = auto()
    """Sent to an instance; may have effects that we do not know."""
    CONTROL = auto()
    MODELS = auto()
    HEALTH = auto()


class Route(NamedTuple):
    """A target of a request line, understood."""

    kind: Kind
    path: str
    """Decoded, without query, repeated slashes and a slash at the end."""
    target: bytes
    """As sent to the instance: origin form."""


CONTROL_ROUTES = frozenset(
    {
        # vllm/entrypoints/serve: sleep, rlhf, profile, cache, rpc, lora, elastic_ep, dev mode
        "/abort_requests",
        "/collective_rpc",
        "/fault_tolerance",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
        "/finish_weight_update",
        "/get_world_size",
        "/init_weight_transfer_engine",
        "/is_paused",
        "/is_scaling_elastic_ep",
        "/is_sleeping",
        "/kv_event_sources",
        "/load",
        "/pause",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/scale_elastic_ep",
        "/server_info",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_profile",
        "/start_weight_update",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_checker",
        "/weight_info",
    }
)
_CONTROL_PREFIX: Final = "/xllm/"
_METRICS: Final = "/metrics"  # vLLM takes whatever begins like that for it
_INFERENCE: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v2/embed",
        "/v2/rerank",
        "/classify",
        "/detokenize",
        "/embeddings",
        "/inference/v1/generate",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
    }
)


def is_control(path: str) -> bool:
    """Whether `path` steers an instance instead of asking it something.

    Ends are compared, since a server with --root-path takes the same routes under a prefix.
    """
    if path.endswith("/xllm") or _CONTROL_PREFIX in path or _METRICS in path:
        return True
    start = -1
    for _ in range(3):  # the longest control route has three segments
        start = path.rfind("/", 0, start if start >= 0 else len(path))
        if start < 0:
            return False
        if path[start:] in CONTROL_ROUTES:
            return True
    return False


@lru_cache(maxsize=1024)
def route_of(target: bytes) -> Route:
    """Understand a request target.

    Raises:
        Refusal: it is neither origin form nor absolute form, or has segments that servers read in
            different ways.
    """
    if b"#" in target:  # servers cut the path there
        raise Refusal(400, "A request target has no fragment; send it without '#'.")
    if not target.startswith(b"/"):
        target = _origin_form(target)
    path = _normal(target.split(b"?", 1)[0])
    return Route(_kind(path), path, target)


def _kind(path: str) -> Kind:
    if is_control(path):
        return Kind.CONTROL
    if path in _INFERENCE:
        return Kind.INFERENCE
    if path == "/v1/responses" or path.startswith("/v1/responses/"):
        return Kind.RESPONSES
    if path == "/v1/models" or path.startswith("/v1/models/"):
        return Kind.MODELS
    return Kind.HEALTH if path == "/health" else Kind.OTHER


def _origin_form(target: bytes) -> bytes:
    for scheme in (b"http://", b"https://"):
        if target[: len(scheme)].lower() == scheme:
            _, slash, path = target[len(scheme) :].partition(b"/")
            return slash + path if slash else b"/"
    raise Refusal(
        400, f"Request target {target[:80]!r} is not a path; send one that begins with '/'."
    )


def _normal(raw: bytes) -> str:
    path = unquote_to_bytes(raw).decode("utf-8", "replace")
    segments = [segment for segment in path.split("/") if segment]
    if any(segment in (".", "..") for segment in segments) or "\\" in path or ";" in path:
        raise Refusal(400, f"Path {path[:80]!r} is ambiguous; send it without '.', ';' or '\\'.")
    return "/" + "/".join(segments)
