"""What is remembered of prompts: found again at once, bounded, and never of another salt."""

from __future__ import annotations

import json
from typing import Any

from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.exchange import peek
from xllm_plugin.service.kv_index.index import packed
from xllm_plugin.service.kv_index.prompts import Prompt
from xllm_plugin.service.kv_index.tokens import PromptReader, Unread

PATH = "/v1/completions"


def reader(max_bytes: int) -> PromptReader:
    """Asks nobody: there is no session."""
    nobody: Any = None
    return PromptReader(nobody, ServiceConfig(kv_index={"token_cache_bytes": max_bytes}))


def look(prompts: PromptReader, prompt: object, **fields: Any) -> Prompt | Unread | None:
    body = json.dumps({"prompt": prompt, **fields}).encode()
    return prompts.look(PATH, peek(body, b"application/json"), "m", [])


def learn(prompts: PromptReader, text: str, tokens: list[int]) -> None:
    """As `read` does when the answer has come."""
    unread = look(prompts, text)
    assert isinstance(unread, Unread)
    prompts._remember(unread.question, packed(tokens))


def test_ids_need_nobody_and_texts_are_found_again() -> None:
    prompts = reader(10_000)
    assert look(prompts, [1, 2, 3]) == Prompt(packed([1, 2, 3]), ((), ()))
    learn(prompts, "a", [7, 8])
    found = look(prompts, "a", max_tokens=5)
    assert isinstance(found, Prompt)
    assert found.tokens == packed([7, 8])
    assert found.chains is not None
    salted = look(prompts, "a", cache_salt="s")
    assert isinstance(salted, Prompt)
    assert salted.extra.first == ("s",)
    assert look(prompts, "a", truncate_prompt_tokens=1) is None
    assert isinstance(look(prompts, "b"), Unread)
    prompts.close()


def test_what_is_remembered_is_bounded_and_the_longest_unused_goes_first() -> None:
    prompts = reader(1000)
    for text in "abc":
        learn(prompts, text, [1] * 20)
    assert isinstance(look(prompts, "a"), Prompt), "used last"
    learn(prompts, "d", [1] * 20)
    assert [isinstance(look(prompts, text), Prompt) for text in "abcd"] == [True, False, True, True]
    assert prompts._known.num_bytes <= 1000
    learn(prompts, "long", [1] * 1000)
    assert (len(prompts._known), prompts._known.num_bytes) == (0, 0), "larger than all may be"
    prompts.close()


def question(**fields: Any) -> Any:
    prompts = reader(0)
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    seen = peek(json.dumps(body).encode(), b"application/json")
    unread = prompts.look("/v1/chat/completions", seen, "m", [])
    prompts.close()
    return json.loads(unread.question) if isinstance(unread, Unread) else unread


def test_what_a_chat_gives_to_its_template_is_asked_with_it() -> None:
    """`/tokenize` has no fields for documents and effort, which the chat route passes on."""
    assert question().keys() == {"model", "messages"}
    assert question(max_tokens=5, tools=None, chat_template_kwargs={}).keys() == {
        "model",
        "messages",
    }
    given = {"enable_thinking": True, "x": [1]}
    assert question(chat_template_kwargs=given)["chat_template_kwargs"] == given
    found = question(documents=[{"text": "t"}], reasoning_effort="none", chat_template_kwargs=None)
    assert found["chat_template_kwargs"] == {
        "documents": [{"text": "t"}],
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
    found = question(reasoning_effort="low", chat_template_kwargs=given)
    assert found["chat_template_kwargs"] == {**given, "reasoning_effort": "low"}
    assert question(chat_template_kwargs="no object") is None
