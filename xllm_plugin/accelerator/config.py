"""Settings of the engine's process: ``--additional-config '{"xllm": {"engine": {...}}}'``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["EngineConfig"]


class EngineConfig(BaseModel):
    """How a server starts its engine's process."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fork: bool = True
    """Fork it from the server's, where that is safe (on a CPU, with one rank): what the server has
    imported is then there.  Off: start a new interpreter, which imports it again."""
