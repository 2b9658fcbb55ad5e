"""What a line of the access log says.  Its fields are described in README.md beside this file."""

from __future__ import annotations

import msgspec

__all__ = ["AccessLine"]


class AccessLine(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One request that has ended, as JSON has it."""

    time: float
    id: str
    response_id: str | None
    client: str
    method: str
    path: str
    status: int
    ending: str
    model: str | None
    instance: str | None
    instances: list[str]
    tenant: str | None
    cause: str | None
    continued: int
    request_bytes: int
    response_bytes: int
    prompt_tokens: int | None
    output_tokens: int | None
    queue_ms: float | None
    ttft_ms: float | None
    duration_ms: float
