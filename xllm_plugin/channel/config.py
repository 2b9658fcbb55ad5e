"""Settings of the channel: ``--additional-config '{"xllm": {"channel": {...}}}'``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["INSTANCE_ID_PATTERN", "ChannelConfig"]

# The id becomes part of a file name, and a socket's whole path has at most 107 bytes.
INSTANCE_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"


class ChannelConfig(BaseModel):
    """How an engine can be watched and steered while it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Open the socket.  Without it `/metrics` lacks our additions and `xllm top` sees nothing."""

    directory: Path | None = None
    """Where sockets live; None means `$XDG_RUNTIME_DIR/xllm`, else `<tempdir>/xllm-<uid>`.  It must
    belong to the user with mode 0700 and is created so.  `xllm top --socket DIRECTORY` finds it."""

    snapshot_interval_ms: float = Field(default=100.0, ge=0)
    """At most one snapshot in this time; 0 publishes after every step.  A tenth of a second is
    finer than any scrape or display, and makes the cost per step vanish."""

    instance_id: str = Field(default="", pattern=rf"^({INSTANCE_ID_PATTERN})?$")
    """Names this engine's sockets.  Empty means vLLM's own `VllmConfig.instance_id`, another at
    each start.  Set it for a socket path that stays the same from start to start."""

    def resolve_instance_id(self, vllm_instance_id: str) -> str:
        """The id that is in force, given vLLM's `VllmConfig.instance_id`."""
        return self.instance_id or vllm_instance_id
