"""How many tokens an answer has used: as it says itself, else as far as was seen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm_plugin.service.exchange import Exchange

__all__ = ["UsageMeter"]

_TAIL_BYTES = 4096
_SUCCESS = range(200, 300)
_CLIENT_GONE = 499
# Within strings of JSON quotes are escaped, so generated text cannot look like these.
_TOTAL = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')
_PARTS = (
    re.compile(rb'"input_tokens"\s*:\s*(\d{1,12})'),
    re.compile(rb'"output_tokens"\s*:\s*(\d{1,12})'),
)
_EVENT = b"data: "


class UsageMeter:
    """Follows one answer."""

    __slots__ = ("_num_events", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._num_events = 0

    def observe(self, data: bytes) -> None:
        """A part of the answer's body was passed on."""
        self._num_events += data.count(_EVENT)
        self._tail = data[-_TAIL_BYTES:] if len(data) >= _TAIL_BYTES else self._joined(data)

    def num_tokens(self, exchange: Exchange, prompt_tokens: int) -> int:
        """Prompt and output together.

        What the answer says of itself counts.  Else the tokens of an armed stream are known, and
        of others each event is taken for one token.  An error has used none.

        Args:
            exchange: whose answer has ended.
            prompt_tokens: estimated, for a prompt that nobody has counted.
        """
        if exchange.status not in _SUCCESS:
            was_sent = exchange.status == _CLIENT_GONE and exchange.sent_s > 0
            return prompt_tokens if was_sent else 0
        said = self._said()
        if said is not None:
            return said
        stream = exchange.stream
        counted = exchange.sent.prompt_tokens if exchange.sent is not None else 0
        if stream is None:
            return (counted or prompt_tokens) + self._num_events
        return (stream.num_prompt_tokens or counted or prompt_tokens) + stream.num_tokens

    def _joined(self, data: bytes) -> bytes:
        return (self._tail + data)[-_TAIL_BYTES:]

    def _said(self) -> int | None:
        totals = _TOTAL.findall(self._tail)
        if totals:
            return int(totals[-1])
        parts = [pattern.findall(self._tail) for pattern in _PARTS]
        return sum(int(found[-1]) for found in parts) if all(parts) else None
