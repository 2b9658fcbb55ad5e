"""Requests have the trace's lengths, and are the same for everybody who asks with the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xllm_plugin.bench.traces import Lengths, Vocabulary, read_lengths, synthesise
from xllm_plugin.cli.bench import benchmarks_folder
from xllm_plugin.errors import ConfigError, ModelError

WORDS = Vocabulary(10, frozenset({0, 9}))
TRACE = (Lengths(3, 5), Lengths(100, 1), Lengths(0, 900))


def test_lengths_are_clipped_and_repeat() -> None:
    made = synthesise(TRACE, WORDS, count=4, seed=1, max_input=8, max_output=6)
    assert [(len(r.prompt), r.output_tokens) for r in made] == [(3, 5), (8, 1), (1, 6), (3, 5)]


def test_special_tokens_are_not_drawn() -> None:
    (request,) = synthesise(TRACE[1:2], WORDS, count=1, seed=1, max_input=100, max_output=1)
    assert set(request.prompt) == set(range(1, 9))


def test_seeds_decide_the_tokens() -> None:
    def make(seed: str) -> object:
        return synthesise(TRACE, WORDS, count=3, seed=seed, max_input=50, max_output=9)

    assert make("a") == make("a")
    assert make("a") != make("b")


def test_both_forms_of_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 3, "output_length": 4}\n'
        '{"conversation": 0, "turns": [[5, 6], [7, 8]]}\n'
    )
    assert read_lengths(path) == (Lengths(3, 4), Lengths(5, 6))


@pytest.mark.parametrize(("text", "complaint"), [("", "is empty"), ('{"turns": []}', "neither")])
def test_other_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_lengths(path)


@pytest.mark.parametrize("name", ["azure-conv", "azure-code", "sharegpt"])
def test_committed_traces_are_readable(name: str) -> None:
    lengths = read_lengths(benchmarks_folder() / "serving" / "data" / f"{name}.jsonl")
    assert len(lengths) == 2000
    assert all(row.input_tokens >= 0 for row in lengths)


def test_vocabulary_of_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        Vocabulary.of_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="vocab_size"):
        Vocabulary.of_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 2}]}))
    assert Vocabulary.of_model(tmp_path) == Vocabulary(7, frozenset({2}))
