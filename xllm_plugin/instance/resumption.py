"""The wire model of `POST /v1/xllm/resume`: what the service sends to have a stream continued.

It imports neither torch nor vLLM, so that the service can share it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["REASON_HEADER", "RESUME_PATH", "Finish", "Resumption"]

RESUME_PATH = "/v1/xllm/resume"
"""Under /v1, because vLLM's `--api-key` guards that prefix; generating is not only reading."""
REASON_HEADER = "x-xllm-reason"
"""Of an answer that is no stream: why it is none, in one line of ASCII."""


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """How the stream had already ended when its instance died.

    Attributes:
        finish_reason: of the choice, as the client has got it.
        stop_reason: likewise; a stop string or a token id.
        num_events: events that the client got after the one with the finish reason.
    """

    finish_reason: str
    stop_reason: int | str | None = None
    num_events: int = 0


class Resumption(msgspec.Struct, frozen=True, kw_only=True):
    """A stream that has begun elsewhere.

    Attributes:
        path: of the original request.
        body: of the original request, as it was sent to the first instance.
        id: of the answer.
        created: of the answer, seconds since the epoch.
        chunks: output token ids that the client has got, one list an event.
        num_opening_events: events without tokens that it got before the first of these.
        finish: how the choice ended, if it has.
    """

    path: Literal["/v1/completions", "/v1/chat/completions"]
    body: msgspec.Raw
    id: str
    created: int
    chunks: list[list[int]]
    num_opening_events: int = 0
    finish: Finish | None = None

    @property
    def num_tokens(self) -> int:
        """How many output tokens the client has got."""
        return sum(map(len, self.chunks))

    @property
    def num_skipped(self) -> int:
        """Events that come after the replayed tokens, and that the client has got too."""
        if self.finish is not None:
            return self.finish.num_events
        return 0 if self.chunks else self.num_opening_events
