"""Setting a KV cache up: with zeros written at start, as stock vLLM does, or without."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from xllm_plugin.bench.engine_memory import kv_bytes_per_token, resident
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.cpu.kv_cache import ElasticBuffer, ZeroOnFirstUse, elastic_memory
from xllm_plugin.xtensor.config import XTensorConfig
from xllm_plugin.xtensor.layout import Column, KVLayout

__all__ = ["FORMS", "STOCK", "SetUp", "checks", "figures", "layout_of", "measure"]

SIZE_BYTES: Final = 2 * 2**30
BLOCK_TOKENS: Final = 128
"""vLLM's default on a CPU."""
AT_MOST: Final = 0.05
"""Of stock's time, and of the cache's bytes."""

STOCK, FIXED, ELASTIC = "zeros written (stock)", "fixed", "elastic"


@dataclass(slots=True)
class SetUp:
    """One form of a KV cache, one entry a repeat.

    Attributes:
        times_ms: until the buffer could be used.
        resident_bytes: that this process had more afterwards.
    """

    times_ms: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)


def layout_of(model: Path, size_bytes: int = SIZE_BYTES) -> KVLayout:
    """vLLM's KV buffer for a dense model in 16 bits, a column a layer, of about that size."""
    num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    block_bytes = kv_bytes_per_token(model) * BLOCK_TOKENS
    num_blocks, stride = size_bytes // block_bytes, block_bytes // num_layers
    columns = (Column(layer * num_blocks * stride, stride) for layer in range(num_layers))
    return KVLayout(num_blocks, tuple(columns))


def zeros(num_bytes: int) -> torch.Tensor:
    """As vLLM allocates its KV buffer (vllm/v1/worker/utils.py, `allocate_kv_cache`)."""
    return torch.zeros(num_bytes, dtype=torch.int8, device=torch.device("cpu"))


@contextmanager
def _written(layout: KVLayout) -> Iterator[torch.Tensor]:
    cache = zeros(layout.num_bytes)  # held until the block ends
    yield cache


@contextmanager
def _on_first_use(layout: KVLayout) -> Iterator[torch.Tensor]:
    with ZeroOnFirstUse():
        cache = zeros(layout.num_bytes)
    yield cache


@contextmanager
def _elastic(layout: KVLayout) -> Iterator[torch.Tensor]:
    memory, driver = elastic_memory(layout, XTensorConfig(enabled=True), full_blocks=1)
    with ElasticBuffer(memory, driver):
        cache = zeros(memory.range.layout.num_bytes)
    yield cache
    driver.close()


FORMS: Final = {STOCK: _written, FIXED: _on_first_use, ELASTIC: _elastic}


def measure(
    layout: KVLayout, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, SetUp]:
    """Set each form up in turn, every repeat beginning with another one, and give it back."""
    found = {form: SetUp() for form in FORMS}
    names = list(FORMS)
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            before_bytes = resident(os.getpid()).all_bytes
            started_s = clock()
            with FORMS[name](layout):
                found[name].times_ms.append((clock() - started_s) * 1e3)
                now_bytes = resident(os.getpid()).all_bytes
                found[name].resident_bytes.append(max(0, now_bytes - before_bytes))
    return found


def figures(found: Mapping[str, SetUp], layout: KVLayout) -> list[Row]:
    """A line a form."""
    size = f"{layout.num_bytes / 2**30:.1f} GiB"
    return [
        Row(
            table=f"KV set-up at start, {size}",
            labels={"KV cache": form},
            figures=(
                Figure.of("ready after", "ms", one.times_ms),
                Figure.of("resident then", "MiB", [n / 2**20 for n in one.resident_bytes]),
            ),
        )
        for form, one in found.items()
    ]


def checks(found: Mapping[str, SetUp], layout: KVLayout) -> list[Check]:
    """Neither of ours writes the cache before it is used."""
    stock_ms = _median(found[STOCK].times_ms)
    ours = [found[form] for form in (FIXED, ELASTIC)]
    slowest_ms = max(_median(one.times_ms) for one in ours)
    most_bytes = max(_median(one.resident_bytes) for one in ours)
    return [
        Check(
            name=f"KV set-up: at most {AT_MOST:.0%} of the time that writing zeros takes",
            passed=slowest_ms <= AT_MOST * stock_ms,
            detail=f"{slowest_ms:.1f} and {stock_ms:.0f} ms, by medians",
        ),
        Check(
            name=f"KV set-up: at most {AT_MOST:.0%} of the cache is resident then",
            passed=most_bytes <= AT_MOST * layout.num_bytes,
            detail=f"{most_bytes / 2**20:.1f} of {layout.num_bytes / 2**20:.0f} MiB",
        ),
    ]


def _median(values: Sequence[float]) -> float:
    return Figure.of("", "", values).median
