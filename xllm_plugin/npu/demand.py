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
    from vllm.config import ModelConfig, VllmConfig

__all__ = ["demand_of", "kv_block_bytes", "weights_bytes", "working_bytes"]

BF16_BYTES = 2
INDEX = "model.safetensors.index.json"

SAMPLED_BYTES, SORTED_BYTES = 14, 22
"""Of a logit: as bfloat16 and float32 (2 + 4), with its probability and a draw (4 + 4); or sorted
for top-k and top-p, with its place and probability (4 + 8 + 4), which only a Triton kernel saves.
Source: vllm/v1/sample/ops/topk_topp_sampler.py."""

MAX_MADE_KEYS = 64 * 1024
"""Of `MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size`."""


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
        working_bytes=working_bytes(vllm_config),
        num_tokens=num_tokens,
        step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        step_requests=vllm_config.scheduler_config.max_num_seqs,
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


def working_bytes(vllm_config: VllmConfig) -> int:
    """What the largest step makes and holds at once, at the least.

    The engine runs this step before it makes a KV cache (`GPUModelRunner.profile_run`): a layer
    over the most tokens, then sampling for the most requests.  Graphs are not counted: they take
    what is left (`npu/graphs.py`).
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    num_tokens = scheduler.max_num_batched_tokens
    hidden_bytes = num_tokens * model.get_hidden_size() * BF16_BYTES
    largest = 2 * hidden_bytes + num_tokens * values_of_feed_forward(model) * BF16_BYTES
    if model.use_mla:
        largest = max(largest, 2 * hidden_bytes + made_keys_bytes(vllm_config))
    if model.runner_type == "generate":
        from vllm.triton_utils import HAS_TRITON

        num_logits = min(num_tokens, scheduler.max_num_seqs) * model.get_vocab_size()
        sampling_bytes = num_logits * (SAMPLED_BYTES if HAS_TRITON else SORTED_BYTES)
        largest = max(largest, hidden_bytes + sampling_bytes)
    return int(largest)


def values_of_feed_forward(model: ModelConfig) -> int:
    """What one token has beside residual and input, when activations are multiplied (SwiGLU).

    Experts hold a token's rows once for each expert chosen; of the dense layers in a mixture, if
    there are any, nothing is counted.
    """
    text = model.hf_text_config
    if model.get_num_experts():
        width = _widest(getattr(text, "moe_intermediate_size", None))
        return int(model.get_num_experts_per_tok() * (model.get_hidden_size() + 3 * width))
    is_gated = getattr(text, "hidden_act", None) == "silu"
    return (3 if is_gated else 2) * _widest(getattr(text, "intermediate_size", None))


def _widest(sizes: object) -> int:
    """Of all layers; some models say it for each.  0 if it is not said in numbers."""
    each = sizes if isinstance(sizes, list | tuple) else (sizes,)
    return max((size for size in each if isinstance(size, int)), default=0)


def made_keys_bytes(vllm_config: VllmConfig) -> int:
    """Keys and values made of latents, as many as vLLM makes room for at its trial."""
    model = vllm_config.model_config
    if model.original_max_model_len == -1:
        return 0
    text = model.hf_text_config
    num_keys = min(8 * model.max_model_len, MAX_MADE_KEYS)
    num_heads = model.get_num_attention_heads(vllm_config.parallel_config)
    return int(num_keys * num_heads * (text.qk_nope_head_dim + text.v_head_dim) * BF16_BYTES)


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
