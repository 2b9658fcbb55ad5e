"""Settings of the engine's process: ``--additional-config '{"xllm": {"engine": {...}}}'``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

__all__ = ["EngineConfig"]


class EngineConfig(BaseModel):
    """How an engine's process starts, and where its weights go while it sleeps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fork: bool = True
    """Fork it from the server's, where that is safe (on a CPU, with one rank): what the server has
    imported is then there.  Off: start a new interpreter, which imports it again."""

    sleep_dir: Path | None = None
    """Holds the weights of an engine that sleeps at level 1, in a file without a name.  It has to
    be on a disk: in a file system in memory the weights would take memory.  None: `sleep` in the
    cache of models."""
