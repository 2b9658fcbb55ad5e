"""The dialogues' own helpers; what they say to real servers is in tests/e2e."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from xllm_plugin.errors import NotNowError
from xllm_plugin.testing.dialogues import (
    DIALOGUES,
    read_metric,
    stable,
    wait_for_metric,
    wait_until_idle,
)

METRICS = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 1.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_running_max{engine="0",model_name="m"} 9.0
vllm:request_success_total{finished_reason="abort"} 3.0
vllm:request_success_total{finished_reason="stop"} 5.0
"""


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_metric_is_summed_over_engines_and_filtered_by_label(url: str) -> None:
    assert read_metric(url, "vllm:num_requests_running") == 3.0
    assert read_metric(url, "vllm:request_success_total", finished_reason="abort") == 3.0
    assert read_metric(url, "vllm:no_such_metric") == 0.0


def test_waiting_for_a_metric_ends_with_what_was_seen(url: str) -> None:
    wait_for_metric(url, "vllm:num_requests_running", 3)
    with pytest.raises(NotNowError, match="num_requests_running 3, not 0"):
        wait_until_idle(url, limit_s=0.0)


def test_what_differs_from_run_to_run_is_left_out_at_any_depth() -> None:
    answer = {"id": "x", "choices": [{"text": "a", "tool_calls": [{"id": "y", "name": "f"}]}]}
    assert stable(answer) == {"choices": [{"text": "a", "tool_calls": [{"name": "f"}]}]}


def test_every_dialogue_says_what_it_is_about() -> None:
    assert all(function.__doc__ for function in DIALOGUES.values())


def test_hanging_up_comes_last() -> None:
    """How far it got differs, and with it what the prefix cache holds for later requests."""
    assert list(DIALOGUES)[-1] == "hang_up"
