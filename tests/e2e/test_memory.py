"""Servers give memory back: asleep to the system, and what is not needed to each other."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner

from xllm_plugin.bench.peers import xllm_server
from xllm_plugin.channel.paths import socket_path
from xllm_plugin.cli.memory import memory
from xllm_plugin.errors import MisuseError, NotNowError
from xllm_plugin.models import prepare
from xllm_plugin.xtensor.leases import pool_path

pytestmark = [pytest.mark.e2e, pytest.mark.full]

MODEL_NAME = "tiny-llama"
MIB = 2**20
PATIENCE_S = 500.0
POOL_BYTES = 192 * MIB


@contextmanager
def serving(log_path: Path, *flags: str, **environment: str) -> Iterator[str]:
    """The URL of a server of a tiny model whose KV cache is elastic, up to 128 MiB."""
    peer = xllm_server(
        str(prepare(MODEL_NAME)),
        "xllm",
        "elastic KV memory",
        flags=("--served-model-name", MODEL_NAME, "--max-model-len", "2048", *flags),
        environment={
            "VLLM_SERVER_DEV_MODE": "1",
            "XLLM_PLATFORM": "xllm",
            "XLLM_XTENSOR__ENABLED": "1",
            **environment,
        },
    )
    with peer.server(log_path, ready_timeout_s=240.0) as server:
        yield server.url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("sleep") / "log"
    flags = ("--enable-sleep-mode", "--kv-cache-memory-bytes", str(128 * MIB))
    with serving(log_path, *flags) as found:
        yield found


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_S)


def asked(max_tokens: int, stream: bool = False) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "prompt": "Once upon a time there was a fox who",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


def complete(url: str, max_tokens: int = 40) -> dict[str, Any]:
    with client(url) as http:
        reply = http.post("/v1/completions", json=asked(max_tokens))
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    found: dict[str, Any] = choice
    return found


def post(url: str, path: str) -> Any:
    with client(url) as http:
        reply = http.post(path)
    assert reply.status_code == 200, reply.text
    return reply.json()


def get(url: str, path: str) -> Any:
    with client(url) as http:
        return http.get(path).raise_for_status().json()


def engine_of(url: str) -> psutil.Process:
    return psutil.Process(get(url, "/xllm/snapshot")["engines"][0]["snapshot"]["engine"]["pid"])


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_sleeps_and_answers_the_same_afterwards(url: str, level: int) -> None:
    answer = complete(url)
    engine = engine_of(url)
    awake_bytes = engine.memory_info().rss
    assert post(url, f"/sleep?level={level}") == {"status": "sleeping", "level": level}
    assert get(url, "/is_sleeping") == {"is_sleeping": True}
    asleep_bytes = engine.memory_info().rss
    assert awake_bytes - asleep_bytes > 20 * MIB
    assert post(url, "/wake_up")["status"] == "awake"
    assert get(url, "/is_sleeping") == {"is_sleeping": False}
    assert complete(url) == answer
    assert engine.memory_info().rss - asleep_bytes > 20 * MIB


def test_what_comes_while_a_server_sleeps_is_answered_when_it_wakes(url: str) -> None:
    answer = complete(url)
    post(url, "/sleep")
    found: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: found.append(complete(url)))
    asking.start()
    time.sleep(0.5)  # it would have been answered by now
    assert not found
    assert post(url, "/wake_up?tags=weights")["status"] == "sleeping"
    assert not found
    assert post(url, "/wake_up?tags=kv_cache")["status"] == "awake"
    asking.join(PATIENCE_S)
    assert found == [answer]


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("keep", "length")])
def test_requests_under_way_are_aborted_or_kept_as_asked(url: str, mode: str, reason: str) -> None:
    alone = complete(url, max_tokens=1500)
    with (
        client(url) as http,
        http.stream("POST", "/v1/completions", json=asked(1500, True)) as reply,
    ):
        events = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
        first = next(events)
        post(url, f"/sleep?mode={mode}")
        post(url, "/wake_up")
        choices = [json.loads(e)["choices"][0] for e in [first, *events] if e != "[DONE]"]
    assert choices[-1]["finish_reason"] == reason
    text = "".join(choice["text"] for choice in choices)
    assert text == alone["text"] if mode == "keep" else alone["text"].startswith(text)


def test_the_budget_of_a_server_can_be_changed(url: str) -> None:
    answer = complete(url)
    engine = get(url, "/xllm/snapshot")["engines"][0]["snapshot"]["engine"]
    path = socket_path(engine["instance_id"], engine["dp_rank"])
    done = CliRunner().invoke(memory, ["--socket", str(path), "--budget", "64MiB"])
    assert done.exit_code == 0, done.output

    def budget_bytes() -> int:
        found: int = get(url, "/xllm/memory")["engines"][0]["budget_bytes"]
        return found

    wait_until(lambda: 60 * MIB < budget_bytes() <= 64 * MIB)
    assert complete(url) == answer
    refused = CliRunner().invoke(memory, ["--socket", str(path), "--budget", "1MiB"])
    assert isinstance(refused.exception, MisuseError)


def test_an_engine_that_was_not_told_so_does_not_sleep(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--kv-cache-memory-bytes", str(128 * MIB)) as url:
        with client(url) as http:
            reply = http.post("/sleep")
        assert reply.status_code == 500
        post(url, "/wake_up")
        assert complete(url)["finish_reason"] == "length"
    assert "--enable-sleep-mode" in (tmp_path / "log").read_text()


def test_a_budget_for_no_full_request_ends_the_start_with_one_message(tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ("--kv-cache-memory-bytes", str(128 * MIB))
    with (
        pytest.raises(NotNowError, match="exit code 2"),
        serving(log, *flags, XLLM_XTENSOR__BUDGET_BYTES="1000"),
    ):
        pytest.fail("it must not start")
    said = log.read_text()
    assert re.search(r"xllm: xtensor\.budget_bytes=1000: .*Give \d+ or more", said)
    assert "Traceback" not in said


def test_two_servers_share_a_pool_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    name = f"test-{os.getpid()}"
    pool = {"XLLM_XTENSOR__POOL": name, "XLLM_XTENSOR__POOL_BYTES": str(POOL_BYTES)}
    flags = ("--kv-cache-memory-bytes", str(POOL_BYTES))
    try:
        with (
            serving(tmp_path / "first.log", *flags, **pool) as first,
            serving(tmp_path / "second.log", *flags, XLLM_XTENSOR__POOL=name) as second,
        ):
            answer = complete(first)
            assert complete(second) == answer
            (seen,) = get(first, "/xllm/memory")["engines"]
            members = seen["memory"]["pool"]["members"]
            assert sorted(member["pid"] for member in members) == sorted(
                engine_of(url).pid for url in (first, second)
            )
            assert sum(member["leased_bytes"] for member in members) <= POOL_BYTES
            with client(first) as http:
                assert "xllm:kv_memory_pool_bytes{" in http.get("/metrics").text
            os.kill(engine_of(second).pid, signal.SIGKILL)
            complete(first)
            wait_until(lambda: len(pool_members(first)) == 1)
    finally:
        pool_path(name).unlink(missing_ok=True)


def pool_members(url: str) -> list[Any]:
    complete(url, max_tokens=1)  # an idle engine says nothing new
    (seen,) = get(url, "/xllm/memory")["engines"]
    members: list[Any] = seen["memory"]["pool"]["members"]
    return members
