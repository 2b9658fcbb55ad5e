"""Is attention faster where a request's KV lies in a row?  See README.md beside this file."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from xllm_plugin import shims
from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.schema import Check, Figure, Peer, Row

NAME = "xtensor_contiguous"
QUESTION = "Is a step's attention faster where the KV of a request lies in a row?"

BLOCK_TOKENS = 128
CONTEXTS, QUICK_CONTEXTS = (1024, 2048, 4096, 8192), (1024, 8192)
REQUESTS, QUICK_REQUESTS = (1, 8), (1,)
REPEATS, QUICK_REPEATS = 15, 3
WORKING_SET_BYTES = 256 * 2**20
"""So much KV is read in a pass at least, over as many layers as that takes: more than the caches
hold, as in a model."""
TOLERANCE: Final = 0.02
"""Of outputs in bfloat16 between kernels; those of one kernel are equal bit by bit."""

SCATTERED, IN_A_ROW, TABLE_FREE = "paged, scattered", "paged, in a row", "table-free"
FORMS: Final[Mapping[str, str]] = {
    SCATTERED: "vLLM's paged kernel; the blocks of a request are anywhere, as after much traffic",
    IN_A_ROW: "the same kernel; the blocks of a request are consecutive",
    TABLE_FREE: "torch's scaled_dot_product_attention over one range a request; reads no table",
}


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's attention."""

    model: str
    num_heads: int
    num_kv_heads: int
    size: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer, in bfloat16."""
        return 2 * 2 * self.num_kv_heads * self.size


MODELS: Final = (
    Heads("SmolLM2-135M", num_heads=9, num_kv_heads=3, size=64),
    Heads("Llama-3.1-8B", num_heads=32, num_kv_heads=8, size=128),
)


class Case:
    """The KV of some requests in some layers, in all forms, and one query for each request.

    Args:
        ops: vLLM's `_custom_ops`.
        isa: which of its kernels reads and writes the cache.
        heads: of each layer.
        context: tokens of each request.
        num_requests: that decode together.
    """

    def __init__(self, ops: Any, isa: str, heads: Heads, context: int, num_requests: int) -> None:
        self._ops, self._isa, self._heads = ops, isa, heads
        layer_bytes = num_requests * context * heads.token_bytes
        self.num_layers = max(1, math.ceil(WORKING_SET_BYTES / layer_bytes))
        blocks = torch.arange(num_requests * context // BLOCK_TOKENS, dtype=torch.int32)
        shuffled = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
        self._tables = {
            IN_A_ROW: blocks.view(num_requests, -1),
            SCATTERED: shuffled.view(num_requests, -1).contiguous(),
        }
        self._lengths = torch.full((num_requests,), context, dtype=torch.int32)
        self._starts = torch.arange(num_requests + 1, dtype=torch.int32)
        self._metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=num_requests,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.size,
            seq_lens=self._lengths,
            dtype=torch.bfloat16,
            query_start_loc=self._starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        self._query = torch.randn(num_requests, heads.num_heads, heads.size).bfloat16()
        self._out = torch.empty_like(self._query)
        shape = (num_requests, heads.num_kv_heads, context, heads.size)
        self._plain = [
            (torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16())
            for _ in range(self.num_layers)
        ]
        self._caches = {
            form: [self._paged(keys, values, table) for keys, values in self._plain]
            for form, table in self._tables.items()
        }

    def _paged(
        self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's cache of one layer, [blocks, heads, tokens, size] for keys and for values."""
        heads = self._heads
        cache = torch.zeros(
            table.numel(), heads.num_kv_heads, 2 * BLOCK_TOKENS, heads.size, dtype=torch.bfloat16
        )
        key_cache, value_cache = cache.chunk(2, dim=2)
        slots = table.long()[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
        self._ops.cpu_attn_reshape_and_cache(
            keys.transpose(1, 2).reshape(-1, heads.num_kv_heads, heads.size),
            values.transpose(1, 2).reshape(-1, heads.num_kv_heads, heads.size),
            key_cache,
            value_cache,
            slots.flatten(),
            self._isa,
        )
        return key_cache, value_cache

    def attend(self, form: str, layer: int) -> torch.Tensor:
        """The output of one layer, [requests, heads, size]."""
        if form == TABLE_FREE:
            return self._attend_plain(layer)
        key_cache, value_cache = self._caches[form][layer]
        self._ops.cpu_attention_with_kv_cache(
            query=self._query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=self._out,
            query_start_loc=self._starts,
            seq_lens=self._lengths,
            scale=self._heads.size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._tables[form],
            softcap=0.0,
            scheduler_metadata=self._metadata,
            s_aux=None,
        )
        return self._out

    def _attend_plain(self, layer: int) -> torch.Tensor:
        # The queries that share a head of keys are rows of one product, as in the paged kernel.
        heads = self._heads
        grouped = self._query.view(len(self._query), heads.num_kv_heads, -1, heads.size)
        return scaled_dot_product_attention(grouped, *self._plain[layer]).view_as(self._query)

    def pass_us(self, form: str) -> float:
        """Microseconds a layer, of one pass over all layers."""
        started_s = time.perf_counter()
        for layer in range(self.num_layers):
            self.attend(form, layer)
        return (time.perf_counter() - started_s) / self.num_layers * 1e6

    def differences(self) -> tuple[float, float]:
        """The largest between the two tables' outputs, and to the table-free one."""
        between = beside = 0.0
        for layer in range(self.num_layers):
            scattered, row = (self.attend(form, layer).clone() for form in (SCATTERED, IN_A_ROW))
            plain = self.attend(TABLE_FREE, layer)
            between = max(between, float((scattered - row).abs().max()))
            beside = max(beside, float((scattered - plain).abs().max()))
        return between, beside


@dataclass(frozen=True, slots=True)
class Measured:
    """One case: microseconds a layer by form, one entry a repeat; and how outputs differed."""

    heads: Heads
    context: int
    num_requests: int
    times_us: dict[str, list[float]]
    differences: tuple[float, float]


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    """Interleave the forms; every repeat begins with another one.  The first round warms up."""
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for repeat in range(-1, repeats):
        turn = max(repeat, 0) % len(FORMS)
        for form in [*FORMS][turn:] + [*FORMS][:turn]:
            spent_us = case.pass_us(form)
            if repeat >= 0:
                times[form].append(spent_us)
    return times


def rows(measured: Sequence[Measured]) -> list[Row]:
    """A table a model; ratios are taken within a repeat."""
    found = []
    for one in measured:
        times = one.times_us
        figures = [Figure.of(form, "us", times[form]) for form in FORMS]
        figures += [
            Figure.ratio(f"{form} / scattered", times[form], times[SCATTERED])
            for form in (IN_A_ROW, TABLE_FREE)
        ]
        found.append(
            Row(
                table=f"One layer of {one.heads.model} ({one.heads.num_heads} heads, "
                f"{one.heads.num_kv_heads} of keys, size {one.heads.size})",
                labels={"context": str(one.context), "requests": str(one.num_requests)},
                figures=tuple(figures),
            )
        )
    return found


def checks(measured: Sequence[Measured]) -> list[Check]:
    """All forms compute the same."""
    between = max(one.differences[0] for one in measured)
    beside = max(one.differences[1] for one in measured)
    return [
        Check(
            name="the same kernel gives the same bits with either table",
            passed=between == 0,
            detail=f"largest difference {between:g}",
        ),
        Check(
            name=f"the table-free kernel gives the same within {TOLERANCE:g}",
            passed=beside <= TOLERANCE,
            detail=f"largest difference {beside:.2g}",
        ),
    ]


def notes(isa: str) -> tuple[str, ...]:
    """How to read the figures."""
    return (
        (
            f"Decode: one query a request; bfloat16; blocks of {BLOCK_TOKENS} tokens; vLLM's "
            f"kernel {isa!r}, {torch.get_num_threads()} threads. Microseconds a layer, over as "
            f"many layers as hold {WORKING_SET_BYTES // 2**20} MiB of KV, so that keys and values "
            "come from memory."
        ),
        "All forms take turns in every repeat; ratios are taken within a repeat.",
        (
            "table-free has its keys and values in the order that it reads best, of its own: "
            "vLLM's kernel packs keys for its tiles."
        ),
    )


NOT_SHOWN = (
    "Prefill, where the products and not the reading of KV take the time.",
    (
        "The native layers' attention (xllm_plugin/cpu/native/attention.h), which looks a block up "
        "once for all its tokens, as vLLM's kernel does."
    ),
    "What moving a growing request to a larger range would cost, and accelerators.",
)


def load_kernels() -> tuple[Any, str]:
    """vLLM's operators, and the name of the kernel that it takes for these shapes."""
    os.environ.setdefault("XLLM_PLATFORM", "native")  # only its operators are wanted
    shims.install()
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return ops, _get_attn_isa(torch.bfloat16, BLOCK_TOKENS, MODELS[0].size)


@click.command(NAME)
@common_options(NAME)
@click.option("--repeats", type=click.IntRange(min=1), help=f"[default: {REPEATS}]")
def command(*, quick: bool, json_path: Path, repeats: int | None) -> None:
    """Is a step's attention faster where the KV of a request lies in a row?

    Runs kernels alone, without an engine; needs about 2 GiB.  Takes about two minutes.
    """
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    ops, isa = load_kernels()
    num_repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    cases = [
        (heads, context, num_requests)
        for heads in MODELS
        for context in (QUICK_CONTEXTS if quick else CONTEXTS)
        for num_requests in (QUICK_REQUESTS if quick else REQUESTS)
    ]
    measured = []
    with Reporter(console, len(cases), first="attention") as reporter, torch.inference_mode():
        for heads, context, num_requests in cases:
            reporter.doing(f"{heads.model}, {context} tokens, {num_requests} requests")
            torch.manual_seed(0)
            case = Case(ops, isa, heads, context, num_requests)
            times = measure(case, num_repeats)
            measured.append(Measured(heads, context, num_requests, times, case.differences()))
            reporter.done()
    result = run.finish(
        peers=[Peer(name=form, what=what) for form, what in FORMS.items()],
        rows=rows(measured),
        checks=checks(measured),
        notes=notes(isa),
        not_shown=NOT_SHOWN,
    )
    conclude(result, json_path, console)
