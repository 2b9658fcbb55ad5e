"""The least memory that a model asks of a device: by its configuration and its files' headers."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from xllm_plugin.npu.availability import Demand
from xllm_plugin.npu.limits import BLOCK_SIZE, HEAD_SIZE, LATENT_SIZE, ROPE_SIZE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["demand_of", "kv_block_bytes", "weights_bytes"]

BF16_BYTES = 2
INDEX = "model.safetensors.index.json"


def demand_of(vllm_config: VllmConfig) -> Demand:
    """What a model needs before it can answer one request of the longest kind.

    A longest request that vLLM is to choose by the memory there is (--max-model-len auto) counts
    as one block, and so does one whose layers look back at a window alone.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    num_tokens: int | None = model.max_model_len
    if cache.kv_cache_memory_bytes:
        kv_cache_bytes, num_tokens = cache.kv_cache_memory_bytes, None
    else:
        is_chosen_by_vllm = model.original_max_model_len == -1
        is_short = is_chosen_by_vllm or model.get_sliding_window() is not None
        num_blocks = 1 if is_short else -(-model.max_model_len // BLOCK_SIZE)
        kv_cache_bytes = num_blocks * kv_block_bytes(vllm_config)
    # Weights that no file gives may be of a model made smaller by --hf-overrides.
    is_made_up = vllm_config.load_config.load_format == "dummy"
    return Demand(
        weights_bytes=0 if is_made_up else weights_bytes(Path(model.model)),
        kv_cache_bytes=kv_cache_bytes,
        num_tokens=num_tokens,
        utilization=cache.gpu_memory_utilization,
    )


def kv_block_bytes(vllm_config: VllmConfig) -> int:
    """A block of all layers, heads padded as `npu/attention.py` pads them."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    values_a_token = (
        LATENT_SIZE + ROPE_SIZE
        if model.use_mla
        else 2 * HEAD_SIZE * model.get_num_kv_heads(parallel)
    )
    return int(model.get_num_layers(parallel)) * BLOCK_SIZE * values_a_token * BF16_BYTES


def weights_bytes(folder: Path) -> int:
    """A model's weights as bfloat16.

    0 where that cannot be known: there is no folder yet, or a file is damaged or missing, and vLLM
    says so when it loads.
    """
    if not folder.is_dir():
        return 0
    try:
        return BF16_BYTES * sum(map(num_values, weight_files(folder)))
    except (OSError, ValueError, KeyError, SafetensorError):
        return 0


def weight_files(folder: Path) -> set[Path]:
    """The files that vLLM loads: with an index, those it names and no others beside them.

    As `filter_duplicate_safetensors_files` (vllm/model_executor/model_loader/weight_utils.py).
    """
    index = folder / INDEX
    if not index.is_file():
        return set(folder.glob("model*.safetensors"))
    return {folder / name for name in json.loads(index.read_text())["weight_map"].values()}


def num_values(file: Path) -> int:
    """Of all tensors in a safetensors file, by its header."""
    opened: Any = safe_open(file, "np")
    with opened as weights:
        names = weights.keys()
        shapes = [weights.get_slice(name).get_shape() for name in names]
    return sum(map(prod, shapes))
