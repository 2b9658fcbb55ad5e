"""Servers stay up between their turns, and all are gone at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from xllm_plugin.bench import fleet as module
from xllm_plugin.bench.fleet import Fleet
from xllm_plugin.bench.peers import PeerServer
from xllm_plugin.bench.servers import Server, Waiting, find_free_port
from xllm_plugin.errors import NotNowError


def fake(name: str, *flags: str) -> PeerServer:
    port = str(find_free_port())
    command = (sys.executable, "-m", "xllm_plugin.testing.fake_openai", "--port", port, *flags)
    return PeerServer(name, "a fake", command)


def is_up(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", trust_env=False, timeout=2.0).is_success
    except httpx.TransportError:
        return False


def test_each_is_started_once_and_only_one_runs(tmp_path: Path) -> None:
    a, b, seen = fake("a"), fake("b"), list[Waiting]()
    with Fleet(tmp_path, seen.append) as fleet:
        first, second = fleet.server(a), fleet.server(b)
        assert not is_up(first)  # paused
        assert is_up(second)
        assert fleet.server(a) is first
        assert is_up(first)
        assert not is_up(second)
        assert {waiting.server for waiting in seen} == {"a", "b"}
        assert sorted(fleet.ready_s) == ["a", "b"]
        assert fleet.waiting_cpu_s("a") > 0  # b has at least started
        fleet.stop("b")
        fleet.stop("b")
        assert not is_up(second)
        assert not fleet.is_started("b")
        assert fleet.waiting_cpu_s("a") == 0
    assert not is_up(first)
    assert (tmp_path / "a.log").exists()


def test_one_that_does_not_come_up_leaves_nothing(tmp_path: Path) -> None:
    a = fake("a")
    with Fleet(tmp_path, lambda _: None) as fleet:
        first = fleet.server(a)
        with pytest.raises(NotNowError, match="no such model"):
            fleet.server(fake("b", "--die", "no such model"))
        assert not fleet.is_started("b")
        assert fleet.server(a) is first
        assert is_up(first)
    assert not is_up(first)


def test_too_little_memory_is_said_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEEDED_BYTES", 2**60)
    with (
        Fleet(tmp_path, lambda _: None) as fleet,
        pytest.raises(NotNowError, match=r"GiB of memory are free with 0 servers.*compare fewer"),
    ):
        fleet.server(fake("a"))
