"""Loads are read from the command line, and raw times become figures as vLLM defines them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.bench.load import Load, LoadClient, LoadResult, parse_loads
from xllm_plugin.bench.traces import Request
from xllm_plugin.errors import ConfigError, NotNowError

ASKED = [Request((1, 2), 3), Request((1, 2, 3), 2), Request((1,), 4)]
RAW: dict[str, Any] = {
    "duration": 2.0,
    "output_lens": [3, 1, 0],
    "input_lens": [2, 3, 1],
    "ttfts": [0.1, 0.3, 0.0],
    "latencies": [0.5, 0.3, 0.0],
    "itls": [[0.1, 0.3], [], []],
    "errors": ["", "", "Traceback ...\nOSError: gone"],
    "client_cpu_s": 0.25,
}


def test_figures_of_a_load_point() -> None:
    result = LoadResult.of(Load(clients=2), ASKED, RAW)
    assert (result.requests, result.failed, result.short) == (3, 1, 1)
    assert (result.output_tokens, result.output_tok_s) == (4, 2.0)
    assert result.ttft_p50_ms == pytest.approx(200)
    assert result.ttft_p90_ms == pytest.approx(280)
    assert result.tpot_p90_ms == pytest.approx(200)  # (500 - 100) / 2; a single token has none
    assert result.tpot_p95_ms == pytest.approx(200)
    assert result.itl_p99_ms == pytest.approx(298)
    assert result.first_error == "OSError: gone"
    assert LoadResult.model_validate_json(result.model_dump_json()) == result


def test_nothing_answered_is_an_error() -> None:
    with pytest.raises(NotNowError, match="all 3 requests failed at 2 clients"):
        LoadResult.of(Load(clients=2), ASKED, {**RAW, "output_lens": [0, 0, 0]})


def test_loads_from_text() -> None:
    assert parse_loads("8, 1,8") == (Load(clients=1), Load(clients=8))
    assert parse_loads("2/s,0.5/s") == (Load(requests_per_s=0.5), Load(requests_per_s=2.0))
    assert [str(load) for load in parse_loads("1,2")] == ["1 client", "2 clients"]
    assert str(parse_loads("0.5/s")[0]) == "0.5 req/s"


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1.5", "0/s", "inf/s", "1,2/s"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write"):
        parse_loads(text)


def test_a_client_that_dies_gives_its_log(tmp_path: Path) -> None:
    dying = (sys.executable, "-c", "raise SystemExit('no vllm here')")
    with (
        pytest.raises(NotNowError, match="no vllm here"),
        LoadClient(tmp_path / "log", command=dying),
    ):
        pytest.fail("must not come up")


def test_a_client_that_dies_under_load_gives_its_log(tmp_path: Path) -> None:
    script = "print('{}', flush=True); input(); raise SystemExit('out of memory')"
    with (
        LoadClient(tmp_path / "log", command=(sys.executable, "-c", script)) as client,
        pytest.raises(NotNowError, match="out of memory"),
    ):
        client.measure("http://127.0.0.1:1", "m", Load(clients=1), ASKED)


def test_a_server_that_dies_under_load_ends_the_wait(tmp_path: Path) -> None:
    script = "print('{}', flush=True); input(); input(); input()"

    def died() -> None:
        raise NotNowError("server died")

    with LoadClient(tmp_path / "log", command=(sys.executable, "-c", script)) as client:
        with pytest.raises(NotNowError, match="server died"):
            client.measure("http://127.0.0.1:1", "m", Load(clients=1), ASKED, on_wait=died)
        with pytest.raises(NotNowError, match="no answer within"):
            client.measure("http://127.0.0.1:1", "m", Load(clients=1), ASKED, timeout_s=0.1)
