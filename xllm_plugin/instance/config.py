"""Settings of admission: ``--additional-config '{"xllm": {"admission": {...}}}'``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AdmissionConfig", "QueueBounds"]


class QueueBounds(BaseModel):
    """How much may wait for its first token, in one API server and of one class."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_requests: int | None = Field(default=None, ge=1)
    """Requests; None for no bound, as in vLLM."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of their prompts; None for no bound.  One request may exceed it in an empty queue."""


class AdmissionConfig(BaseModel):
    """Which requests are refused with 429.  By default none: a drop-in server admits all."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    at_risk: Literal["admit", "refuse"] = "admit"
    """What happens to an online request that is not expected to keep its TTFT: `admit` it, and say
    so in a header of the answer, or `refuse` it.  `refuse` needs `scheduler.policy=slo`, whose
    step-time model tells what to expect."""

    online: QueueBounds = QueueBounds()
    """Bounds for requests that somebody waits for."""

    offline: QueueBounds = QueueBounds()
    """Bounds for requests that nobody waits for."""

    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Tenant -> weight.  The bounds above, and with `refuse` the time that a promise leaves, are
    shared in these proportions among the tenants that are there.  All tenants not named are one,
    `*`, of weight 1: else a client could win by inventing names.  Empty: no shares."""
