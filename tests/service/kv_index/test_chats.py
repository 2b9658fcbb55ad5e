"""Chats to text: what templates get to see, and what is left to the instance."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
import pytest

from xllm_plugin.instance.chat_form import ChatForm, TemplateForm
from xllm_plugin.service.kv_index import chats, samples
from xllm_plugin.service.kv_index.chats import CannotRenderError, ChatRenderer
from xllm_plugin.service.kv_index.templates import ChatTemplate

SHOW = "{{ messages | tojson }}"
USER = {"role": "user", "content": "hi"}
CALL = {
    "type": "function",
    "function": {"name": "f", "arguments": '{"b": 1.50, "a": null}'},
    "id": "c1",
}
TOOL = {"type": "function", "function": {"name": "f"}}


def renderer(
    source: str,
    content_format: Literal["string", "openai"] = "string",
    *,
    with_tools: str | None = None,
    **fields: Any,
) -> ChatRenderer:
    plain = TemplateForm(source=source, content_format=content_format)
    other = TemplateForm(source=with_tools or source, content_format=content_format)
    form = ChatForm(plain=plain, with_tools=other, **{"special_tokens": {}, **fields})
    return ChatRenderer.read(msgspec.json.encode(form))


def text(one: ChatRenderer, *messages: Any, **fields: Any) -> str:
    return one.render(json.dumps({"model": "m", "messages": messages, **fields}).encode()).text


def seen(*messages: Any, content_format: Literal["string", "openai"] = "string") -> Any:
    """What the template gets, in its order."""
    return json.loads(
        text(renderer(SHOW, content_format), *messages),
        object_pairs_hook=lambda pairs: [list(pair) for pair in pairs],
    )


def test_content_is_a_string_or_parts_as_the_template_takes_it() -> None:
    parts = [{"type": "text", "text": one} for one in ("a", "", "b")]
    message = {"role": "user", "content": parts, "name": "Ada"}
    assert seen(message) == [[["role", "user"], ["content", "a\nb"], ["name", "Ada"]]]
    (found,) = seen(message, content_format="openai")
    assert found[1] == ["content", [[["type", "text"], ["text", one]] for one in ("a", "", "b")]]
    (found,) = seen(
        {"role": "tool", "content": parts, "tool_call_id": "c"}, content_format="openai"
    )
    assert found == [["role", "tool"], ["content", "a\n\nb"], ["tool_call_id", "c"]]
    for said, content in (({"content": None}, ""), ({}, ""), ({"content": ""}, "")):
        assert seen({"role": "assistant", **said}) == [
            [["role", "assistant"], ["content", content]]
        ]


def test_tool_calls_have_objects_as_arguments() -> None:
    def arguments(given: str) -> Any:
        call = {**CALL, "function": {"name": "f", "arguments": given}}
        (found,) = seen({"role": "assistant", "content": None, "tool_calls": [call]})
        (said,) = dict(found)["tool_calls"]
        assert [name for name, _ in said] == ["id", "function", "type"]
        assert [name for name, _ in dict(said)["function"]] == ["arguments", "name"]
        return dict(dict(said)["function"])["arguments"]

    assert arguments('{"b": 1.50, "a": null}') == [["b", 1.5], ["a", None]]
    for odd in ("", "[]", "42", "no json"):
        assert arguments(odd) == []
    assert seen({**USER, "role": "assistant", "tool_calls": []}) == [
        [["role", "assistant"], ["content", "hi"]]
    ]


def test_developers_are_the_system_where_the_template_does_not_know_them() -> None:
    developer, system = ({"role": role, "content": role} for role in ("developer", "system"))
    assert seen(developer, USER)[0] == [["role", "system"], ["content", "developer"]]
    merged = [["role", "system"], ["content", "system\n\ndeveloper"]]
    user = [["role", "user"], ["content", "hi"]]
    for content_format in ("string", "openai"):
        found = seen(system, USER, developer, content_format=content_format)
        assert (found[0], len(found)) == (merged, 2)
    assert seen(system, developer, USER) == [merged, user]
    known = renderer(SHOW + "{# 'developer' #}")
    assert json.loads(text(known, developer)) == [{**developer, "tools": None}]


def test_tools_are_as_vllm_writes_them_out() -> None:
    both = renderer("plain", with_tools="{{ tools | tojson }}")
    assert text(both, USER) == "plain"
    function = {"strict": True, "parameters": {"b": {}, "a": []}, "name": "f"}
    found = text(both, USER, tools=[TOOL, {"function": function, "type": "function"}])
    assert found == (
        '[{"type": "function", "function": {"name": "f", "description": null, '
        '"parameters": null}}, {"type": "function", "function": {"name": "f", "description": null, '
        '"parameters": {"b": {}, "a": []}, "strict": true}}]'
    )


def test_variables_are_those_that_the_template_knows() -> None:
    source = "{{ bos_token }}{{ kind | default('-') }}{{ level | default('-') }}{{ documents }}"
    one = renderer(
        source, special_tokens={"bos_token": "<s>"}, default_kwargs={"kind": "a", "level": "b"}
    )
    assert text(one, USER) == "<s>abNone"
    assert text(one, USER, chat_template_kwargs={"kind": None, "level": "auto"}) == "<s>abNone"
    assert text(one, USER, chat_template_kwargs={"kind": 1, "other": 2}) == "<s>1bNone"
    assert text(one, USER, chat_template_kwargs={"bos_token": ""}) == "abNone"
    found = text(one, USER, chat_template_kwargs={"documents": [{"title": "t"}]})
    assert found == "<s>ab[{'title': 't'}]"


def test_flags_have_the_defaults_of_tokenize() -> None:
    one = renderer("{{ add_generation_prompt }}")
    assert text(one, USER) == "True"
    assert text(one, USER, add_generation_prompt=False) == "False"
    body: dict[str, Any] = {"messages": [USER]}
    assert not one.render(json.dumps(body).encode()).add_special_tokens
    assert one.render(json.dumps({**body, "add_special_tokens": True}).encode()).add_special_tokens


@pytest.mark.parametrize("content_format", ["string", "openai"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}<{{ CONTENT }}>{% endfor %}", "<a><b "),
        ("{% for m in messages %}<{{ CONTENT | trim }}>{% endfor %}", "<a><b"),
    ],
)
def test_a_last_message_that_goes_on_has_no_end(
    source: str, expected: str, content_format: Literal["string", "openai"]
) -> None:
    content = "m.content" if content_format == "string" else "m.content[-1].text"
    one = renderer(source.replace("CONTENT", content), content_format)
    messages = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b "},
    )
    flags = {"add_generation_prompt": False, "continue_final_message": True}
    assert text(one, *messages, **flags) == expected
    with pytest.raises(CannotRenderError):
        text(one, *messages, continue_final_message=True)
    for silent in ("{{ bos_token }}", "content {{ messages[0].content }}"):
        with pytest.raises(CannotRenderError):
            text(renderer(silent), *messages, **flags)


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
ODD_CALLS: tuple[Any, ...] = (5, 0, True, 1.5, "x", {})
ODD_CALL: tuple[Any, ...] = (5, None, "x", [])
ODD_ROLES: tuple[Any, ...] = (5, True, ["user"], {})
ODD_MESSAGES: tuple[Any, ...] = (5, 1.5, None, True, [USER])
LEFT_TO_THE_INSTANCE: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}
        ]
    },
    {"messages": [{"role": "user", "content": ["a"]}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": "half \ud800"}]},
    {"messages": [{"content": "a"}]},
    {"messages": [{"role": "developer", "content": "a", "tools": [TOOL]}]},
    {"messages": [{"role": "system", "content": "x-anthropic-billing-header: a\nb"}]},
    {"messages": [{"role": "assistant", "content": "a", "reasoning": "b"}]},
    {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]},
    {"messages": [{**USER, "task": "t"}]},
    {"messages": [{**USER, "name": 1}]},
    {"messages": [{**USER, "tool_calls": [CALL]}]},
    {"messages": [{**USER, "tool_call_id": "c"}]},
    {"messages": [{"role": "tool", "content": "a", "tool_call_id": None}]},
    {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "index": 0}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}]},
    *({"messages": [{"role": "assistant", "tool_calls": odd}]} for odd in ODD_CALLS),
    *({"messages": [{"role": "assistant", "tool_calls": [odd]}]} for odd in ODD_CALL),
    *({"messages": [{"role": odd, "content": "a"}]} for odd in ODD_ROLES),
    *({"messages": [odd]} for odd in ODD_MESSAGES),
    {"messages": 5},
    {"messages": {"role": "user"}},
    {"messages": [USER], "tools": 5},
    {"messages": [USER] * 1001},
    {"messages": [{"role": "user", "content": "a" * 2**18}]},
    {"messages": ["text"]},
    {"messages": []},
    {"messages": "text"},
    {},
    {"messages": [USER], "tools": []},
    {"messages": [USER], "tools": [{**TOOL, "defer_loading": True}]},
    {"messages": [USER], "tools": [{**TOOL, "type": "custom"}]},
    {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
    {
        "messages": [USER],
        "tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}],
    },
    {"messages": [USER], "chat_template": "x"},
    {"messages": [USER], "mm_processor_kwargs": {}},
    {"messages": [USER], "something_new": 1},
    {"messages": [USER], "add_generation_prompt": "true"},
    {"messages": [USER], "chat_template_kwargs": "x"},
    {"messages": [USER], "chat_template_kwargs": {"tools": []}},
    {"messages": [USER], "chat_template_kwargs": {"strftime_now": 1}},
    {"messages": [USER], "chat_template_kwargs": {"documents": ["text"]}},
)


@pytest.mark.parametrize("asked", LEFT_TO_THE_INSTANCE, ids=lambda asked: json.dumps(asked)[:60])
def test_what_is_not_certain_is_left_to_the_instance(asked: dict[str, Any]) -> None:
    with pytest.raises(CannotRenderError):
        renderer("{{ messages[0].content }}").render(json.dumps(asked).encode())


def test_bodies_that_are_none_are_left_to_the_instance() -> None:
    one = renderer(SHOW)
    for body in (b"", b"{", b"[]", b"\xff", b'{"messages":' + b"[" * 99_999, b" " * 2**22 + b"{}"):
        with pytest.raises(CannotRenderError):
            one.render(body)


def test_forms_that_are_none_are_refused() -> None:
    for body in (b"", b"{}", b'{"plain": {"source": "", "content_format": "xml"}}'):
        with pytest.raises(CannotRenderError):
            ChatRenderer.read(body)
    for source, defaults in (("{% for", {}), ("", {"messages": []})):
        with pytest.raises(CannotRenderError):
            renderer(source, default_kwargs=defaults)


def test_a_template_that_takes_too_long_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chats, "ChatTemplate", lambda source: ChatTemplate(source, most_s=0.02))
    one = renderer(
        "{% for m in messages %}{% if m.content %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
    )
    assert text(one, {"role": "assistant"}) == ""
    with caplog.at_level("WARNING"):
        for content in ("a", "b"):
            with pytest.raises(CannotRenderError, match="too long"):
                text(one, {"role": "user", "content": content})
    assert ["for 'm' took" in record.getMessage() for record in caplog.records] == [True]
    assert text(renderer("x"), USER) == "x", "another template is another matter"


def test_a_long_chat_that_takes_too_long_costs_short_ones_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chats, "ChatTemplate", lambda source: ChatTemplate(source, most_s=0.02))
    one = renderer(
        "{% for m in messages %}{% if messages | length > 900 %}{% for a in range(99999) %}"
        "{% endfor %}{% endif %}{% endfor %}done"
    )
    for num_messages in (1000, 999):
        with pytest.raises(CannotRenderError, match="too long"):
            text(one, *[USER] * num_messages)
    assert text(one, *[USER] * 400) == "done"


def test_what_fails_unexpectedly_is_left_to_the_instance(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("odd")

    one = renderer(SHOW)
    monkeypatch.setattr(chats, "_messages", fail)
    with caplog.at_level("DEBUG"), pytest.raises(CannotRenderError, match="odd"):
        text(one, USER)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_every_sample_can_be_rendered() -> None:
    """By a template that takes everything; what is left to instances would not be compared."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}"
    for chat in samples.CHATS:
        assert text(
            renderer(source),
            *chat["messages"],
            **{k: v for k, v in chat.items() if k != "messages"},
        )
