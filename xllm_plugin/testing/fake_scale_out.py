"""A server without this plugin that has vLLM's scale-out routes, and fails where it is told to.

It is held to what the routes are for: tokens that were sent come back after the prompt, their text
is asked for once and in order, and how much is left is counted.  `FakeModel` is what it generates.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer
from xllm_plugin.testing.fake_streams import (
    PROMPT_IDS,
    Death,
    FakeModel,
    Text,
    send_events,
    usage_of,
)

__all__ = ["RouteFault", "scale_out_instance"]

GENERATE = "/inference/v1/generate"
_DEFAULT_MAX_TOKENS = 16


@dataclass(slots=True)
class RouteFault:
    """What a route does instead of answering.

    Attributes:
        route: the end of its path: "render", "generate" or "derender".
        how: "404", "500", "garbage" (200, and no JSON that it could be), "reset" (the connection),
            "silence"; of "generate" also "cut" (in its first event), "unended" (no last event),
            "error" (an event that is one) and "no event" (one that is none).
        after: so many answers are right before.
        times: so many are wrong then.
    """

    route: str
    how: str
    after: int = 0
    times: int = 1_000_000


@dataclass(slots=True)
class _Pace:
    pause_s: float
    pad_bytes: int


class _ScaleOut:
    def __init__(
        self,
        model: FakeModel,
        fault: RouteFault | None,
        death: Death | None,
        rendered: dict[str, Any],
        pace: _Pace,
    ) -> None:
        self._model = model
        self._fault = fault
        self._death = death
        self._rendered = rendered
        self._pace = pace

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        path = received.target.decode()
        route = path.rpartition("/")[2]
        if route not in ("render", "generate", "derender"):
            if path.startswith("/v1/xllm/"):
                await answer(b'{"detail":"Not Found"}', "404 Not Found")(received, writer)
                return
            mine, self._death = self._death, None
            events = self._model.events(path, json.loads(received.body))
            await send_events(events, mine, received, writer)
            return
        body = json.loads(received.body)
        self._model.asked.append(body)
        how = self._turn(route)
        if how in ("404", "500"):
            error = {"error": {"message": "not today", "type": "x", "param": None, "code": 500}}
            await answer(json.dumps(error).encode(), f"{how} Sorry")(received, writer)
        elif how == "garbage":
            await answer(b'{"what":[')(received, writer)
        elif how == "reset":
            writer.transport.abort()
        elif how == "silence":
            await received.gone.wait()
        elif route == "generate":
            await self._generate(body, how, received, writer)
        else:
            is_render = route == "render"
            found = self._render(path, body) if is_render else self._derender(path, body)
            await answer(json.dumps(found).encode())(received, writer)

    def _turn(self, route: str) -> str:
        fault = self._fault
        if fault is None or fault.route != route:
            return ""
        if fault.after:
            fault.after -= 1
            return ""
        fault.times -= 1
        return fault.how if fault.times >= 0 else ""

    def _render(self, path: str, body: dict[str, Any]) -> Any:
        params = {"output_kind": 1, "skip_clone": True, "stop": [], "max_tokens": 64}
        found = {
            "request_id": "r",
            "token_ids": PROMPT_IDS,
            "features": None,
            "model": body["model"],
            "stream_options": body.get("stream_options"),
            "cache_salt": body.get("cache_salt"),
            "priority": 0,
            "sampling_params": params | {"max_tokens": body.get("max_tokens", 64)},
        }
        for name, value in self._rendered.items():
            part = found[name]
            found[name] = part | value if isinstance(part, dict) else value
        return [found] if path == "/v1/completions/render" else found

    async def _generate(
        self, body: dict[str, Any], how: str, received: Received, writer: asyncio.StreamWriter
    ) -> None:
        prompt, sent = body["token_ids"][: len(PROMPT_IDS)], body["token_ids"][len(PROMPT_IDS) :]
        assert prompt == PROMPT_IDS
        assert sent == list(range(len(sent))), "tokens lost, or sent twice"
        assert body["sampling_params"]["max_tokens"] == 64 - len(sent)
        assert body["sampling_params"]["min_tokens"] == 0
        chunks = [[one for one in ids if one >= len(sent)] for ids in self._model.chunks()]
        chunks = [ids for ids in chunks if ids]
        events = []
        for number, ids in enumerate(chunks, 1):
            finish = self._model.finish_reason if number == len(chunks) else None
            choice = {"index": 0, "logprobs": None, "finish_reason": finish, "token_ids": ids}
            events.append(_event({"choices": [choice], "padding": "x" * self._pace.pad_bytes}))
        usage = usage_of(len(self._model.pieces) - len(sent))
        events += [_event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]
        death = None
        if how == "cut":
            death = Death(len(events[0]) - 9)
        elif how == "unended":
            events = events[:-1]
        elif how == "error":
            error = {"message": "EngineDead", "type": "x", "param": None, "code": 500}
            events[1:-1] = [_event({"error": error})]
        elif how == "no event":
            events[1] = b"data: {no\n\n"
        elif self._death is not None:
            death, self._death = self._death, None
        await send_events(events, death, received, writer, pause_s=self._pace.pause_s)

    def _derender(self, path: str, body: dict[str, Any]) -> Any:
        assert body["stream"] is True
        assert body["model"] is None
        state = body["stream_state"]
        if state is None:
            assert body["prompt_token_ids"] == PROMPT_IDS
            state = {"held": "", "num_tokens": 0}
        text, (choice,) = Text(bytes.fromhex(state["held"])), body["generate_chunk"]["choices"]
        ids = choice["token_ids"]
        assert ids == list(range(state["num_tokens"], state["num_tokens"] + len(ids)))
        new = "".join(text.add(self._model.pieces[one]) for one in ids)
        found: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": None}
        is_chat = path == "/v1/chat/completions/derender"
        found |= {"delta": {"role": None, "content": new or None}} if is_chat else {"text": new}
        state = {"held": text.held.hex(), "num_tokens": state["num_tokens"] + len(ids)}
        return {"chunk": {"model": "fake", "choices": [found]}, "stream_state": state}


def scale_out_instance(
    model: FakeModel,
    fault: RouteFault | None = None,
    death: Death | None = None,
    *,
    rendered: dict[str, Any] | None = None,
    pause_s: float = 0.0,
    pad_bytes: int = 0,
) -> FakeInstance:
    """An instance of `model` without this plugin.

    Args:
        model: what is generated; `asked` collects what the three routes are sent.
        fault: of a route.
        death: of its first stream, of whatever route.
        rendered: differs in what `/render` answers.
        pause_s: after each event that it generates.
        pad_bytes: of each of these, that nobody reads.
    """
    pace = _Pace(pause_s, pad_bytes)
    instance = FakeInstance(script=_ScaleOut(model, fault, death, rendered or {}, pace))
    instance.scales_out = True
    return instance


def _event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(content, separators=(",", ":")).encode()
