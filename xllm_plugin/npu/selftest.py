"""`xllm selftest` on an Ascend device: does each operator compute what it is understood to compute?

The understanding is the emulator's (`xllm_plugin.testing.cann.device`): the same arguments go to
the operator on the device and to its emulation on the host.  On the emulator both are the same
code, so there this tests itself alone; on a device it is the first thing to run and to send back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu  # noqa: F401  registers the operators
from torch.utils._pytree import tree_leaves, tree_map

from xllm_plugin.npu.attention import BAND, RIGHT_DOWN_CAUSAL, causal_mask
from xllm_plugin.npu.limits import BLOCK_SIZE, HEAD_SIZE, LATENT_SIZE, ROPE_SIZE
from xllm_plugin.testing.cann.device import operators  # noqa: F401  enters them
from xllm_plugin.testing.cann.device.contract import EMULATED
from xllm_plugin.testing.selftest import Check

__all__ = ["CASES", "Case", "check_operators"]

NUM_TIMED = 20
ROUNDING = 3e-2
"""A few steps of bfloat16, whose mantissa has 8 bits."""

HIDDEN, HEADS, KEY_HEADS, EXPERTS, CHOSEN = 1024, 8, 2, 16, 2
VOCABULARY = 32_000

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One call.

    Attributes:
        operator: its name.
        what: shapes, for the table.
        arguments: makes host arguments, positional and by name, from a generator.
        num_compared: of its results, how many are defined and compared.
        written: positions of the arguments that are compared instead, as they are written.
    """

    operator: str
    what: str
    arguments: Callable[[torch.Generator], Arguments]
    num_compared: int = 1
    written: Sequence[int] = ()


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normally distributed bfloat16."""
    return torch.randn(shape, generator=generator).bfloat16()


def norm_arguments(generator: torch.Generator) -> Arguments:
    """Of a norm: states and weight."""
    return (normal(generator, 33, HIDDEN), normal(generator, HIDDEN)), {"epsilon": 1e-6}


def add_norm_arguments(generator: torch.Generator) -> Arguments:
    """The same with a residual."""
    (states, weight), named = norm_arguments(generator)
    return (states, normal(generator, 33, HIDDEN), weight), named


def rotary_arguments(generator: torch.Generator) -> Arguments:
    """Of rotary embedding: positions, queries, keys, cosines and sines."""
    angles = torch.rand(64, HEAD_SIZE // 2, generator=generator) * 6
    cache = torch.cat((angles.cos(), angles.sin()), -1).bfloat16()
    positions = torch.randint(0, 64, (33,), generator=generator)
    query, key = (normal(generator, 33, n * HEAD_SIZE) for n in (HEADS, KEY_HEADS))
    named = {"mrope_section": [0, 0, 0], "rotary_mode": "half"}
    return (positions, query, key, cache, HEAD_SIZE), named


def scatter_arguments(generator: torch.Generator) -> Arguments:
    """Of writing to the cache."""
    key, value = (normal(generator, 33, KEY_HEADS, HEAD_SIZE) for _ in range(2))
    caches = [torch.zeros(4, BLOCK_SIZE, KEY_HEADS, HEAD_SIZE).bfloat16() for _ in range(2)]
    slots = torch.randperm(4 * BLOCK_SIZE, generator=generator)[:33]
    return (key, value, *caches, slots), {"cache_mode": "Norm"}


def attention_arguments(generator: torch.Generator) -> Arguments:
    """Of one step with a chunk of a prompt, a whole one and a decode."""
    pages = [normal(generator, 10, BLOCK_SIZE, KEY_HEADS * HEAD_SIZE) for _ in range(2)]
    table = torch.randperm(10, generator=generator).int()[:9].view(3, 3)
    return (normal(generator, 10, HEADS, HEAD_SIZE), *pages), {
        "atten_mask": causal_mask(torch.device("cpu")),
        "actual_seq_qlen": [4, 9, 10],
        "actual_seq_kvlen": [200, 5, 300],
        "block_table": table,
        "num_query_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "softmax_scale": HEAD_SIZE**-0.5,
        "input_layout": "TND",
        "sparse_mode": RIGHT_DOWN_CAUSAL,
        "block_size": BLOCK_SIZE,
    }


def window_arguments(generator: torch.Generator) -> Arguments:
    """The same step, in a window of 100 keys."""
    positional, named = attention_arguments(generator)
    return positional, {**named, "sparse_mode": BAND, "pre_tokens": 99, "next_tokens": 0}


def angles(generator: torch.Generator, num_tokens: int) -> list[torch.Tensor]:
    """Cosines and sines, [1, 1, tokens, 64] each."""
    half = torch.rand(1, 1, num_tokens, ROPE_SIZE // 2, generator=generator) * 6
    return [torch.cat((one, one), -1).bfloat16() for one in (half.cos(), half.sin())]


def interleaved_arguments(generator: torch.Generator) -> Arguments:
    """Of turning the queries' ropes, with angles for each token."""
    by_token = [one.view(33, 1, 1, ROPE_SIZE) for one in angles(generator, 33)]
    return (normal(generator, 33, HEADS, 1, ROPE_SIZE), *by_token), {}


def written_arguments(generator: torch.Generator) -> Arguments:
    """Of writing latents and ropes to their caches."""
    states = normal(generator, 1, 1, 33, LATENT_SIZE + ROPE_SIZE), normal(generator, LATENT_SIZE)
    slots = torch.randperm(4 * BLOCK_SIZE, generator=generator)[:33]
    caches = [torch.zeros(4, BLOCK_SIZE, 1, n).bfloat16() for n in (ROPE_SIZE, LATENT_SIZE)]
    return (*states, *angles(generator, 33), slots, *caches), {"cache_mode": "PA_BNSD"}


def latent_arguments(generator: torch.Generator) -> Arguments:
    """Of two decodes with latent attention."""
    latents = normal(generator, 6, BLOCK_SIZE, 512)
    return (normal(generator, 2, HEADS, 512), latents, latents), {
        "query_rope": normal(generator, 2, HEADS, 64),
        "key_rope": normal(generator, 6, BLOCK_SIZE, 64),
        "actual_seq_qlen": [1, 2],
        "actual_seq_kvlen": [200, 5],
        "block_table": torch.randperm(6, generator=generator).int().view(2, 3),
        "num_query_heads": HEADS,
        "num_key_value_heads": 1,
        "softmax_scale": 576**-0.5,
        "input_layout": "TND",
        "block_size": BLOCK_SIZE,
    }


def prefill_arguments(generator: torch.Generator) -> Arguments:
    """Of two prompts with latent attention, keys and values made."""
    query, query_rope = normal(generator, 9, HEADS, 128), normal(generator, 9, HEADS, 64)
    key, value = (normal(generator, 205, HEADS, 128) for _ in range(2))
    return (query, key, value), {
        "query_rope": query_rope,
        "key_rope": normal(generator, 205, HEADS, 64),
        "atten_mask": causal_mask(torch.device("cpu")),
        "actual_seq_qlen": [4, 9],
        "actual_seq_kvlen": [200, 205],
        "num_query_heads": HEADS,
        "num_key_value_heads": HEADS,
        "softmax_scale": 192**-0.5,
        "input_layout": "TND",
        "sparse_mode": RIGHT_DOWN_CAUSAL,
    }


def gating_arguments(generator: torch.Generator) -> Arguments:
    """Of choosing experts by grouped sigmoid."""
    logits, bias = (
        torch.randn(shape, generator=generator) for shape in ((33, EXPERTS), (EXPERTS,))
    )
    return (logits,), {
        "k": CHOSEN,
        "bias": bias,
        "k_group": 2,
        "group_count": 4,
        "group_select_mode": 1,
        "norm_type": 1,
    }


def routing_arguments(generator: torch.Generator) -> Arguments:
    """Of sorting rows by expert."""
    choices = torch.rand(33, EXPERTS, generator=generator).topk(CHOSEN).indices.int()
    return (normal(generator, 33, HIDDEN), choices), {
        "active_num": choices.numel(),
        "expert_num": EXPERTS,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, EXPERTS],
        "quant_mode": -1,
        "row_idx_type": 0,
    }


def grouped_arguments(generator: torch.Generator) -> Arguments:
    """Of the grouped product, the weight transposed as it is in a layer."""
    weight = normal(generator, EXPERTS, 256, HIDDEN) / HIDDEN**0.5
    counts = torch.randint(0, EXPERTS, (66,), generator=generator).bincount(minlength=EXPERTS)
    return ([normal(generator, 66, HIDDEN)], [weight.transpose(1, 2)]), {
        "group_list": counts,
        "split_item": 2,
        "group_type": 0,
        "group_list_type": 1,
    }


def filter_arguments(generator: torch.Generator) -> Arguments:
    """Of top-k and top-p, a few requests over a vocabulary."""
    logits = torch.randn(5, VOCABULARY, generator=generator)
    p = torch.tensor([0.9, 1.0, 0.5, 0.99, 0.1])
    k = torch.tensor([50, 1024, 1, 20, 300], dtype=torch.int32)
    return (logits, p, k), {}


def sum_arguments(generator: torch.Generator) -> Arguments:
    """Of summing rows back into tokens."""
    places = torch.randperm(66, generator=generator).int()
    probs = torch.rand(33, CHOSEN, generator=generator).bfloat16()
    return (normal(generator, 66, HIDDEN), places), {"probs": probs}


ATTENTION = "npu_fused_infer_attention_score_v2"
CASES = (
    Case("npu_rms_norm", f"33 x {HIDDEN}", norm_arguments, 2),
    Case("npu_add_rms_norm", f"33 x {HIDDEN}", add_norm_arguments, 3),
    Case("npu_swiglu", f"33 x {HIDDEN}", lambda g: ((normal(g, 33, HIDDEN),), {"dim": -1})),
    Case("npu_mrope", f"33 x {HEADS}, {KEY_HEADS} x {HEAD_SIZE}", rotary_arguments, 2),
    Case("npu_scatter_pa_kv_cache", "33 slots of 512", scatter_arguments, written=(2, 3)),
    Case(ATTENTION, "paged: 4 of 200, 5 of 5, 1 of 300", attention_arguments),
    Case(ATTENTION, "in a window of 100: 4 of 200, 5 of 5, 1 of 300", window_arguments),
    Case("npu_interleave_rope", f"33 x {HEADS} x {ROPE_SIZE}", interleaved_arguments),
    Case("npu_kv_rmsnorm_rope_cache", "33 slots of 512", written_arguments, written=(5, 6)),
    Case(ATTENTION, "latent: 1 of 200, 1 of 5", latent_arguments),
    Case(ATTENTION, "packed: 4 of 200, 5 of 5", prefill_arguments),
    Case("npu_moe_gating_top_k", f"33 x {EXPERTS}, {CHOSEN}", gating_arguments, 2),
    Case("npu_moe_init_routing_v2", f"33 x {CHOSEN} of {EXPERTS}", routing_arguments, 3),
    Case("npu_grouped_matmul", f"66 x {HIDDEN} x 256", grouped_arguments),
    Case("npu_moe_token_unpermute", f"33 x {CHOSEN}", sum_arguments),
    Case("npu_top_k_top_p", f"5 x {VOCABULARY}", filter_arguments),
)


def check_operators(cases: Sequence[Case] = CASES) -> Iterator[Check]:
    """Run each case on the current device and on the host."""
    for case in cases:
        positional, named = case.arguments(torch.Generator().manual_seed(0))
        here = tree_map(to_device, (positional, named))
        operator = getattr(torch.ops.npu, case.operator)
        try:
            results = operator(*here[0], **here[1])
            time_us = timed_us(operator, *here)
        except (RuntimeError, NotImplementedError) as refusal:  # what the device says to a call
            yield Check(case.operator, case.what, problem=str(refusal).partition("\n")[0])
            continue
        expected = EMULATED[case.operator](*positional, **named)
        if case.written:
            results, expected = ([one[at] for at in case.written] for one in (here[0], positional))
        found, wanted = tree_leaves(results), tree_leaves(expected)
        count = len(case.written) or case.num_compared
        pairs = zip(found[:count], wanted[:count], strict=True)
        error = largest([error_of(a.cpu(), b) for a, b in pairs])
        yield Check(case.operator, case.what, error, ROUNDING, time_us)


def to_device(value: Any) -> Any:
    """A tensor on the device with the same strides; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="npu")
    return there.copy_(value)


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to 1 + the expected value's size; NaN where one is."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    difference = (found.double() - wanted.double()).abs() / (1 + wanted.double().abs())
    difference = difference.masked_fill(found == wanted, 0.0)  # infinities among them
    return float(difference.max()) if difference.numel() else 0.0


def largest(errors: Sequence[float]) -> float:
    """The largest, or what is not a number, which `max` would pass over."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def timed_us(
    operator: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]
) -> float:
    """One of `NUM_TIMED` calls behind one another, by the device's clock."""
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(NUM_TIMED):
        operator(*positional, **named)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / NUM_TIMED
