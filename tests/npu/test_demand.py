"""The least memory that a model asks for, without a device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.models import prepare
from xllm_plugin.npu.demand import demand_of, kv_block_bytes, weights_bytes

LAYERS, KEY_HEADS = 3, 2
DENSE_BLOCK = LAYERS * 128 * 2 * KEY_HEADS * 128 * 2


def config(cache: dict[str, Any] | None = None, load_format: str = "auto", **model: Any) -> Any:
    settings = {
        "model": "somebody/on-a-hub",
        "max_model_len": 1000,
        "original_max_model_len": 1000,
        "use_mla": False,
        "get_sliding_window": lambda: None,
        "get_num_kv_heads": lambda _: KEY_HEADS,
        "get_num_layers": lambda _: LAYERS,
        **model,
    }
    caching = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.9, **(cache or {})}
    return SimpleNamespace(
        model_config=SimpleNamespace(**settings),
        cache_config=SimpleNamespace(**caching),
        parallel_config=None,
        load_config=SimpleNamespace(load_format=load_format),
    )


def test_heads_are_counted_as_they_are_padded() -> None:
    assert kv_block_bytes(config()) == DENSE_BLOCK
    assert kv_block_bytes(config(use_mla=True)) == LAYERS * 128 * 576 * 2


def test_one_request_of_the_longest_kind_in_whole_blocks() -> None:
    demand = demand_of(config())
    assert (demand.kv_cache_bytes, demand.num_tokens) == (8 * DENSE_BLOCK, 1000)
    assert (demand.weights_bytes, demand.utilization) == (0, 0.9)


def test_a_length_that_is_not_known_yet_counts_as_a_block() -> None:
    assert demand_of(config(original_max_model_len=-1)).kv_cache_bytes == DENSE_BLOCK
    assert demand_of(config(get_sliding_window=lambda: 64)).kv_cache_bytes == DENSE_BLOCK


def test_a_cache_asked_for_in_bytes() -> None:
    demand = demand_of(config({"kv_cache_memory_bytes": 12345}))
    assert (demand.kv_cache_bytes, demand.num_tokens) == (12345, None)


@pytest.fixture
def weights() -> Path:
    """A file of bfloat16."""
    (file,) = Path(prepare("tiny-llama")).glob("*.safetensors")
    return file


def num_data_bytes(file: Path) -> int:
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


def test_weights_are_read_from_the_files_headers(weights: Path) -> None:
    assert weights_bytes(weights.parent) == num_data_bytes(weights)


def test_with_an_index_only_the_files_that_it_names_count(weights: Path, tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*shards, "model.safetensors"):  # the last is stale: vLLM does not load it
        shutil.copy(weights, tmp_path / name)
    assert weights_bytes(tmp_path) == 3 * num_data_bytes(weights)
    index = tmp_path / "model.safetensors.index.json"
    named = dict(zip("abc", [*shards, shards[0]], strict=True))
    index.write_text(json.dumps({"weight_map": named}))
    assert weights_bytes(tmp_path) == 2 * num_data_bytes(weights)


def test_files_that_cannot_be_read_are_left_for_vllm_to_say(tmp_path: Path) -> None:
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    assert weights_bytes(tmp_path) == 0
    index = tmp_path / "model.safetensors.index.json"
    for text in ('{"weight_map": {"a": "absent.safetensors"}}', "{", "{}"):
        index.write_text(text)
        assert weights_bytes(tmp_path) == 0


def test_weights_that_no_file_gives_do_not_count(weights: Path) -> None:
    folder = str(weights.parent)
    assert demand_of(config(model=folder)).weights_bytes == num_data_bytes(weights)
    assert demand_of(config(model=folder, load_format="dummy")).weights_bytes == 0
