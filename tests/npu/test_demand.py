"""The least memory that a model asks for, without a device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.models import prepare
from xllm_plugin.npu.demand import demand_of, kv_block_bytes, weights_bytes, working_bytes

LAYERS, HEADS, KEY_HEADS, HIDDEN, WIDTH = 3, 4, 2, 64, 200
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
        "get_num_attention_heads": lambda _: HEADS,
        "get_hidden_size": lambda: HIDDEN,
        "get_vocab_size": lambda: 10,
        "get_num_experts": lambda: 0,
        "get_num_experts_per_tok": lambda: 2,
        "runner_type": "generate",
        "hf_text_config": SimpleNamespace(intermediate_size=WIDTH, hidden_act="silu"),
        **model,
    }
    caching = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.9, **(cache or {})}
    return SimpleNamespace(
        model_config=SimpleNamespace(**settings),
        cache_config=SimpleNamespace(**caching),
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=30, max_num_seqs=7),
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


def test_a_layers_step_is_residual_input_and_the_feed_forward_networks() -> None:
    assert working_bytes(config()) == 30 * (2 * HIDDEN + 3 * WIDTH) * 2
    gelu = SimpleNamespace(intermediate_size=WIDTH, hidden_act="gelu_new")
    each = SimpleNamespace(intermediate_size=[1, WIDTH], hidden_act="gelu_new")
    assert working_bytes(config(hf_text_config=gelu)) == working_bytes(config(hf_text_config=each))
    assert working_bytes(config(hf_text_config=gelu)) == 30 * (2 * HIDDEN + 2 * WIDTH) * 2
    demand = demand_of(config())
    assert (demand.step_tokens, demand.step_requests) == (30, 7)
    assert demand.working_bytes == working_bytes(config())


def test_experts_hold_the_rows_of_each_choice() -> None:
    text = SimpleNamespace(intermediate_size=WIDTH, moe_intermediate_size=50, hidden_act="silu")
    mixture = config(hf_text_config=text, get_num_experts=lambda: 8)
    assert working_bytes(mixture) == 30 * (2 * HIDDEN + 2 * (HIDDEN + 3 * 50)) * 2


@pytest.mark.parametrize(("has_triton", "bytes_a_logit"), [(False, 22), (True, 14)])
def test_sampling_may_need_more_than_a_layer(
    monkeypatch: pytest.MonkeyPatch, has_triton: bool, bytes_a_logit: int
) -> None:
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", has_triton)
    large: dict[str, Any] = {"get_vocab_size": lambda: 10**4}
    assert working_bytes(config(**large)) == 30 * HIDDEN * 2 + 7 * 10**4 * bytes_a_logit
    assert working_bytes(config(**large, runner_type="pooling")) == working_bytes(config())


def test_latent_attention_makes_keys_and_values() -> None:
    sizes = SimpleNamespace(intermediate_size=WIDTH, qk_nope_head_dim=128, v_head_dim=96)
    latent: dict[str, Any] = {"use_mla": True, "hf_text_config": sizes}
    residual = 30 * 2 * HIDDEN * 2
    assert working_bytes(config(**latent)) == residual + 8 * 1000 * HEADS * 224 * 2
    most = working_bytes(config(**latent, max_model_len=10**5))
    assert most == residual + 65536 * HEADS * 224 * 2
    unknown = working_bytes(config(**latent, original_max_model_len=-1))
    assert unknown == residual + 30 * 2 * WIDTH * 2


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


TRIAL = """
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.executor.abstract import Executor
from xllm_plugin.npu.demand import working_bytes

load_general_plugins()
config = EngineArgs(model=MODEL, max_model_len=512, **SETTINGS).create_engine_config()
executor = Executor.get_class(config)(config)
executor.determine_available_memory()
result = [working_bytes(config), executor.driver_worker.worker.model_runner.working_bytes]
"""


@pytest.mark.npu
@pytest.mark.engine
@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "step_tokens", "step_requests"),
    [
        pytest.param("tiny-llama", 4096, 1, id="layer"),
        pytest.param("tiny-llama", 64, 64, id="sampling"),
        pytest.param("tiny-qwen3-moe", 4096, 1, id="experts"),
        pytest.param("tiny-deepseek-v3", 2048, 1, id="latent"),
    ],
)
def test_a_step_needs_what_is_counted_and_not_much_more(
    on_device: Callable[..., Any], model: str, step_tokens: int, step_requests: int
) -> None:
    """Never less, or a model that fits would be refused."""
    settings = {"max_num_batched_tokens": step_tokens, "max_num_seqs": step_requests}
    counted, measured = on_device(
        f"MODEL, SETTINGS = {str(prepare(model))!r}, {settings}\n{TRIAL}",
        operators=True,
        XLLM_DEVICE="npu",
        XLLM_PLATFORM="xllm",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
    )
    assert counted <= measured <= 3 * counted
