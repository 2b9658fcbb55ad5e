"""Outputs are collected over HTTP and judged by the one shared checker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xllm_plugin.bench.outputs import collect, compare, self_noise
from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.bench.traces import Request
from xllm_plugin.errors import NotNowError

PROMPTS = [Request((5, 6, 7), 4), Request((9,), 3)]


@contextmanager
def fake(tmp_path: Path, *flags: str) -> Iterator[str]:
    port = find_free_port()
    command = (sys.executable, "-m", "xllm_plugin.testing.fake_openai", "--port", str(port), *flags)
    log = tmp_path / "log"
    with Server("f", command, port=port, log_path=log, environment=clean_environment({})) as server:
        yield server.url


def test_same_server_twice_is_bit_equal(tmp_path: Path) -> None:
    with fake(tmp_path) as url:
        alone = collect(url, "fake", PROMPTS)
        together = collect(url, "fake", PROMPTS, at_once=2)
    assert [completion.token_ids for completion in alone] == [(8, 9, 10, 11), (10, 11, 12)]
    check = compare("b", "a", alone, together, self_noise(alone, together))
    assert check.passed
    assert check.name == "outputs of b equal those of a"
    assert "bit-equal: 2 prompts, 7 tokens" in check.detail


def test_a_wrong_server_is_found(tmp_path: Path) -> None:
    with fake(tmp_path) as url:
        right = collect(url, "fake", PROMPTS)
    with fake(tmp_path, "--token-shift", "1") as url:
        wrong = collect(url, "fake", PROMPTS)
    check = compare("b", "a", right, wrong, self_noise(right, right))
    assert not check.passed
    assert "2 unexplained" in check.detail


def test_a_server_that_fails_is_explained(tmp_path: Path) -> None:
    with (
        fake(tmp_path, "--fail-every", "2") as url,
        pytest.raises(NotNowError, match="did not complete prompt 1"),
    ):
        collect(url, "fake", PROMPTS)
