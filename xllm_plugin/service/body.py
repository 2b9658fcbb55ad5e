"""The fields of a request's body that parts of the service read, all in one pass over it."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Peek", "PromptFields", "StreamWishes"]


class PromptFields(msgspec.Struct):
    """What decides on the prompt; most of it goes on as it came."""

    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    documents: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    reasoning_effort: Any = None
    cache_salt: Any = None
    truncate_prompt_tokens: Any = None
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    tools: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    add_generation_prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    continue_final_message: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    add_special_tokens: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    chat_template: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    chat_template_kwargs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    mm_processor_kwargs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class StreamWishes(PromptFields):
    """Whether the stream that is asked for can be armed."""

    stream: Any = None
    n: Any = None
    best_of: Any = None
    echo: Any = None
    use_beam_search: Any = None
    include_reasoning: Any = None
    return_token_ids: Any = None


class Peek(StreamWishes):
    """The fields of a JSON body that are read here; all others are skipped, unparsed."""

    model: Any = None
    user: Any = None
    prompt_cache_key: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    previous_response_id: Any = None
    priority: Any = None
    vllm_xargs: Any = None
    sampling_params: Any = None
