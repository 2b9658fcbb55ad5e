"""The least memory that a model asks for, without a device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xllm_plugin.models import prepare
from xllm_plugin.npu.demand import demand_of, kv_block_bytes, weights_bytes

LAYERS, KEY_HEADS = 3, 2
DENSE_BLOCK = LAYERS * 128 * 2 * KEY_HEADS * 128 * 2


def config(cache: dict[str, Any] | None = None, **model: Any) -> Any:
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


def test_weights_are_read_from_the_files_headers() -> None:
    folder = Path(prepare("tiny-llama"))
    (file,) = folder.glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert weights_bytes(folder) == file.stat().st_size - 8 - header
