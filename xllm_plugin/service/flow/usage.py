"""How many tokens an answer has used: as it says itself, else as far as was seen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from xllm_plugin.service.exchange import Exchange

__all__ = ["UsageMeter"]

_TAIL_BYTES: Final = 2048
_SUCCESS: Final = range(200, 300)
_CLIENT_GONE: Final = 499
# Within strings of JSON quotes are escaped, so generated text cannot look like these.
_TOTAL: Final = b'"total_tokens"'
_PARTS: Final = (b'"input_tokens"', b'"output_tokens"')
_ANY: Final = b'_tokens"'
_NUMBER: Final = re.compile(rb"\s*:\s*(\d{1,12})")
_EVENT: Final = b"data: "


class UsageMeter:
    """Follows one answer."""

    __slots__ = ("_num_events", "_said_tokens", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._num_events = 0
        self._said_tokens: int | None = None

    def observe(self, data: bytes) -> None:
        """A part of the answer's body was passed on."""
        self._num_events += data.count(_EVENT)
        self._tail = self._tail + data if self._tail else data
        said = self._said()
        if said is not None:  # long fields may follow the usage
            self._said_tokens = said
        self._tail = self._tail[-_TAIL_BYTES:]

    def observe_events(self, events: bytes) -> None:
        """Whole events of an armed stream were passed on: its tokens are counted there."""
        if _ANY in events:
            self.observe(events)

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
        if self._said_tokens is not None:
            return self._said_tokens
        stream = exchange.stream
        sent = exchange.sent
        counted = sent.prompt_tokens if sent is not None and sent.is_exact else 0
        if stream is None:
            return (counted or prompt_tokens) + self._num_events
        return (stream.num_prompt_tokens or counted or prompt_tokens) + stream.num_tokens

    def _said(self) -> int | None:
        if _ANY not in self._tail:
            return None
        total = self._last(_TOTAL)
        if total is not None:
            return total
        prompt, output = map(self._last, _PARTS)
        return prompt + output if prompt is not None and output is not None else None

    def _last(self, name: bytes) -> int | None:
        start = self._tail.rfind(name)
        found = _NUMBER.match(self._tail, start + len(name)) if start >= 0 else None
        return int(found[1]) if found is not None else None
