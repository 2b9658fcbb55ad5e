"""Settings of graph mode: ``--additional-config '{"xllm": {"graph": {...}}}'``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["GraphConfig"]


class GraphConfig(BaseModel):
    """How a model's work is put together."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mode: Literal["auto", "partial", "off"] = "auto"
    """`auto`: the device family's own graphs where it has them for this model (on a CPU: all
    decoder layers as one call of native code), else vLLM's compilation.  `partial`: the same, but
    attention stays vLLM's.  `off`: vLLM's compilation."""
