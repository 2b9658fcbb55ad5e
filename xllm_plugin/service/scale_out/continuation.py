"""One stream that a server without this plugin goes on with."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Final

import aiohttp
import msgspec

from xllm_plugin.instance.resumption import Resumption
from xllm_plugin.service.scale_out.events import DONE, EventWriter, error_event
from xllm_plugin.service.scale_out.messages import (
    AskedFields,
    GenerateChoice,
    GenerateChunk,
    Rendered,
)
from xllm_plugin.service.scale_out.rule import refusal
from xllm_plugin.service.scale_out.server import NotContinuedError, ScaleOutServer, events_of
from xllm_plugin.service.scale_out.text import Text

__all__ = ["Continuation", "begun"]

_CHAT: Final = "/v1/chat/completions"
_DEFAULT_MAX_TOKENS: Final = 16
"""vLLM's: a rendered request tells what is not a default."""
_REFUSED: Final = 400

_decode_asked: Final = msgspec.json.Decoder(AskedFields).decode


async def begun(
    server: ScaleOutServer, resumption: Resumption, adapters: Collection[str]
) -> Continuation:
    """What is known of a stream before its next token.

    Args:
        server: to go on.
        resumption: what the client has.
        adapters: names of models that are LoRA adapters there.

    Raises:
        NotContinuedError: it does not go on there.
        aiohttp.ClientError, OSError: the server has gone.
    """
    body = bytes(resumption.body)
    rendered = await server.render(body)
    try:
        asked = _decode_asked(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotContinuedError(f"its body cannot be read: {error}", _REFUSED) from error
    _check(asked, rendered, resumption)
    adapter = asked.model if asked.model in adapters else None
    text = Text(server, rendered, resumption.path, adapter)
    sent = [token for chunk in resumption.chunks for token in chunk]
    primed = await text.begin(sent)
    if primed.stream_state.get("output_token_ids"):
        # Only a server with a parser of chats wants all of the output with every chunk.
        raise NotContinuedError("a stream with a tool or reasoning parser cannot go on", _REFUSED)
    return Continuation(server, resumption, rendered, text, primed.chunk.model)


def _check(asked: AskedFields, rendered: Rendered, resumption: Resumption) -> None:
    why = refusal(asked, rendered)
    if why:
        raise NotContinuedError(f"a stream with {why} takes an xllm-plugin to go on", _REFUSED)
    is_done = resumption.finish is not None
    if not is_done and _max_tokens(rendered) <= resumption.num_tokens:
        raise NotContinuedError("it has all its tokens", _REFUSED)
    if not resumption.chunks and resumption.num_opening_events != (resumption.path == _CHAT):
        raise NotContinuedError("it has begun in another way than vLLM's streams", _REFUSED)


def _max_tokens(rendered: Rendered) -> int:
    found = rendered.sampling_params.get("max_tokens", _DEFAULT_MAX_TOKENS)
    return found if isinstance(found, int) else _DEFAULT_MAX_TOKENS


class Continuation:
    """The rest of a stream; `open`, then its `events`.

    Args:
        server: goes on.
        resumption: what the client has.
        rendered: the request.
        text: told of the tokens that were sent.
        model: as the server calls it.
    """

    def __init__(
        self,
        server: ScaleOutServer,
        resumption: Resumption,
        rendered: Rendered,
        text: Text,
        model: str,
    ) -> None:
        self._server = server
        self._resumption = resumption
        self._rendered = rendered
        self._text = text
        self._writer = EventWriter(resumption, rendered, model)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncIterator[bytes]]:
        """The events that the client does not have; leaving early ends the server's work.

        Raises:
            NotContinuedError, aiohttp.ClientError, OSError: as `begun`, here and by the events.
        """
        if self._resumption.finish is not None:
            yield self._end(self._resumption.finish.num_events)
            return
        async with self._server.generate(self._request()) as content:
            yield self._events(content)

    async def _end(self, num_known: int) -> AsyncIterator[bytes]:
        """Events after the one with the finish reason."""
        events = [self._writer.usage(None)] if self._writer.has_usage else []
        for event in [*events, DONE][num_known:]:
            yield event

    async def _events(self, content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        async for chunks in events_of(content):
            new: list[GenerateChoice] = []
            for chunk in chunks:
                if chunk is not None and chunk.choices:
                    new += chunk.choices
                    continue
                if new:  # what has come together is one event: fewer calls where these are slow
                    yield await self._tokens(new)
                    new = []
                for event in self._other(chunk):
                    yield event
            if new:
                yield await self._tokens(new)

    def _other(self, chunk: GenerateChunk | None) -> list[bytes]:
        if chunk is None:
            return [DONE]
        if chunk.error is not None:
            return [error_event(chunk.error.message, chunk.error.code)]
        return [self._writer.usage(chunk.usage)] if self._writer.has_usage else []

    async def _tokens(self, choices: list[GenerateChoice]) -> bytes:
        new = _together(choices)
        found = await self._text.of(new)
        return self._writer.tokens(new, found.text, self._text.shown(found.logprobs))

    def _request(self) -> bytes:
        rendered, resumption = self._rendered, self._resumption
        num_sent = resumption.num_tokens
        params = dict(rendered.sampling_params)
        params["max_tokens"] = _max_tokens(rendered) - num_sent
        params["min_tokens"] = max(0, params.get("min_tokens", 0) - num_sent)
        if self._text.num_asked_logprobs is not None:
            params["logprobs"] = self._text.num_asked_logprobs
        return msgspec.json.encode(
            {
                "token_ids": [
                    *rendered.token_ids,
                    *(token for chunk in resumption.chunks for token in chunk),
                ],
                "sampling_params": params,
                "model": rendered.model,
                "cache_salt": rendered.cache_salt,
                "priority": rendered.priority,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )


def _together(choices: list[GenerateChoice]) -> GenerateChoice:
    """Tokens that came one after the other, as if in one event."""
    if len(choices) == 1:
        return choices[0]
    ids = [token for choice in choices for token in choice.token_ids or ()]
    content = [
        entry for choice in choices for entry in (choice.logprobs or {}).get("content") or ()
    ]
    has_logprobs = any(choice.logprobs is not None for choice in choices)
    return GenerateChoice(
        token_ids=ids,
        finish_reason=choices[-1].finish_reason,
        stop_reason=choices[-1].stop_reason,
        logprobs={"content": content} if has_logprobs else None,
    )
