"""Streams added up: what differs is found, however the events are cut."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from xllm_plugin.testing.streams import DONE, differences, events_in, is_same, say_together

CALL = {"index": 0, "id": "chatcmpl-tool-1", "type": "function", "function": {"name": "f"}}


def chunk(**choice: Any) -> dict[str, Any]:
    whole = {"index": 0, "logprobs": None, "finish_reason": None, **choice}
    return {"id": "x", "created": 5, "object": "chunk", "model": "m", "choices": [whole]}


def chat() -> list[Any]:
    """A chat with everything in it."""
    probs = {"content": [{"token": "a", "logprob": -0.5}]}
    arguments = {"index": 0, "function": {"arguments": "{}"}}
    return [
        chunk(delta={"role": "assistant", "content": ""}) | {"prompt_token_ids": [1, 2]},
        chunk(delta={"reasoning": "why"}, token_ids=[3]),
        chunk(delta={"content": "a"}, token_ids=[4], logprobs=probs),
        chunk(delta={"content": "b"}, token_ids=[5], logprobs=probs),
        chunk(delta={"tool_calls": [CALL]}, token_ids=[6]),
        chunk(delta={"tool_calls": [arguments]}, token_ids=[7], finish_reason="stop"),
        {**chunk(), "choices": [], "usage": {"completion_tokens": 5}},
        DONE,
    ]


def test_events_are_read_as_they_are_framed() -> None:
    odd = json.dumps({"text": "one\u2028line"}, ensure_ascii=False)
    text = f": alive\n\nevent: x\ndata: {odd}\n\ndata: [DONE]\n\n"
    assert events_in(text) == [{"text": "one\u2028line"}, DONE]


def test_all_of_a_chat_is_added_up() -> None:
    said = say_together(chat())
    assert (said.role, said.reasoning, said.text) == ("assistant", "why", "ab")
    assert (said.prompt_token_ids, said.token_ids) == ([1, 2], [3, 4, 5, 6, 7])
    assert [one["token"] for one in said.log_probs["content"]] == ["a", "a"]
    (call,) = said.tool_calls.values()
    assert (call["name"], call["arguments"], call["ids"]) == ("f", "{}", ["chatcmpl-tool-1"])
    assert said.finishes == [("stop", None)]
    assert said.usage == {"completion_tokens": 5}
    assert said.is_done
    assert not said.error


def test_a_completion_says_its_text() -> None:
    said = say_together([chunk(text="a", prompt_token_ids=[1]), chunk(text="b", token_ids=[2])])
    assert (said.text, said.prompt_token_ids, said.token_ids) == ("ab", [1], [2])
    assert not said.is_done


def test_two_tokens_in_one_event_say_the_same() -> None:
    events = chat()
    merged = copy.deepcopy(events)
    one, other = merged[2]["choices"][0], merged.pop(3)["choices"][0]
    one["delta"]["content"] += other["delta"]["content"]
    one["token_ids"] += other["token_ids"]
    one["logprobs"]["content"] = one["logprobs"]["content"] + other["logprobs"]["content"]
    assert not differences(say_together(events), say_together(merged))


def test_another_request_has_other_ids() -> None:
    other = copy.deepcopy(chat())
    for event in other[:-1]:
        event |= {"id": "y", "created": 9}
    other[4]["choices"][0]["delta"]["tool_calls"][0]["id"] = "chatcmpl-tool-2"
    assert not differences(say_together(chat()), say_together(other))


@pytest.mark.parametrize(
    ("name", "number", "change"),
    [
        ("ids", 3, {"id": "y"}),
        ("created", 3, {"created": 6}),
        ("rest", 3, {"model": "n"}),
        ("usage", 6, {"usage": {"completion_tokens": 6}}),
        ("error", 3, {"error": {"message": "no"}}),
        ("is_done", 7, None),
    ],
)
def test_what_differs_is_named(name: str, number: int, change: dict[str, Any] | None) -> None:
    other = chat()
    other[number : number + 1] = [] if change is None else [other[number] | change]
    assert name in differences(say_together(chat()), say_together(other))


@pytest.mark.parametrize(
    ("name", "number", "change"),
    [
        ("text", 2, {"delta": {"content": "A"}}),
        ("reasoning", 1, {"delta": {"reasoning": "how"}}),
        ("token_ids", 2, {"token_ids": [9]}),
        ("log_probs", 2, {"logprobs": {"content": [{"token": "a", "logprob": -0.6}]}}),
        ("finishes", 5, {"finish_reason": "length"}),
        ("tool_calls", 5, {"delta": {"tool_calls": [CALL]}}),
        ("rest", 2, {"delta": {"content": "a", "refusal": "no"}}),
    ],
)
def test_what_differs_in_a_choice_is_named(name: str, number: int, change: dict[str, Any]) -> None:
    other = chat()
    other[number]["choices"][0] |= change
    assert name in differences(say_together(chat()), say_together(other))


def test_events_are_left_as_they_were() -> None:
    events = chat()
    say_together(events)
    assert events == chat()


def test_rounding_is_no_difference() -> None:
    assert is_same({"a": [-0.5, None]}, {"a": [-0.5004, None]})
    assert not is_same([-0.5], [-0.51])
    assert not is_same([-0.5], [-0.5, 0.0])
    assert not is_same({"a": 1}, {"b": 1})
    assert not is_same("a", "b")
