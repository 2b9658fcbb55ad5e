"""Settings of graph mode: ``--additional-config '{"xllm": {"graph": {...}}}'``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["GraphConfig"]


class GraphConfig(BaseModel):
    """How a model's work is put together."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mode: Literal["auto", "partial", "off"] = "auto"
    """`auto`: the device family's own graphs where it has them for this model, else vLLM's
    compilation.  `partial`: the same, but attention stays vLLM's.  `off`: vLLM's compilation,
    before the first answer."""

    native_layers: bool = True
    """CPU: decoder layers of known models run as native code."""

    background_compile: bool = True
    """CPU: models without native layers answer at once, while a child process of the lowest
    priority compiles them; the result is kept on disk.  False: vLLM compiles before it answers."""

    max_tokens: int = Field(default=2048, ge=1)
    """Larger batches run eager on devices that capture fixed shapes: they are busy anyhow."""

    max_padding: float = Field(default=0.25, ge=0, le=0.5)
    """The largest part of a graph's tokens that may be padding."""

    max_graphs: int = Field(default=32, ge=1)
    """Captured at once; some devices run out of streams (Ascend) long before memory."""

    memory_bytes: int = Field(default=2**30, ge=0)
    """For all captured graphs together."""

    min_uses: int = Field(default=16, ge=1)
    """A graph is captured once it would have been used so often lately; a capture costs some tens
    of steps."""

    replan_steps: int = Field(default=512, ge=1)
    """How often the sizes worth a graph are learned anew; counts halve each time."""
