"""Requests go out when they are due, and what becomes of each is noted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xllm_plugin.bench import open_loop
from xllm_plugin.bench.open_loop import Backlog, Sending, Sent, evenly, send
from xllm_plugin.bench.promises import Promise, Verdict, judge
from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.bench.traces import Request
from xllm_plugin.errors import NotNowError

FOREVER_S = 1e6
EASY = Promise(1e6, 1e6)


@contextmanager
def fake(tmp_path: Path, *flags: str) -> Iterator[Server]:
    port = find_free_port()
    command = (sys.executable, "-m", "xllm_plugin.testing.fake_openai", "--port", str(port), *flags)
    log = tmp_path / "log"
    with Server("f", command, port=port, log_path=log, environment=clean_environment({})) as server:
        yield server


def request(due_s: float = 0.0, *, tokens: int = 3, give_up_s: float = FOREVER_S) -> Sending:
    return Sending(due_s, "t", (1, 2), tokens, give_up_s)


def test_requests_at_even_pauses_or_all_at_once() -> None:
    requests = [Request((one,), 5) for one in range(4)]
    assert [one.due_s for one in evenly(requests, over_s=2.0, give_up_s=9.0)] == [0, 0.5, 1, 1.5]
    at_once = evenly(requests, give_up_s=9.0)
    assert {(one.due_s, one.output_tokens, one.give_up_s) for one in at_once} == {(0.0, 5, 9.0)}
    assert [one.prompt for one in at_once] == [(0,), (1,), (2,), (3,)]


def verdicts(sent: Sent) -> list[Verdict]:
    return [judge(outcome, EASY) for outcome in sent.outcomes]


def test_times_and_tokens_are_noted(tmp_path: Path) -> None:
    with fake(tmp_path, "--ttft-ms", "20", "--tpot-ms", "10") as server:
        sendings = [request(0.2), request(0.0, tokens=1), request(0.1, tokens=5)]
        sent = send(server.url, "fake", sendings, window_s=0.3)
    assert [one.received_tokens for one in sent.outcomes] == [3, 1, 5]
    assert verdicts(sent) == [Verdict.MET] * 3
    for sending, one in zip(sendings, sent.outcomes, strict=True):
        assert (one.due_s, one.status, one.error) == (sending.due_s, 200, "")
        assert one.sent_s is not None
        assert one.first_s is not None
        assert one.last_s is not None
        assert sending.due_s <= one.sent_s <= one.first_s - 0.019
        assert one.last_s - one.first_s >= 0.009 * (one.output_tokens - 1)
    assert sent.duration_s >= 0.2
    assert sent.client_cpu_s > 0


@pytest.mark.parametrize(
    ("status", "verdict", "error"),
    [
        ("429", Verdict.REFUSED, "HTTP 429"),
        ("503", Verdict.REFUSED, "HTTP 503"),
        ("500", Verdict.FAILED, 'HTTP 500: {"error":{"message":"a fault on demand"'),
        ("200", Verdict.FAILED, "the stream ended without [DONE]"),
    ],
)
def test_refusals_and_faults(tmp_path: Path, status: str, verdict: Verdict, error: str) -> None:
    with fake(tmp_path, "--fail-every", "2", "--fail-status", status) as server:
        sent = send(server.url, "fake", [request(0.0), request(0.2)], window_s=0.2)
    assert verdicts(sent) == [Verdict.MET, verdict]
    assert error in sent.outcomes[1].error


def test_what_has_no_chance_is_ended_behind_the_window(tmp_path: Path) -> None:
    with fake(tmp_path, "--tpot-ms", "20000") as server:
        hopeless = request(0.0, give_up_s=0.1)
        sent = send(server.url, "fake", [hopeless], window_s=0.4, check_alive=server.check_alive)
    (one,) = sent.outcomes
    assert one.received_tokens == 1
    assert judge(one, EASY) is Verdict.CUT
    assert sent.duration_s >= 0.4


def test_a_server_that_stays_busy_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_loop, "SETTLE_ATTEMPTS", 2)
    monkeypatch.setattr(open_loop, "SETTLED_S", 0.0)
    with fake(tmp_path) as server, pytest.raises(NotNowError, match="does not become idle"):
        send(server.url, "fake", [request()], window_s=0.1)


def test_a_dead_server_ends_the_trial(tmp_path: Path) -> None:
    def died() -> None:
        raise NotNowError("server died")

    with fake(tmp_path) as server, pytest.raises(NotNowError, match="server died"):
        send(server.url, "fake", [request(60.0)], window_s=60.0, check_alive=died)


def test_a_backlog_is_kept_full(tmp_path: Path) -> None:
    asked: list[int] = []

    def offline(number: int) -> Sending:
        asked.append(number)
        return request(tokens=4)

    with fake(tmp_path, "--ttft-ms", "10", "--tpot-ms", "5") as server:
        backlog = Backlog(offline, at_once=3, lead_s=0.2)
        sent = send(server.url, "fake", [request(0.5)], window_s=0.6, backlog=backlog)
    assert verdicts(sent) == [Verdict.MET]
    tally = sent.backlog
    assert asked == list(range(len(asked)))
    assert (tally.failed, tally.refused) == (0, 0)
    assert 0 < tally.finished <= len(asked)
    assert tally.output_tokens >= 3 * tally.finished
    assert tally.prompt_tokens % 2 == 0


def test_a_backlog_that_is_refused_goes_on(tmp_path: Path) -> None:
    with fake(tmp_path, "--fail-every", "2", "--fail-status", "429", "--ttft-ms", "5") as server:
        backlog = Backlog(lambda _: request(), at_once=1, lead_s=0.0)
        sent = send(server.url, "fake", [request(1.5)], window_s=1.6, backlog=backlog)
    assert sent.backlog.refused > 0
    assert sent.backlog.finished > 0
