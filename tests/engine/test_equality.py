"""One model of each kind answers under xllm as under stock vLLM, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

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


def settings_of(model: str) -> Settings:
    return Settings(model=str(prepare(model)), max_tokens=32, limit=16)


@cache
def answers(settings: Settings, prompts: Path, platform: Literal["xllm", "native"]) -> Collection:
    """One engine for all tests that ask the same: a start takes a quarter of a minute."""
    return collect_in_child(settings, prompts, platform=platform)


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
    """Sixteen prompts under stock vLLM and under xllm."""
    settings = settings_of(model)
    stock = replace(settings, custom_ops=stock_custom_ops, alone=True)  # as below: one engine
    native = answers(stock, prompts, "native")
    xllm = answers(settings, prompts, "xllm")
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
    wide = settings_of("smollm2")
    stock = answers(replace(wide, alone=True), TEXT, "native")
    native_layers = answers(replace(wide, eager=False), TEXT, "xllm")
    assert native_layers.num_replaced_modules == 1, "the stack of layers, as one call"
    noise = measure(stock.completions, stock.alone)
    report = check_near_ties(stock.completions, native_layers.completions, noise)
    assert report.equal, report.summary()


@pytest.mark.full
def test_other_batches_give_the_same_tokens_in_float32() -> None:
    wide = replace(settings_of("smollm2"), dtype="float32", max_tokens=16)
    native = answers(wide, TEXT, "native")
    xllm = answers(replace(wide, max_num_seqs=1), TEXT, "xllm")
    report = check_token_equal(native.completions, xllm.completions)
    assert report.equal, report.summary()
