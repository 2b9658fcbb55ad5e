"""What clients ask an OpenAI server for, as a list of dialogues to hold with any two servers.

`hold_all` talks to one server with the real `openai` client, one request after the other, and
returns plain values without what may differ between two runs of one server (identifiers, times).
Two servers over the same engine settings must return the same values, down to the log-probs:
requests come one at a time, so that the batches are the same.  Only `several_at_once` does not; it
is meant for a dense model in float32, where batches do not matter (see `equality`).

Prompts are short and greedy.  Their answers need not be sensible; tiny random weights do.
Needs the packages `openai` and `httpx`, and no engine.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import httpx

from xllm_plugin.errors import NotNowError
from xllm_plugin.testing.streams import say_together

if TYPE_CHECKING:
    from openai import OpenAI

__all__ = [
    "DIALOGUES",
    "LOOSE_WEATHER_TOOL",
    "MAX_TOKENS",
    "PERSON_SCHEMA",
    "WEATHER_TOOL",
    "Talk",
    "hold_all",
    "read_metric",
    "stable",
]

MAX_TOKENS = 12
MAX_JSON_TOKENS = 160
MAX_LONG_TOKENS = 400
VOLATILE = frozenset(
    {
        *("completed_at", "created", "created_at", "id", "item_id", "request_id"),
        "system_fingerprint",
    }
)

PERSON_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather of a city.",
        "strict": True,  # else vLLM lets a named call's arguments be any JSON
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}

LOOSE_WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
"""Not strict: a call's arguments may be any object."""


class Talk:
    """A conversation partner: one server and the model it serves."""

    def __init__(self, client: OpenAI, url: str, model: str) -> None:
        self.client = client
        self.url = url
        self.model = model

    def chat(self, text: str, **options: Any) -> Any:
        """One chat request; greedy and short unless told otherwise.  A stream if `stream`."""
        return self.client.chat.completions.create(
            **{
                "model": self.model,
                "messages": [{"role": "user", "content": text}],
                "temperature": 0.0,
                "max_tokens": MAX_TOKENS,
                **options,
            }
        )

    def complete(self, prompt: str, **options: Any) -> Any:
        """One completion request, as `chat`."""
        return self.client.completions.create(
            **{
                "model": self.model,
                "prompt": prompt,
                "temperature": 0.0,
                "max_tokens": MAX_TOKENS,
                **options,
            }
        )


def stable(value: Any) -> Any:
    """Plain JSON values of an answer, without what differs from run to run."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {k: stable(v) for k, v in sorted(value.items()) if k not in VOLATILE}
    if isinstance(value, list | tuple):
        return [stable(item) for item in value]
    return value


def read_metric(url: str, name: str, **labels: str) -> float:
    """Sum of the samples of one Prometheus metric whose labels include `labels`; 0 if none."""
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=10.0).text
    total = 0.0
    for line in text.splitlines():
        if re.match(rf"{re.escape(name)}(\{{|\s)", line) and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            total += float(line.rpartition(" ")[2])
    return total


def models(talk: Talk) -> Any:
    """Which models are there, and all that is said of them."""
    return [(model.id, stable(model)) for model in talk.client.models.list()]


def chat(talk: Talk) -> Any:
    """A chat, with usage."""
    return stable(talk.chat("What is the capital of France?"))


def chat_stream(talk: Talk) -> Any:
    """The same chat as a stream, with usage in its last chunk."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(talk.chat("What is the capital of France?", **options))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return {
        "text": "".join(choice.delta.content or "" for choice in choices),
        "finish_reason": choices[-1].finish_reason,
        "usage": stable(chunks[-1].usage),
        "pieces": len(choices),
    }


def streamed(chunks: Iterable[Any]) -> Any:
    """All fields of a stream's chunks, whatever their number: two tokens may come in one."""
    return asdict(say_together(map(stable, chunks)))


def chat_chunks(talk: Talk) -> Any:
    """What the chunks of a chat say, field by field, with log-probs and usage."""
    usage = {"include_usage": True, "continuous_usage_stats": True}
    options = {"stream": True, "stream_options": usage, "logprobs": True, "top_logprobs": 2}
    return streamed(talk.chat("Count to five.", **options))


def several_turns(talk: Talk) -> Any:
    """A system message and a conversation that goes on."""
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one."},
    ]
    return stable(talk.chat("", messages=messages))


def completion(talk: Talk) -> Any:
    """A text completion."""
    return stable(talk.complete("The sun rises in the"))


def completion_stream(talk: Talk) -> Any:
    """The same completion as a stream."""
    chunks = list(talk.complete("The sun rises in the", stream=True))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return {
        "text": "".join(choice.text for choice in choices),
        "finish_reason": choices[-1].finish_reason,
    }


def completion_chunks(talk: Talk) -> Any:
    """What the chunks of a completion say, field by field, with log-probs and usage."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 2}
    return streamed(talk.complete("One, two,", **options))


def responses(talk: Talk) -> Any:
    """OpenAI's newer interface: a response, and the events of another."""
    asked: dict[str, Any] = {"model": talk.model, "input": "Name a colour.", "temperature": 0.0}
    asked |= {"max_output_tokens": MAX_TOKENS}
    text, rest = "", []
    for event in map(stable, talk.client.responses.create(**asked, stream=True)):
        del event["sequence_number"]  # as for `streamed`: two tokens may come in one event
        text += event.pop("delta", "")
        if event not in rest:
            rest.append(event)
    return {"text": text, "events": rest, "whole": stable(talk.client.responses.create(**asked))}


def completion_of_token_ids(talk: Talk) -> Any:
    """Two prompts of token ids in one request, echoed."""
    return stable(talk.complete([[10, 20, 30], [40, 50]], echo=True, max_tokens=4))  # type: ignore[arg-type]


def several_choices(talk: Talk) -> Any:
    """`n` sampled answers to one prompt."""
    return stable(talk.chat("Tell me a story.", n=3, temperature=1.0, seed=11))


def stop_string(talk: Talk) -> Any:
    """A stop string in the middle of what would have been said."""
    whole = talk.complete("Once upon a time").choices[0].text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    answer = talk.complete("Once upon a time", stop=[stop])
    return {"whole": whole, "stop": stop, "answer": stable(answer)}


def log_probs(talk: Talk) -> Any:
    """Log-probs of a chat, of a completion, and of a prompt."""
    return {
        "chat": stable(talk.chat("Count to five.", logprobs=True, top_logprobs=3)),
        "completion": stable(talk.complete("One, two,", logprobs=3)),
        "prompt": stable(talk.complete("One, two, three", logprobs=1, echo=True, max_tokens=1)),
    }


def seeds(talk: Talk) -> Any:
    """Sampling with one seed twice, then with another."""
    return [
        talk.complete("A random word:", temperature=1.0, seed=seed).choices[0].text
        for seed in (7, 7, 8)
    ]


def penalties(talk: Talk) -> Any:
    """Sampling parameters of OpenAI's and of vLLM's own."""
    return stable(
        talk.complete(
            "la la la la",
            temperature=0.8,
            top_p=0.9,
            seed=3,
            frequency_penalty=0.5,
            presence_penalty=0.5,
            logit_bias={"10": -100},
            extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 8},
        )
    )


def guided_json(talk: Talk) -> Any:
    """An answer that must follow a JSON schema."""
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": PERSON_SCHEMA}}
    return stable(
        talk.chat("Describe a pet as JSON.", response_format=form, max_tokens=MAX_JSON_TOKENS)
    )


def tool_named(talk: Talk) -> Any:
    """A call of the one tool that is named."""
    choice = {"type": "function", "function": {"name": "get_weather"}}
    return stable(
        talk.chat(
            "Weather in Rome?", tools=[WEATHER_TOOL], tool_choice=choice, max_tokens=MAX_JSON_TOKENS
        )
    )


def tool_required(talk: Talk) -> Any:
    """A call of some tool."""
    return stable(
        talk.chat(
            "Weather in Rome?",
            tools=[WEATHER_TOOL],
            tool_choice="required",
            max_tokens=MAX_JSON_TOKENS,
        )
    )


def tool_auto(talk: Talk) -> Any:
    """Tools on offer, the model free to ignore them."""
    return stable(talk.chat("Weather in Rome?", tools=[WEATHER_TOOL], tool_choice="auto"))


def tool_stream(talk: Talk) -> Any:
    """A named tool call as a stream."""
    choice = {"type": "function", "function": {"name": "get_weather"}}
    chunks = talk.chat(
        "Weather in Rome?",
        tools=[WEATHER_TOOL],
        tool_choice=choice,
        max_tokens=MAX_JSON_TOKENS,
        stream=True,
    )
    calls = [
        call for chunk in chunks for piece in chunk.choices for call in piece.delta.tool_calls or []
    ]
    return {
        "name": "".join(call.function.name or "" for call in calls),
        "arguments": "".join(call.function.arguments or "" for call in calls),
    }


def bad_requests(talk: Talk) -> Any:
    """What a server says to requests that cannot be met, as the client raises it."""
    from openai import APIStatusError

    wrong: dict[str, Callable[[], Any]] = {
        "temperature": lambda: talk.chat("x", temperature=-1.0),
        "top_p": lambda: talk.chat("x", top_p=7.0),
        "too_long": lambda: talk.chat("x", max_tokens=1_000_000),
        "prompt_too_long": lambda: talk.complete("a b " * 5000),
        "unknown_model": lambda: talk.chat("x", model="nobody/nothing"),
        "schema": lambda: talk.chat(
            "x",
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "bad", "schema": {"type": "no such type"}},
            },
        ),
        "no_messages": lambda: talk.chat("x", messages=[]),
        "stream": lambda: talk.chat("x", temperature=-1.0, stream=True),
        "tool_choice": lambda: talk.chat("x", tool_choice="required"),
        "embeddings": lambda: talk.client.embeddings.create(model=talk.model, input="x"),
    }
    found: dict[str, Any] = {}
    for name, ask in wrong.items():
        try:
            found[name] = {"status": 200, "answer": stable(ask())}
        except APIStatusError as error:
            found[name] = {
                "raised": type(error).__name__,
                "status": error.status_code,
                "message": error.message,
                "type": error.type,
                "code": error.code,
                "param": error.param,
            }
    return found


def several_at_once(talk: Talk) -> Any:
    """Eight requests at the same time."""
    prompts = [f"{number} times {number} is" for number in range(2, 10)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(talk.complete, prompts))
    return [stable(answer) for answer in answers]


def hang_up(talk: Talk) -> Any:
    """A client that disconnects in the middle of a long answer."""
    generated = read_metric(talk.url, "vllm:generation_tokens_total")
    with talk.complete(
        "A very long story:",
        stream=True,
        max_tokens=MAX_LONG_TOKENS,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
        wait_for_metric(talk.url, "vllm:num_requests_running", 1)
    wait_until_idle(talk.url)
    generated = read_metric(talk.url, "vllm:generation_tokens_total") - generated
    return {"stopped_early": generated < MAX_LONG_TOKENS}


def wait_until_idle(url: str, limit_s: float = 30.0) -> None:
    """Return when no request runs or waits.  Raises `NotNowError` after `limit_s`."""
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        wait_for_metric(url, name, 0, limit_s)


def wait_for_metric(url: str, name: str, expected: float, limit_s: float = 30.0) -> None:
    """Return when a metric has a value; vLLM sets its gauges after a step's answers are sent.

    Raises:
        NotNowError: it has another value after `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while (value := read_metric(url, name)) != expected:
        if time.monotonic() > deadline:
            raise NotNowError(
                f"{url} still reports {name} {value:g}, not {expected:g}, after {limit_s:.0f} s"
            )
        time.sleep(0.02)


def routes(talk: Talk) -> Any:
    """Every route the server documents."""
    answer = httpx.get(f"{talk.url}/openapi.json", trust_env=False, timeout=30.0)
    return sorted(answer.json()["paths"])


DIALOGUES: dict[str, Callable[[Talk], Any]] = {
    function.__name__: function
    for function in (
        models,
        routes,
        chat,
        chat_stream,
        chat_chunks,
        several_turns,
        completion,
        completion_stream,
        completion_chunks,
        responses,
        completion_of_token_ids,
        several_choices,
        stop_string,
        log_probs,
        seeds,
        penalties,
        guided_json,
        tool_named,
        tool_required,
        tool_auto,
        tool_stream,
        bad_requests,
        several_at_once,
        hang_up,
    )
}
"""By name, in the order in which they are held: the prefix cache is part of the conversation."""


def hold_all(url: str, model: str, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Hold the dialogues (all by default) with the server at `url`, one after the other."""
    from openai import DefaultHttpxClient, OpenAI

    with (
        DefaultHttpxClient(trust_env=False, timeout=120.0) as transport,
        OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=transport
        ) as client,
    ):
        talk = Talk(client, url, model)
        answers = {name: DIALOGUES[name](talk) for name in names or DIALOGUES}
    plain: dict[str, Any] = json.loads(json.dumps(answers))
    return plain
