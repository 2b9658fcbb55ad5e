"""What is asked of a server, and what a client is told of its answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from xllm_plugin.instance.resumption import Finish, Resumption
from xllm_plugin.service.scale_out.continuation import begun
from xllm_plugin.service.scale_out.messages import Derendered, Rendered
from xllm_plugin.service.scale_out.server import NotContinuedError
from xllm_plugin.testing.streams import events_in

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
USAGE = {"include_usage": True}
RUNNING = {"include_usage": True, "continuous_usage_stats": True}


class Content:
    """A body that comes in these parts."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    async def iter_any(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part


class Server:
    """Answers at hand; the text of token 5 is "t5"."""

    def __init__(self, rendered: dict[str, Any], *events: dict[str, Any]) -> None:
        self.rendered = {"token_ids": [*range(90)], "sampling_params": {}} | rendered
        self.parts = [b"data: %b\n\n" % json.dumps(one).encode() for one in events]
        self.generating: dict[str, Any] = {}
        self.derendering: list[dict[str, Any]] = []

    async def render(self, body: bytes) -> Rendered:
        return msgspec.convert(self.rendered, Rendered)

    async def derender(self, body: bytes) -> Derendered:
        asked = json.loads(body)
        self.derendering.append(asked)
        (choice,) = asked["generate_chunk"]["choices"]
        text = "".join(f"t{token}" for token in choice["token_ids"])
        found = {"text": text, "logprobs": self._logprobs(choice["logprobs"])}
        if self.rendered.get("is_chat"):
            found |= {"delta": {"content": text or None}}
        chunk = {"model": asked["model"] or "base", "choices": [found]}
        state = {"n": len(self.derendering)}
        return msgspec.convert({"chunk": chunk, "stream_state": state}, Derendered)

    def _logprobs(self, asked: Any) -> Any:
        if asked is None:
            return None
        if self.rendered.get("is_chat"):
            tops = [
                [{"token": f"t{top['token_id']}"} for top in one["top_logprobs"]]
                for one in asked["content"]
            ]
            return {"content": [{"token": "?", "top_logprobs": top} for top in tops]}
        return {
            "text_offset": [0 for _ in asked["content"]],
            "tokens": [f"t{one['token_id']}" for one in asked["content"]],
            "top_logprobs": [
                {f"t{top['token_id']}": top["logprob"] for top in one.get("top_logprobs", [])}
                for one in asked["content"]
            ],
        }

    @contextlib.asynccontextmanager
    async def generate(self, body: bytes) -> AsyncIterator[Content]:
        self.generating = json.loads(body)
        yield Content([*self.parts, b"data: [DONE]\n\n"])


def chunk(ids: list[int], **changes: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "token_ids": ids, **changes}]}


def resumption(path: str, chunks: list[list[int]], **changes: Any) -> Resumption:
    body = changes.pop("body", {"model": "alias"})
    return Resumption(
        path=path,  # type: ignore[arg-type]
        body=msgspec.Raw(json.dumps(body).encode()),
        id="x-1",
        created=5,
        chunks=chunks,
        **changes,
    )


def continued(run: Any, server: Any, what: Resumption, adapters: tuple[str, ...] = ()) -> list[Any]:
    async def check() -> list[bytes]:
        found = await begun(server, what, adapters)
        async with found.open() as events:
            return [event async for event in events]

    return events_in(b"".join(run(check())).decode())


def test_what_was_sent_comes_after_the_prompt_and_off_the_lengths(run: Any) -> None:
    params = {"max_tokens": 20, "min_tokens": 5, "temperature": 0.0}
    rendered = {"sampling_params": params, "cache_salt": "s", "priority": 3, "model": "alias"}
    server = Server(rendered, chunk([7]), chunk([8], finish_reason="length"))
    events = continued(run, server, resumption(COMPLETION, [[1], [2, 3]]))
    assert server.generating == {
        "token_ids": [*range(90), 1, 2, 3],
        "sampling_params": {"max_tokens": 17, "min_tokens": 2, "temperature": 0.0},
        "model": "alias",
        "cache_salt": "s",
        "priority": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, *others = server.derendering
    assert first["prompt_token_ids"] == [*range(58, 90)]
    assert first["generate_chunk"]["choices"][0]["token_ids"] == [1, 2, 3]
    assert [one["stream_state"] for one in others] == [{"n": 1}, {"n": 2}]
    assert not any("prompt_token_ids" in one for one in others)
    start = {"id": "x-1", "object": "text_completion", "created": 5, "model": "base"}
    fields = {"index": 0, "logprobs": None, "prompt_token_ids": None, "stop_reason": None}
    choices = [
        {**fields, "text": "t7", "finish_reason": None, "token_ids": [7]},
        {**fields, "text": "t8", "finish_reason": "length", "token_ids": [8]},
    ]
    assert events == [*({**start, "choices": [one]} for one in choices), "[DONE]"]


def test_an_adapter_keeps_its_name(run: Any) -> None:
    server = Server({}, chunk([7], finish_reason="length"))
    events = continued(run, server, resumption(COMPLETION, [[1]]), ("alias",))
    assert {one["model"] for one in server.derendering} == {"alias"}
    assert events[0]["model"] == "alias"


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_usage_is_of_the_whole_stream(run: Any, path: str) -> None:
    server = Server(
        {"stream_options": RUNNING, "is_chat": path == CHAT},
        chunk([7, 8], finish_reason="length"),
        {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 91}}},
    )
    tokens, usage, done = continued(run, server, resumption(path, [[1], [2]]))
    whole = {"prompt_tokens": 90, "completion_tokens": 4, "total_tokens": 94}
    details = {"completion_tokens_details": None} if path == CHAT else {}
    assert tokens["usage"] == whole | details
    assert usage["usage"] == whole | {"prompt_tokens_details": {"cached_tokens": 90}}
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("wishes", "num_known", "kinds"),
    [(USAGE, 0, ["usage", "[DONE]"]), (USAGE, 1, ["[DONE]"]), ({}, 0, ["[DONE]"])],
)
def test_what_has_ended_is_not_generated_for(
    run: Any, wishes: dict[str, bool], num_known: int, kinds: list[str]
) -> None:
    server = Server({"stream_options": wishes, "sampling_params": {"max_tokens": 2}})
    finish = Finish(finish_reason="length", num_events=num_known)
    events = continued(run, server, resumption(COMPLETION, [[1], [2]], finish=finish))
    assert [one if one == "[DONE]" else "usage" for one in events] == kinds
    assert not server.generating


@pytest.mark.parametrize(
    ("params", "end", "shown"),
    [
        ({}, {"finish_reason": "stop", "stop_reason": 8}, "t7"),
        ({}, {"finish_reason": "stop"}, "t7"),  # the end of the text
        ({"include_stop_str_in_output": True}, {"finish_reason": "stop"}, "t7t8"),
        ({}, {"finish_reason": "length"}, "t7t8"),
    ],
)
def test_the_token_that_ends_it_is_counted_and_not_shown(
    run: Any, params: dict[str, Any], end: dict[str, Any], shown: str
) -> None:
    server = Server({"sampling_params": params}, chunk([7, 8], **end))
    event, _ = continued(run, server, resumption(COMPLETION, [[1]]))
    (choice,) = event["choices"]
    assert (choice["text"], choice["token_ids"]) == (shown, [7, 8])
    assert choice["stop_reason"] == end.get("stop_reason")


def entry(token: int, *top: tuple[int, int]) -> dict[str, Any]:
    """A token, and those that are listed with it, each with its rank."""
    listed = [{"token_id": one, "rank": rank, "logprob": -1.0} for one, rank in top]
    return {"token_id": token, "logprob": -1.0, "top_logprobs": listed}


def test_log_probs_of_completions_are_the_most_probable_and_the_chosen(run: Any) -> None:
    """One more is asked for: of these the route gives no more than it was asked for."""
    content = [entry(7, (7, 1), (1, 2), (2, 3)), entry(8, (8, 9), (1, 1), (2, 2))]
    rendered = {"sampling_params": {"logprobs": 2}}
    server = Server(rendered, chunk([7, 8], logprobs={"content": content}))
    event, _ = continued(run, server, resumption(COMPLETION, [[11], [12]]))
    found = event["choices"][0]["logprobs"]
    assert server.generating["sampling_params"]["logprobs"] == 3
    assert [[*one] for one in found["top_logprobs"]] == [["t7", "t1"], ["t8", "t1", "t2"]]
    assert found["text_offset"] == [6, 8], "after the texts of what was sent"


def test_log_probs_of_chats_are_as_many_as_asked_for(run: Any) -> None:
    content = [entry(7, (7, 1))]
    server = Server(
        {"sampling_params": {"logprobs": 0}, "is_chat": True},
        chunk([7], logprobs={"content": content}),
    )
    event, _ = continued(run, server, resumption(CHAT, [[11]]))
    assert server.generating["sampling_params"]["logprobs"] == 0
    assert event["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_special_tokens_are_shown_if_they_are_to_be(run: Any) -> None:
    rendered = {"sampling_params": {"skip_special_tokens": False}}
    server = Server({**rendered, "is_chat": True}, chunk([7]))
    continued(run, server, resumption(CHAT, [[1]]))
    assert all(one["chat_request"]["skip_special_tokens"] is False for one in server.derendering)
    server = Server(rendered, chunk([7]))
    continued(run, server, resumption(COMPLETION, [[1]]))
    asked = [one["completion_request"] for one in server.derendering]
    assert [one["skip_special_tokens"] for one in asked] == [False, False]


def test_an_error_of_the_request_is_passed_on(run: Any) -> None:
    fault = {"error": {"message": "no", "type": "x", "param": None, "code": 400}}
    error, done = continued(run, Server({}, fault), resumption(COMPLETION, [[1]]))
    assert (error["error"]["message"], error["error"]["code"], done) == ("no", 400, "[DONE]")


@pytest.mark.parametrize(
    ("what", "rendered"),
    [
        (resumption(COMPLETION, [[1], [2]]), {"sampling_params": {"max_tokens": 2}}),
        (resumption(COMPLETION, [[1] * 16]), {}),  # as many as vLLM's default
        (resumption(CHAT, [], num_opening_events=2), {}),
        (resumption(COMPLETION, [], num_opening_events=1), {}),
        (resumption(COMPLETION, [[1]], body={"model": 3}), {}),
        (resumption(COMPLETION, [[1]], body={"tools": [1]}), {}),
    ],
)
def test_what_is_not_continued_is_not_generated(
    run: Any, what: Resumption, rendered: dict[str, Any]
) -> None:
    server = Server(rendered)
    with pytest.raises(NotContinuedError) as caught:
        continued(run, server, what)
    assert caught.value.status == 400
    assert not server.generating
