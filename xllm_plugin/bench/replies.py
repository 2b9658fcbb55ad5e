"""How a benchmark's child process answers: one JSON object a line, and nothing else there."""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

__all__ = ["reply", "take_stdout"]


def take_stdout() -> IO[str]:
    """Keep standard output for replies and send what libraries print to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def reply(replies: IO[str], message: dict[str, Any]) -> None:
    """Answer with one line."""
    print(json.dumps(message), file=replies, flush=True)
