"""Prompts on which a copy of a tokenizer and of a chat template have to agree with their server.

They have what tells tokenizers and templates apart: other scripts, white space at ends, the text of
special tokens, roles that a template may refuse, tools, and what a request can ask of a template.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["CHATS", "TEXTS"]

TEXTS: Final = (
    "Once upon a time, there were 12,345 dragons.\n\n\tThey said: “naïve façade”",
    "你好, мир! 🐉👩‍👩‍👧",
    "def f(x):\n    return x**2  # a   b\r\n\r\n<|im_start|>user</s><s>[INST] <unk>",
    " leading and trailing ",
    "",
)


def _said(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _call(number: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call00{number}ab", "type": "function", "function": function}


_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Where it rains <now> & “later”",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Zürich", "北京"]}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "strict": True}},
]
_DIALOGUE: Final = [
    _said("system", TEXTS[1]),
    _said("user", TEXTS[0]),
    _said("assistant", "So? \n"),
]
_CALLING: Final = [
    _said("user", "Does it rain in Zürich?"),
    _said("assistant", None, tool_calls=[_call(1, "weather", '{"city": "Zürich", "days": 1.50}')]),
    _said("tool", '{"rain": true}', tool_call_id="call001ab"),
    _said("assistant", "Yes.", tool_calls=[_call(2, "stop", ""), _call(3, "stop", "no object")]),
    _said("tool", _parts("one", "", "two"), tool_call_id="call002ab"),
    _said("tool", "", tool_call_id="call003ab"),
]
CHATS: Final[tuple[dict[str, Any], ...]] = (
    {"messages": [_said("user", TEXTS[0])]},
    {"messages": [_said("user", TEXTS[3])], "add_generation_prompt": False},
    {"messages": [_said("user", TEXTS[2])], "add_special_tokens": True},
    {"messages": _DIALOGUE, "add_generation_prompt": False},
    {"messages": [*_DIALOGUE, _said("user", TEXTS[3])]},
    {"messages": _DIALOGUE[1:], "add_generation_prompt": False, "continue_final_message": True},
    {"messages": [_said("user", ""), _said("assistant", ""), _said("user", "", name="Ada")]},
    {
        "messages": [
            _said("system", ""),
            _said("user", _parts("one", "", " two\n")),
            _said("x", "y"),
        ]
    },
    {"messages": [_said("assistant", "<think>\nwhy\n</think>\n\nso"), _said("user", "and?")]},
    {"messages": [_said("user", "a"), _said("user", "b"), _said("system", "c")]},
    {"messages": [_said("developer", "Be brief."), _said("user", "a")]},
    {"messages": [_said("system", "a"), _said("user", "b"), _said("developer", _parts("c", "d"))]},
    {"messages": [_said("user", "a")], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [_said("user", "a")], "tools": _TOOLS},
    {"messages": [_said("system", "Be brief."), *_CALLING], "tools": _TOOLS},
    {"messages": _CALLING[:4]},
)
