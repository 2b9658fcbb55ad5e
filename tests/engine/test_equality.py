"""One model of each kind answers under xllm as under stock vLLM, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xllm_plugin.models import prepare
from xllm_plugin.testing.collect import Collection, Settings, collect_in_child
from xllm_plugin.testing.equality import (
    check_bit_equal,
    check_near_ties,
    check_token_equal,
    measure,
)

pytestmark = pytest.mark.engine

DATA = Path(__file__).parents[2] / "benchmarks" / "equality" / "data"
TEXT, IMAGES = DATA / "prompts.jsonl", DATA / "images.jsonl"

# Stock vLLM 0.32 needs to be kept off its CPU rotary operator for MLA; the plugin does it itself.
MLA_ON_STOCK = ("all", "-rotary_embedding")


def both(model: str, prompts: Path, *stock_custom_ops: str) -> tuple[Collection, Collection]:
    """The same sixteen prompts under stock vLLM and under xllm."""
    settings = Settings(model=str(prepare(model)), max_tokens=16, limit=16)
    native = replace(settings, custom_ops=stock_custom_ops)
    return (
        collect_in_child(native, prompts, platform="native"),
        collect_in_child(settings, prompts, platform="xllm"),
    )


@pytest.mark.parametrize(
    ("model", "prompts", "stock_custom_ops"),
    [
        pytest.param("smollm2", TEXT, (), id="dense"),
        pytest.param("tiny-qwen3-moe", TEXT, (), id="MoE", marks=pytest.mark.full),
        pytest.param("tiny-deepseek-v2", TEXT, MLA_ON_STOCK, id="MLA", marks=pytest.mark.full),
        pytest.param("tiny-llava", IMAGES, (), id="image", marks=pytest.mark.full),
        pytest.param("tiny-deepseek-v3", TEXT, MLA_ON_STOCK, id="MLA-v3", marks=pytest.mark.full),
        pytest.param("tiny-qwen2.5-vl", IMAGES, (), id="image-qwen", marks=pytest.mark.full),
        pytest.param("tiny-qwen3-vl", IMAGES, (), id="image-qwen3", marks=pytest.mark.full),
    ],
)
def test_the_same_batches_give_the_same_bits(
    model: str, prompts: Path, stock_custom_ops: tuple[str, ...]
) -> None:
    native, xllm = both(model, prompts, *stock_custom_ops)
    assert native.num_threads == xllm.num_threads
    assert xllm.num_replaced_modules == 0
    report = check_bit_equal(native.completions, xllm.completions)
    assert report.equal, report.summary()
    texts = {completion.token_ids for completion in xllm.completions}
    assert len(texts) > 8, "the model says the same whatever it is asked: equality shows nothing"


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    reason="native layers need AVX512-BF16, and leave AMX to oneDNN",
)
def test_native_layers_differ_from_stock_as_stock_does_from_itself() -> None:
    wide = Settings(model=str(prepare("smollm2")), max_tokens=32, limit=16)
    stock = collect_in_child(wide, TEXT, platform="native").completions
    alone = collect_in_child(replace(wide, max_num_seqs=1), TEXT, platform="native").completions
    native_layers = collect_in_child(replace(wide, eager=False), TEXT, platform="xllm")
    assert native_layers.num_replaced_modules == 1, "the stack of layers, as one call"
    report = check_near_ties(stock, native_layers.completions, measure(stock, alone))
    assert report.equal, report.summary()


@pytest.mark.full
def test_other_batches_give_the_same_tokens_in_float32() -> None:
    wide = Settings(model=str(prepare("smollm2")), dtype="float32", max_tokens=16, limit=16)
    native = collect_in_child(wide, TEXT, platform="native")
    xllm = collect_in_child(replace(wide, max_num_seqs=1), TEXT, platform="xllm")
    report = check_token_equal(native.completions, xllm.completions)
    assert report.equal, report.summary()
