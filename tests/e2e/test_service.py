"""`xllm service` in front of a real server: the openai client sees no difference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.testing.dialogues import (
    DIALOGUES,
    hold_all,
    read_metric,
    wait_for_metric,
    wait_until_idle,
)
from xllm_plugin.testing.streams import DONE, events_in

pytestmark = pytest.mark.e2e

MODEL_NAME = "smollm2"
NAMES = (
    *("models", "routes", "chat", "chat_chunks", "responses", "log_probs", "tool_stream"),
    "several_at_once",
)
ALL_NAMES = tuple(name for name in DIALOGUES if name not in ("bad_requests", "hang_up"))


@pytest.fixture(scope="module")
def service_url(xllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with the server that all e2e tests share behind it."""
    port, admin_port = find_free_port(), find_free_port()
    command = [sys.executable, "-m", "xllm_plugin.cli", "service", "--host", "127.0.0.1"]
    with Server(
        "service",
        [*command, "--port", str(port), "--admin-port", str(admin_port), "--instance", xllm_url],
        port=port,
        log_path=tmp_path_factory.mktemp("service") / "log",
        environment=clean_environment({}),
        ready_timeout_s=60.0,
    ) as server:
        yield server.url


@pytest.mark.parametrize(
    "names", [NAMES, pytest.param(ALL_NAMES, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_the_openai_client_gets_the_same_answers(
    names: tuple[str, ...], xllm_url: str, service_url: str
) -> None:
    """Field by field; of an unknown model the service itself says so, in words of its own."""
    names = (*names, "bad_requests")
    hold_all(xllm_url, MODEL_NAME, names)  # the prefix cache is then the same for both
    direct = hold_all(xllm_url, MODEL_NAME, names)
    through = hold_all(service_url, MODEL_NAME, names)
    unknown = through["bad_requests"]["unknown_model"]
    assert MODEL_NAME in unknown.pop("message")
    del direct["bad_requests"]["unknown_model"]["message"]
    for name in names:
        assert through[name] == direct[name], name


def test_a_stream_is_the_instances_own_bytes(xllm_url: str, service_url: str) -> None:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "Count to ten."}],
        "max_tokens": 20,
        "temperature": 0,
        "stream": True,
    }

    def events(url: str) -> list[Any]:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
        assert reply.headers["content-type"].startswith("text/event-stream")
        *found, last = events_in(reply.text)
        assert last == DONE
        for one in found:
            del one["id"], one["created"]
        return found

    assert events(service_url) == events(xllm_url)


def test_a_client_that_hangs_up_frees_the_engine(xllm_url: str, service_url: str) -> None:
    body = {"model": MODEL_NAME, "prompt": "Once", "max_tokens": 1500, "stream": True}
    body |= {"ignore_eos": True}
    before = read_metric(xllm_url, "vllm:generation_tokens_total")
    with httpx.stream(
        "POST", f"{service_url}/v1/completions", json=body, timeout=120, trust_env=False
    ) as reply:
        chunks = reply.iter_bytes()  # held: httpx hangs up when the iterator is collected
        assert b"text" in next(chunks)
        wait_for_metric(xllm_url, "vllm:num_requests_running", 1)
    wait_until_idle(xllm_url)
    assert read_metric(xllm_url, "vllm:generation_tokens_total") - before < 1500


def test_control_routes_stay_inside(service_url: str) -> None:
    for path in ("/sleep", "/reset_prefix_cache", "/xllm/engines", "/metrics"):
        reply = httpx.post(f"{service_url}{path}", json={}, trust_env=False)
        assert reply.status_code == 403
