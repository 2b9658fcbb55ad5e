"""Streams of completions and chats: read, added up, compared.

Two streams of one request say the same in other events: a busy server puts two tokens into one.  So
what they say is added up, field by field, and the sums are compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["DONE", "Said", "differences", "events_in", "is_same", "say_together"]

DONE = "[DONE]"
TOOL_ID = "chatcmpl-tool-"
"""vLLM's ids of tool calls begin with it, and end at random."""
TOLERANCE = 1e-3
"""Of log probabilities: tokens that were decoded one by one may have been read together."""


def events_in(text: str) -> list[Any]:
    """The data of each event of a stream: JSON where it is JSON, else text, as `DONE`."""
    # JSON may hold line breaks of other alphabets, so no `splitlines`.
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(one) if one.startswith("{") else one for one in data]


@dataclass(slots=True)
class Said:
    """What the events of one stream say together.

    Attributes:
        ids: of the answer, each once; so are `created`.  They are others for each request.
        role: of the message.
        reasoning: text that a reasoning parser has taken for it.
        text: of the answer.
        token_ids: of the output, if asked for.
        prompt_token_ids: likewise.
        log_probs: lists by name, as the API calls them.
        tool_calls: by index; each has all ids that were given for it, its name and its arguments.
        finishes: finish and stop reason, of each event that has one.
        usage: the last one.
        rest: whatever else an event has, each once.
        error: of the event that is one.
        is_done: whether the last event is `DONE`.
    """

    ids: list[str] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    role: str = ""
    reasoning: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    log_probs: dict[str, list[Any]] = field(default_factory=dict)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    finishes: list[tuple[str, Any]] = field(default_factory=list)
    usage: Any = None
    rest: list[Any] = field(default_factory=list)
    error: str = ""
    is_done: bool = False

    def add(self, event: Any) -> None:
        """Take one event."""
        self.is_done = event == DONE
        if self.is_done:
            return
        event = dict(event)
        if "error" in event:
            self.error = str(event["error"]["message"])
            return
        _note(self.ids, event.pop("id", None))
        _note(self.created, event.pop("created", None))
        self.prompt_token_ids += event.pop("prompt_token_ids", None) or ()
        self.usage = event.pop("usage", None) or self.usage
        event["choices"] = [self._add_choice(dict(one)) for one in event.get("choices", ())]
        _note(self.rest, event)

    def _add_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Take a choice; returns what is left of it."""
        self.token_ids += choice.pop("token_ids", None) or ()
        self.prompt_token_ids += choice.pop("prompt_token_ids", None) or ()
        self.text += choice.pop("text", None) or ""
        for name, values in (choice.pop("logprobs", None) or {}).items():
            self.log_probs.setdefault(name, []).extend(values or ())
        finish, stop = choice.pop("finish_reason", None), choice.pop("stop_reason", None)
        if finish is not None:
            self.finishes.append((finish, stop))
        if "delta" in choice:
            choice["delta"] = self._add_delta(dict(choice["delta"]))
        return choice

    def _add_delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        self.role += delta.pop("role", None) or ""
        self.text += delta.pop("content", None) or ""
        self.reasoning += delta.pop("reasoning", None) or ""
        for call in delta.pop("tool_calls", None) or ():
            self._add_call(call)
        return delta

    def _add_call(self, call: dict[str, Any]) -> None:
        new: dict[str, Any] = {"ids": [], "types": [], "name": "", "arguments": ""}
        known = self.tool_calls.setdefault(call["index"], new)
        known["ids"] += filter(None, [call.get("id")])
        known["types"] += filter(None, [call.get("type")])
        function = call.get("function") or {}
        known["name"] += function.get("name") or ""
        known["arguments"] += function.get("arguments") or ""


def say_together(events: Iterable[Any]) -> Said:
    """What all these events of a stream say."""
    said = Said()
    for event in events:
        said.add(event)
    return said


def differences(one: Said, other: Said) -> dict[str, tuple[Any, Any]]:
    """By name, the fields in which two answers to one request differ, with both values.

    Ids and times of creation are others for each request; both have to have as many.
    """
    found = {}
    for name in (each.name for each in fields(Said)):
        pair = (getattr(one, name), getattr(other, name))
        is_equal = len(pair[0]) == len(pair[1]) if name in ("ids", "created") else is_same(*pair)
        if not is_equal:
            found[name] = pair
    return found


def is_same(one: Any, other: Any) -> bool:
    """Equal but for rounding, and for ids of tool calls: each request draws its own."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=TOLERANCE)
    if isinstance(one, str) and one.startswith(TOOL_ID):
        return isinstance(other, str) and other.startswith(TOOL_ID)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def _note(known: list[Any], value: Any) -> None:
    if value is not None and value not in known:
        known.append(value)
