"""A drop-in server: the `openai` client gets from xllm what it gets from stock vLLM."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest

from xllm_plugin.testing.dialogues import DIALOGUES, MAX_TOKENS, PERSON_SCHEMA, WEATHER_TOOL

pytestmark = pytest.mark.e2e

MODEL_NAME = "smollm2"
OWN_ROUTES = ("/xllm/", "/v1/xllm/")


@pytest.mark.parametrize("name", [name for name in DIALOGUES if name != "routes"])
def test_xllm_answers_as_stock_does(
    name: str, native_answers: dict[str, Any], xllm_answers: dict[str, Any]
) -> None:
    """Texts, log-probs, usage and error messages: equal, bit for bit."""
    assert xllm_answers[name] == native_answers[name]


def test_no_route_of_stock_is_missing_and_ours_are_apart(
    native_answers: dict[str, Any], xllm_answers: dict[str, Any]
) -> None:
    stock, ours = set(native_answers["routes"]), set(xllm_answers["routes"])
    assert stock <= ours
    assert all(route.startswith(OWN_ROUTES) for route in ours - stock)


def test_a_streamed_chat_says_what_the_whole_one_says(xllm_answers: dict[str, Any]) -> None:
    whole, streamed = xllm_answers["chat"], xllm_answers["chat_stream"]
    assert streamed["text"] == whole["choices"][0]["message"]["content"]
    assert streamed["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert streamed["usage"] == whole["usage"]
    assert streamed["pieces"] > 2


def test_a_streamed_completion_says_what_the_whole_one_says(xllm_answers: dict[str, Any]) -> None:
    whole = xllm_answers["completion"]["choices"][0]
    assert xllm_answers["completion_stream"]["text"] == whole["text"]
    assert xllm_answers["completion_stream"]["finish_reason"] == whole["finish_reason"]


def test_usage_adds_up(xllm_answers: dict[str, Any]) -> None:
    usage = xllm_answers["chat"]["usage"]
    assert usage["completion_tokens"] == MAX_TOKENS or (
        xllm_answers["chat"]["choices"][0]["finish_reason"] == "stop"
    )
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_n_answers_are_given_and_they_are_not_all_alike(xllm_answers: dict[str, Any]) -> None:
    choices = xllm_answers["several_choices"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) > 1


def test_a_stop_string_ends_the_answer_before_it(xllm_answers: dict[str, Any]) -> None:
    found = xllm_answers["stop_string"]
    choice = found["answer"]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == found["whole"].partition(found["stop"])[0]


def test_log_probs_come_with_every_token(xllm_answers: dict[str, Any]) -> None:
    at = xllm_answers["log_probs"]["chat"]["choices"][0]["logprobs"]["content"]
    assert len(at) == xllm_answers["log_probs"]["chat"]["usage"]["completion_tokens"]
    for token in at:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == max(top["logprob"] for top in token["top_logprobs"])


def test_a_seed_makes_sampling_repeatable(xllm_answers: dict[str, Any]) -> None:
    first, again, other = xllm_answers["seeds"]
    assert first == again
    assert first != other


def test_guided_json_follows_its_schema(xllm_answers: dict[str, Any]) -> None:
    content = xllm_answers["guided_json"]["choices"][0]["message"]["content"]
    jsonschema.validate(json.loads(content), PERSON_SCHEMA)


@pytest.mark.parametrize("name", ["tool_named", "tool_required"])
def test_a_tool_call_follows_its_parameters(name: str, xllm_answers: dict[str, Any]) -> None:
    message = xllm_answers[name]["choices"][0]["message"]
    for call in message["tool_calls"]:
        assert call["function"]["name"] == "get_weather"
        parameters: Any = WEATHER_TOOL["function"]["parameters"]  # type: ignore[index]
        jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)


def test_a_streamed_tool_call_is_the_whole_one(xllm_answers: dict[str, Any]) -> None:
    (call,) = xllm_answers["tool_named"]["choices"][0]["message"]["tool_calls"]
    assert xllm_answers["tool_stream"]["name"] == call["function"]["name"]
    assert json.loads(xllm_answers["tool_stream"]["arguments"]) == json.loads(
        call["function"]["arguments"]
    )


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("temperature", 400, "temperature"),
        ("top_p", 400, "top_p"),
        ("too_long", 400, "max_tokens"),
        ("prompt_too_long", 400, "context length"),
        ("unknown_model", 404, "nobody/nothing"),
        ("schema", 400, "no such type"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    name: str, status: int, says: str, xllm_answers: dict[str, Any]
) -> None:
    answer = xllm_answers["bad_requests"][name]
    assert answer["status"] == status
    assert says in answer["message"]


def test_a_client_that_hangs_up_frees_the_engine(xllm_answers: dict[str, Any]) -> None:
    assert xllm_answers["hang_up"] == {
        "stopped_early": True,
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("headers", "xargs", "param"),
    [
        ({"x-xllm-ttft-ms": "-1"}, {}, "x-xllm-ttft-ms"),
        ({}, {"xllm_class": "batch"}, "vllm_xargs.xllm_class"),
    ],
)
def test_a_wrong_promise_is_400_with_its_field(
    headers: dict[str, str], xargs: dict[str, Any], param: str, stream: bool, xllm_url: str
) -> None:
    response = ask(xllm_url, headers, xargs, stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def ask(
    url: str, headers: dict[str, str], xargs: dict[str, Any], *, stream: bool
) -> httpx.Response:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
        "stream": stream,
        "vllm_xargs": xargs,
    }
    return httpx.post(
        f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False
    )
