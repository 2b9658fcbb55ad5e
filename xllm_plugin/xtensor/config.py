"""Settings of elastic KV memory: ``--additional-config '{"xllm": {"xtensor": {...}}}'``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["XTensorConfig", "form_refusal", "pool_refusal"]


class XTensorConfig(BaseModel):
    """How the KV cache's memory follows what is kept in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = False
    """The KV cache takes memory where blocks are in use or cached, and gives it back.  The size
    that vLLM is given (`--kv-cache-memory-bytes`) is then the most that it may ever take."""

    form: Literal["paged", "contiguous"] = "paged"
    """Where the blocks of a request lie.  `paged`: anywhere.  `contiguous`: in a row, in a range of
    addresses of its own, which shows whole slabs of a prefix that it shares with others."""

    budget_bytes: int | None = Field(default=None, ge=0)
    """The most that it takes from the start on; a control call changes it later.  None: all."""

    pool: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Servers of this user with the same name share one budget; each then leases what it needs, up
    to `budget_bytes`.  None: the budget is this server's alone."""

    pool_bytes: int | None = Field(default=None, gt=0)
    """What all servers in the pool together may take.  The first one says it, the others say the
    same or nothing."""

    min_bytes: int | None = Field(default=None, ge=0)
    """What this server can always take of the pool.  None: one request of full length, which is
    also the least."""

    pool_wait_s: float = Field(default=60.0, ge=0)
    """How long a start waits for its minimum, while others still use it."""

    slab_blocks: int = Field(default=0, ge=0)
    """Consecutive blocks whose memory comes and goes together.  0: the fewest with which the
    number of mappings stays within half of Linux's default limit; with `form=contiguous` also if
    each is shown once more.  Rounded up to whole pages of the
    system, which matters where a block is none (latent attention: two blocks)."""

    cache_idle_s: float = Field(default=300.0, ge=0)
    """Cached blocks that no request has used for so long are dropped, when their whole slab is
    unused.  Five minutes, for which hosted APIs keep prompts: a chat's next turn comes within."""

    keep_idle_s: float = Field(default=10.0, ge=0)
    """Memory given back stays mapped for so long, for the next one who needs it, and then returns
    to the system."""

    premap_slabs: int = Field(default=1, ge=0)
    """So many slabs are mapped ahead, by a thread beside the steps."""


def form_refusal(config: XTensorConfig) -> str | None:
    """Why settings do not go with `form`, whatever their sources, or None."""
    if config.form == "paged":
        return None
    if not config.enabled:
        return f"xtensor.form={config.form} needs xtensor.enabled=true"
    if config.pool is not None:
        return (
            f"xtensor.form={config.form} does not go with xtensor.pool={config.pool}; leave the "
            "pool, or use xtensor.form=paged"
        )
    return None


def pool_refusal(config: XTensorConfig) -> str | None:
    """Why settings about a shared pool do not go together, whatever their sources, or None."""
    given = [name for name in ("pool_bytes", "min_bytes") if getattr(config, name) is not None]
    if config.pool is None:
        return f"xtensor.{given[0]} is set and xtensor.pool is not; name a pool" if given else None
    if not config.enabled:
        return f"xtensor.pool={config.pool} needs xtensor.enabled=true"
    least, most = config.min_bytes, config.budget_bytes
    if least is not None and most is not None and least > most:
        return f"xtensor.min_bytes={least} is more than xtensor.budget_bytes={most}"
    return None
