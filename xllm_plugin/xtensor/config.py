"""Settings of elastic KV memory: ``--additional-config '{"xllm": {"xtensor": {...}}}'``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["XTensorConfig"]


class XTensorConfig(BaseModel):
    """How the KV cache's memory follows what is kept in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = False
    """The KV cache takes memory where blocks are in use or cached, and gives it back.  The size
    that vLLM is given (`--kv-cache-memory-bytes`) is then the most that it may ever take."""

    budget_bytes: int | None = Field(default=None, ge=0)
    """The most that it takes from the start on; a control call changes it later.  None: all."""

    slab_blocks: int = Field(default=0, ge=0)
    """Consecutive blocks whose memory comes and goes together.  0: the fewest with which the
    number of mappings stays within half of Linux's default limit."""

    cache_idle_s: float = Field(default=60.0, ge=0)
    """Cached blocks that no request has used for so long are dropped, when their whole slab is
    unused."""

    keep_idle_s: float = Field(default=10.0, ge=0)
    """Memory given back stays mapped for so long, for the next one who needs it, and then returns
    to the system."""

    premap_slabs: int = Field(default=1, ge=0)
    """So many slabs are mapped ahead, by a thread beside the steps."""
