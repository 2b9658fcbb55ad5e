"""What an engine with an elastic KV cache says of it, without an engine."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from xllm_plugin.xtensor.messages import MemorySection

__all__ = ["memory_section"]

_SECTION = MemorySection(
    block_bytes=500,
    slab_blocks=2,
    num_slabs=10,
    budget_slabs=8,
    min_budget_slabs=3,
    num_resident_slabs=5,
    num_draining_slabs=1,
    num_used_blocks=5,
    num_cached_blocks=3,
)


def memory_section(**changes: Any) -> MemorySection:
    """A section of ten slabs of two blocks of 500 bytes, half of them resident; or with changes."""
    return structs.replace(_SECTION, **changes)
