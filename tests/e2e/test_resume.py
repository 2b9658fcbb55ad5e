"""A stream is continued on a real server after any of its events, and nobody can tell."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from xllm_plugin.instance.resumption import RESUME_PATH
from xllm_plugin.testing.dialogues import LOOSE_WEATHER_TOOL
from xllm_plugin.testing.streams import DONE, events_in, is_same
from xllm_plugin.worker.resumed import RESUMED_ARG

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
MODEL_NAME = "smollm2"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
USAGE = {"stream_options": {"include_usage": True}}


def chat(question: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": question}]
    return CHAT, {"messages": messages, "max_tokens": 24, **changes}


def completion(prompt: str | list[int], **changes: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETION, {"prompt": prompt, "max_tokens": 20, **changes}


# Emoji are two and more tokens of this model each: cuts come in the middle of characters.
EMOJI = "😀😃😄😁😆😅🤣😂🙂🙃😉😊😇🥰😍🤩😘"
CASES = {
    "chat": chat("Tell me about Zürich.", **USAGE),
    "chat log-probs": chat("Name a colour.", logprobs=True, top_logprobs=3, max_tokens=10),
    "chat that stops": chat("Say only: hi", max_tokens=60, **USAGE),
    "chat with tools": chat(
        "Weather in Paris? Use the tool.", tools=[LOOSE_WEATHER_TOOL], max_tokens=50
    ),
    "characters of several tokens": completion(EMOJI, logprobs=1),
    "usage in every event": completion(
        "Once upon a time",
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    ),
    "a stop string": completion("Once upon a time", stop=["there was", "e wa"], min_tokens=3),
    "a stop string that is shown": completion(
        "Once upon a time", stop=[" and"], include_stop_str_in_output=True, max_tokens=60
    ),
    "a repetition penalty": completion("Once upon a time", repetition_penalty=1.3),
    "all penalties": completion(
        "Once upon a time",
        frequency_penalty=0.8,
        presence_penalty=0.4,
        repetition_penalty=1.1,
        bad_words=[" the"],
    ),
    "a seed": completion("Once upon a time", seed=7, temperature=1.0, top_p=0.9, logprobs=1),
    "a JSON schema": chat("A person as JSON.", structured_outputs={"json": SCHEMA}, max_tokens=40),
    "a response format": chat(
        "A person as JSON.",
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}},
        max_tokens=40,
        frequency_penalty=0.3,
    ),
    "a regular expression and a seed": completion(
        "A number:", structured_outputs={"regex": "[0-9]{1,12}"}, seed=3, temperature=1.5
    ),
    "a named tool": chat(
        "Weather in Paris?",
        tools=[LOOSE_WEATHER_TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=30,
    ),
    "a required tool": chat(
        "Weather in Paris?", tools=[LOOSE_WEATHER_TOOL], tool_choice="required", max_tokens=40
    ),
    # The first block of the KV cache, of 128 tokens on a CPU, ends within the output.
    "output that is cached": completion([*range(1000, 1123)], min_tokens=20),
    "a repetition that ends it": completion(
        "la la la la la la la la",
        repetition_detection={"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 6},
        max_tokens=40,
    ),
    "a promise": completion("Once upon a time", vllm_xargs={"xllm_tpot_ms": 90}),
    "several tokens an event": completion("Once upon a time", stream_interval=4),
}
QUICK = (
    *("characters of several tokens", "all penalties", "a regular expression and a seed"),
    *("a required tool", "output that is cached"),
)
REFUSED = {
    "n > 1": {"n": 2, "temperature": 1.0},
    "extra arguments": {"vllm_xargs": {"other": 1}},
}


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url, json=body, timeout=None, trust_env=False)


def events(reply: httpx.Response) -> list[Any]:
    assert reply.status_code == 200, reply.text
    *found, last = events_in(reply.text)
    assert last == DONE
    return found


def resumption(path: str, body: dict[str, Any], had: list[Any]) -> dict[str, Any]:
    """What the service would ask for after these events."""
    asked: dict[str, Any] = {"path": path, "body": body, "chunks": [], "num_opening_events": 0}
    asked |= {"id": had[0]["id"], "created": had[0]["created"], "finish": None}
    for event in had:
        if not event["choices"]:
            asked["finish"]["num_events"] += 1
            continue
        (choice,) = event["choices"]
        if choice.get("token_ids") is None:
            asked["num_opening_events"] += 1
        else:
            asked["chunks"].append(choice["token_ids"])
        if choice["finish_reason"] is not None:
            reasons = {key: choice.get(key) for key in ("finish_reason", "stop_reason")}
            asked["finish"] = {**reasons, "num_events": 0}
    return asked


def check(url: str, name: str, stride: int) -> None:
    path, changes = CASES[name]
    body = {"model": MODEL_NAME, "temperature": 0, "stream": True, "return_token_ids": True}
    body |= changes
    whole = events(post(url + path, body))
    cuts = {1, *range(2, len(whole), stride), len(whole) - 1, len(whole)}
    for cut in sorted(cuts):
        asked = resumption(path, body, whole[:cut])
        rest = events(post(url + RESUME_PATH, asked))
        assert is_same(rest, whole[cut:]), f"after {cut} events: {rest} is not {whole[cut:]}"


@pytest.mark.parametrize("name", QUICK)
def test_a_stream_is_continued_exactly(xllm_url: str, name: str) -> None:
    check(xllm_url, name, stride=25)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_a_stream_is_continued_exactly_after_every_event(xllm_url: str, name: str) -> None:
    check(xllm_url, name, stride=1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_exact_is_refused(xllm_url: str, name: str) -> None:
    path, changes = completion("Once", **REFUSED[name])
    body = {"model": MODEL_NAME, "temperature": 0, "stream": True, "return_token_ids": True}
    asked = {"path": path, "body": body | changes, "id": "cmpl-1", "created": 1, "chunks": [[1]]}
    reply = post(xllm_url + RESUME_PATH, asked)
    assert reply.status_code == 400
    assert f"A stream with {name} cannot be continued" in reply.json()["error"]["message"]


@pytest.mark.parametrize("chunks", [[[49152]], [[-1]], [[1] * 3000]])
def test_tokens_that_would_end_the_engine_are_refused(xllm_url: str, chunks: Any) -> None:
    body = {"model": MODEL_NAME, "prompt": "x", "stream": True, "return_token_ids": True}
    asked = {"path": COMPLETION, "body": body | {"max_tokens": 9}, "id": "cmpl-1", "created": 1}
    assert post(xllm_url + RESUME_PATH, asked | {"chunks": chunks}).status_code == 400


def test_tokens_do_not_come_from_clients(xllm_url: str) -> None:
    body = {"model": MODEL_NAME, "prompt": "x", "vllm_xargs": {RESUMED_ARG: [1, 2]}}
    reply = post(xllm_url + COMPLETION, body)
    assert reply.status_code == 400
    assert RESUMED_ARG in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"path": "/v1/embeddings", "body": {}, "id": "x", "created": 1, "chunks": []},
        {"path": COMPLETION, "body": {"prompt": "x"}, "id": "x", "created": 1, "chunks": []},
        {"path": COMPLETION, "body": {"prompt": 5}, "id": "x", "created": 1, "chunks": []},
    ],
)
def test_nonsense_is_a_bad_request(xllm_url: str, asked: dict[str, Any]) -> None:
    assert post(xllm_url + RESUME_PATH, asked).status_code == 400
