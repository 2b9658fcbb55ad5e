"""Traces are read as they are, and brought to a rate without changing what they share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xllm_plugin.bench.fleet_simulator.workload import arrivals, read_trace
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[3] / "benchmarks"
MOONCAKE = FOLDER / "fleet" / "data" / "mooncake-conversation.jsonl"
AZURE = FOLDER / "serving" / "data" / "azure-conv.jsonl"


def test_a_hash_has_one_parent_in_the_trace() -> None:
    """Else equal hashes were not equal prefixes, and the simulated caches would be wrong."""
    trace = read_trace(MOONCAKE)
    assert len(trace.requests) == 5719
    parents: dict[int, int] = {}
    for one in trace.requests:
        assert len(one.blocks) == -(-one.prompt_tokens // 512)
        for parent, block in zip((-1, *one.blocks), one.blocks, strict=False):
            assert parents.setdefault(block, parent) == parent
    hits = {block for one in trace.requests for block in one.blocks}
    total = sum(len(one.blocks) for one in trace.requests)
    assert 1 - len(hits) / total == pytest.approx(0.34, abs=0.02)


def test_lengths_and_blocks_are_shortened_together() -> None:
    trace = read_trace(MOONCAKE, shorten=32, shorten_outputs=4, at_most=3)
    assert trace.block_tokens == 16
    first = trace.requests[0]
    assert (first.prompt_tokens, first.output_tokens) == (6758 // 32, 500 // 4)
    assert len(first.blocks) == -(-first.prompt_tokens // 16)


def test_without_hashes_nobody_shares_a_block() -> None:
    trace = read_trace(AZURE, at_most=50)
    blocks = [block for one in trace.requests for block in one.blocks]
    assert len(blocks) == len(set(blocks))


def test_a_rate_compresses_time_and_copies_share_nothing() -> None:
    trace = read_trace(MOONCAKE, at_most=200)
    once = arrivals(trace, 10.0)
    assert len(once) / once[-1].at_s == pytest.approx(10.0)
    twice = arrivals(trace, 10.0, copies=2, seed=1)
    assert len(twice) == 400
    assert [one.at_s for one in twice] == sorted(one.at_s for one in twice)
    originals = {block for one in trace.requests for block in one.blocks}
    others = [one for one in twice if not originals & set(one.blocks)]
    assert len(others) == 200
    assert arrivals(trace, 10.0, copies=2, seed=1) == twice != arrivals(trace, 10.0, copies=2)


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"timestamp": 1, "input_length": "x"})])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n' + line)
    with pytest.raises(ConfigError, match="line 2"):
        read_trace(path)


def test_a_trace_that_is_empty_or_absent(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("empty.jsonl", "absent.jsonl"):
        with pytest.raises(ConfigError, match=name):
            read_trace(tmp_path / name)
    with pytest.raises(ConfigError, match="above 0"):
        arrivals(read_trace(AZURE, at_most=2), 0)
