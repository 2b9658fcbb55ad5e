"""Which streams a server without this plugin can continue exactly.

It computes the tokens that were sent as part of the prompt: whatever counts, reads or remembers a
request's *output* would begin anew.  So only what is known not to do so goes on.
"""

from __future__ import annotations

from typing import Any, Final

from xllm_plugin.scheduler.promise import KEYS
from xllm_plugin.service.scale_out.messages import AskedFields, Rendered

__all__ = ["refusal"]

_FREE: Final = frozenset(
    {
        "allowed_token_ids",
        "detokenize",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "min_p",
        "min_tokens",
        "output_kind",
        "skip_clone",
        "skip_reading_prefix_cache",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop_token_ids",
        "stream_interval",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""Sampling parameters that look at one token alone, or are counted here (the lengths)."""
_NAMES: Final = {
    "bad_words": "bad words",
    "frequency_penalty": "a frequency penalty",
    "n": "`n` over 1",
    "presence_penalty": "a presence penalty",
    "prompt_logprobs": "prompt log probabilities",
    "repetition_detection": "repetition detection",
    "repetition_penalty": "a repetition penalty",
    "stop": "stop strings",
    "structured_outputs": "structured outputs",
    "thinking_token_budget": "a thinking token budget",
    "watermarking": "watermarking",
}
_NEUTRAL: Final[dict[str, Any]] = {
    "frequency_penalty": 0,
    "n": 1,
    "output_text_buffer_length": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "routed_experts_prompt_start": 0,
    "watermarking": False,
}
_DEFAULT_TEMPERATURE: Final = 1.0


def refusal(asked: AskedFields, rendered: Rendered) -> str:
    """What keeps a stream from being continued there: a noun; empty if nothing does.

    Args:
        asked: of the client's body.
        rendered: what the server makes of it, with its own defaults; a sampling parameter that is
            not known here is one that may look at the output.
    """
    params = rendered.sampling_params
    of_body = {
        "tools": bool(asked.tools),
        "an echo of its prompt": bool(asked.echo),
        "a prompt of embeddings": asked.prompt_embeds is not None,
        "tokens written as ids": bool(asked.return_tokens_as_token_ids) and "logprobs" in params,
        "media in its prompt": rendered.features is not None,
        "a reasoning parser": rendered.reasoning_parser_kwargs is not None,
        "a seed": params.get("seed") is not None and _is_random(params),
        "extra arguments": bool((params.get("extra_args") or {}).keys() - set(KEYS)),
    }
    found = [name for name, is_there in of_body.items() if is_there]
    for name, value in params.items():
        if name in _FREE or name in ("seed", "extra_args") or value in (None, [], {}):
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            found.append(_NAMES.get(name, f"`{name}`"))
    return found[0] if found else ""


def _is_random(params: dict[str, Any]) -> bool:
    temperature = params.get("temperature", _DEFAULT_TEMPERATURE)
    return bool(temperature)
