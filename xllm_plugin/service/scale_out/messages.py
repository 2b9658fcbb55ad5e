"""What vLLM's scale-out routes are asked and answer, as far as it is read here."""

from __future__ import annotations

from typing import Any

import msgspec

from xllm_plugin.service.stream_events import StreamFault

__all__ = [
    "AskedFields",
    "Derendered",
    "GenerateChoice",
    "GenerateChunk",
    "Rendered",
    "UsageWishes",
]


class AskedFields(msgspec.Struct):
    """Fields of the client's body that a rendered request does not tell."""

    model: str | None = None
    tools: Any = None
    echo: Any = None
    prompt_embeds: Any = None
    return_tokens_as_token_ids: Any = None


class UsageWishes(msgspec.Struct):
    """When the client wants to be told how many tokens there were."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Rendered(msgspec.Struct):
    """What `/render` makes of a request.

    Attributes:
        token_ids: of the prompt.
        sampling_params: what is not vLLM's default, the server's own defaults included.
        features: of media in the prompt.
        reasoning_parser_kwargs: given if the server has a reasoning parser.
    """

    token_ids: list[int]
    sampling_params: dict[str, Any]
    features: Any = None
    reasoning_parser_kwargs: Any = None
    stream_options: UsageWishes | None = None
    model: str | None = None
    cache_salt: str | None = None
    priority: int = 0


class GenerateChoice(msgspec.Struct):
    """New tokens.  `logprobs` has a list `content`, an entry a token."""

    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None


class GenerateChunk(msgspec.Struct):
    """An event of `/inference/v1/generate`."""

    choices: list[GenerateChoice] = []
    usage: dict[str, Any] | None = None
    error: StreamFault | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _DerenderedChoice(msgspec.Struct):
    text: str = ""
    delta: _Delta | None = None
    logprobs: dict[str, Any] | None = None


class _DerenderedChunk(msgspec.Struct):
    model: str
    choices: list[_DerenderedChoice]


class Derendered(msgspec.Struct):
    """What `/derender` makes of new tokens, and what it wants to be told with the next ones."""

    chunk: _DerenderedChunk
    stream_state: dict[str, Any]

    @property
    def text(self) -> str:
        """Of these tokens, as far as its characters are whole."""
        return "".join(
            one.text if one.delta is None else one.delta.content or "" for one in self.chunk.choices
        )

    @property
    def logprobs(self) -> dict[str, Any] | None:
        """Of these tokens, in the form of the path."""
        return self.chunk.choices[0].logprobs if self.chunk.choices else None
