"""Prompts whose token ids are known, by what was asked for them: those of the last requests."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from xllm_plugin.service.kv_index.index import Chains, Extra

__all__ = ["Prompt", "PromptMemory"]

_WHOLE_BYTES: Final = 8 * 1024
"""A question up to this length is hashed as a whole."""
_HEAD_BYTES: Final = 1024
_TAIL_BYTES: Final = 2048
_NUM_PARTS: Final = 16
_PART_BYTES: Final = 256


class Prompt(NamedTuple):
    """A prompt as the index takes it."""

    tokens: bytes
    extra: Extra
    chains: Chains | None = None
    """Of one that is asked again: its keys in the index, as far as known."""

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return len(self.tokens) // 4


class PromptMemory:
    """Bounded by bytes; what was asked for longest ago goes first.

    A long question is found by the hash of parts of it, and then compared as a whole: to hash all
    of 220 KB would take longer than all else that is done with it here.  Of two with the same parts
    the later one is kept, and the other one is tokenised again when it comes back.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        """Kept of all of them, about."""
        self._known: OrderedDict[int, tuple[bytes, Prompt]] = OrderedDict()
        """By `_key` of the question: that, and its prompt."""

    def __len__(self) -> int:
        return len(self._known)

    def get(self, question: bytes) -> Prompt | None:
        """The prompt that was put for the same question, if it is still here."""
        key = _key(question)
        found = self._known.get(key)
        if found is None or found[0] != question:
            return None
        self._known.move_to_end(key)
        return found[1]

    def put(self, question: bytes, prompt: Prompt) -> None:
        """Remember a prompt; two requests with the same new one may both do."""
        key = _key(question)
        before = self._known.pop(key, None)
        if before is not None:
            self.num_bytes -= _size(*before)
        self._known[key] = question, prompt
        self.num_bytes += _size(question, prompt)

    def shrink(self, max_bytes: int) -> None:
        """Forget as many as it takes to keep no more than that."""
        while self.num_bytes > max_bytes:
            self.num_bytes -= _size(*self._known.popitem(last=False)[1])


def _key(question: bytes) -> int:
    length = len(question)
    if length <= _WHOLE_BYTES:
        return hash(question)
    step = length // _NUM_PARTS
    parts = [question[at : at + _PART_BYTES] for at in range(step, length - step, step)]
    return hash((length, question[:_HEAD_BYTES], b"".join(parts), question[-_TAIL_BYTES:]))


def _size(question: bytes, prompt: Prompt) -> int:
    """Bytes that are kept of a prompt, about, and with a chain of keys for every block size.

    Each of them is for 16 tokens or more (`PrefixIndex`), so together they take less than 8 bytes a
    token where sizes are powers of two.
    """
    return len(question) + 3 * len(prompt.tokens)
